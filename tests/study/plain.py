"""The headline numbers worked out row by row, as they were before SQL: slow, and plain to read."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, harmonic_mean
from typing import Any

import numpy as np

from palimpsest.record.results import Run
from palimpsest.record.row import Row
from palimpsest.study import recoverable as index
from palimpsest.study.columns import (
    HEADLINE,
    Column,
    old_rank,
    probe_of,
    recoverable_in,
    removal,
)
from palimpsest.study.intervals import Center, Estimate, Floats, Kind, interval
from palimpsest.study.localization import LEAST_EFFECT
from palimpsest.study.recoverable import (
    _SEED,
    BUDGET,
    FAMILIES,
    FOLDS,
    LEAST,
    PROBES,
    REPEATS,
    ZONES,
    left_out,
)
from palimpsest.study.samples import SHARES
from palimpsest.study.sequences import FIRST, MEASURES, Measure

Place = tuple[str, int, str]


def estimate(rows: Sequence[Row], center: Center = "mean", place: str | None = None) -> Estimate:
    """The centre of the facts' values, where a fact's value is the mean over its prompts.

    Rows without a fact are aggregates: they are averaged with weight n and have no interval.

    Args:
        rows: rows of one quantity; missing values are left out and counted in the note.
        center: how facts are combined.
        place: where the rows were read, to be told with the value.
    """
    present = [row for row in rows if row.value is not None]
    note = _absence(rows)
    if not present:
        return Estimate(None, note=note or "not measured", place=place)
    if all(row.fact_id is None for row in present):
        value, n = _aggregate(present)
        return Estimate(value, n=n, note=note, place=place)
    found = facts_of(present).values()
    values = np.array([value for value, _ in found])
    relations = tuple(relation for _, relation in found)
    low, high = interval(values, relations, center, _kind(rows), len(present))
    return Estimate(_center(values, center), low, high, len(values), note, place)


def _kind(rows: Sequence[Row]) -> Kind:
    """What the values are: hits by their metric, or because they are 0 here and 1 there."""
    values = {row.value for row in rows if row.value is not None}
    return "share" if rows[0].metric in SHARES or values == {0.0, 1.0} else "number"


def facts_of(rows: Sequence[Row]) -> dict[str, tuple[float, str | None]]:
    """By fact, the mean of its values, and its relation; rows without either are left out."""
    values: dict[str, list[float]] = {}
    relations: dict[str, str | None] = {}
    for row in rows:
        if row.fact_id is not None and row.value is not None:
            values.setdefault(row.fact_id, []).append(row.value)
            relations[row.fact_id] = row.relation
    return {fact: (float(np.mean(values[fact])), relations[fact]) for fact in sorted(values)}


def _aggregate(rows: Sequence[Row]) -> tuple[float, int]:
    """The rows' mean with weight n, and the sum of the weights."""
    weights = [max(row.n, 1) for row in rows]
    values = [row.value for row in rows if row.value is not None]
    return float(np.average(values, weights=weights)), sum(weights)


def _absence(rows: Sequence[Row]) -> str | None:
    """Why values are missing: the rows' notes, and for how many facts if only for some."""
    missing = [row for row in rows if row.value is None]
    if not missing:
        return None
    causes = "; ".join(sorted({row.note or "no cause given" for row in missing}))
    if len(missing) == len(rows):
        return causes
    return f"{len(missing)} of {len(rows)} values missing: {causes}"


def _center(values: Floats, center: Center) -> float:
    return float(np.mean(values) if center == "mean" else np.median(values))


def rows_of(
    metric: str, protocol: str, prompt: str = "", **equal: str | int | None
) -> Callable[[Run], list[Row]]:
    """Select a metric's rows from prompts whose id starts with `prompt`.

    Without a `step` among the columns that are to be equal: those after the last edit.
    """

    def select(run: Run) -> list[Row]:
        found = run.select(metric, protocol, budget=None, **equal)
        return [row for row in last_step(found) if (row.prompt_id or "").startswith(prompt)]

    return select


def last_step(rows: Sequence[Row]) -> list[Row]:
    """The rows that describe the run's end: those without a step, else those of the last one."""
    steps = {row.step for row in rows}
    last = None if None in steps else max((s for s in steps if s is not None), default=None)
    return [row for row in rows if row.step == last]


def probe_rows(run: Run, protocol: str, position: str = "last_prompt") -> list[Row]:
    """A probe's rows on the facts that every method changes, at all layers."""
    return rows_of("probe_accuracy", protocol, split="target", position=position)(run)


def probe(run: Run, protocol: str) -> Estimate:
    """Accuracy of probes of a protocol at the deepest measured layer."""
    layer = _deepest(_probes(run))
    rows = [row for row in probe_rows(run, protocol) if row.layer == layer]
    return estimate(rows, place=_at(layer))


def rank(run: Run) -> Estimate:
    """Median rank of the old object under the logit lens at the deepest measured layer."""
    rows = rows_of("lens_rank_old", "logit_lens", position="last_prompt")(run)
    layer = _deepest(rows)
    return estimate([row for row in rows if row.layer == layer], "median", _at(layer))


def _probes(run: Run) -> list[Row]:
    names = ("frozen", "shadow", "retrained")
    return [row for name in names for row in probe_rows(run, name)]


def _deepest(rows: Sequence[Row]) -> int | None:
    return max((row.layer for row in rows if row.layer is not None), default=None)


def _at(layer: int | None) -> str | None:
    return None if layer is None else f"layer {layer}"


def headline(run: Run) -> dict[str, Estimate]:
    """The headline numbers of a run, by column key."""
    return {column.key: read(column, run) for column in HEADLINE}


def read(column: Column, run: Run) -> Estimate:
    """One of them."""
    if column.rows:
        return estimate(asked(column, run))
    slow: dict[Any, Callable[..., Estimate]] = {
        index.recoverable: recoverable, index.recoverable_after: recoverable_after,
        index.recoverable_beyond_name: beyond_name, removal: removed, old_rank: rank,
    }  # fmt: skip
    if isinstance(column.read, partial):
        inner: dict[Any, Callable[..., Estimate]] = {probe_of: probe, recoverable_in: in_zone}
        return inner[column.read.func](run, **column.read.keywords)
    return slow[column.read](run)


def asked(column: Column, run: Run) -> list[Row]:
    """The rows of a mean."""
    q = column.rows
    equal = {"split": q.split} if q.split else {}
    return rows_of(q.metric, q.protocol, q.prompt, **equal)(run)


@dataclass(frozen=True)
class Reading:
    """What one attack finds.

    Attributes:
        success: by fact, in [0, 1].
        baseline: the mean of the same attack on objects that have nothing to do with the fact; for
            probes the share of the most common object.
    """

    success: Mapping[str, float]
    baseline: float

    def of(self, facts: Sequence[str]) -> tuple[list[float], float]:
        """The success on some facts, and chance; what chance always finds tells nothing."""
        if self.baseline >= 1:
            return [0.0] * len(facts), 0.0
        return [self.success[fact] for fact in facts], self.baseline


def recoverable(run: Run) -> Estimate:
    """The index of the whole model, or the causes for which families of attacks are lacking."""
    return _whole(run, successes(run))


def recoverable_after(run: Run) -> Estimate:
    """The same at or after the change only; of an unchanged model everywhere."""
    return _whole(run, _reached(run))


def _whole(run: Run, rows: Sequence[Row]) -> Estimate:
    tried = attacks(run, rows)
    lacking = [f for f in FAMILIES if not any(_family(place) == f for place in tried)]
    if lacking:
        return Estimate(None, note="; ".join(f"{name}: {_why(run, name)}" for name in lacking))
    return _index(run, rows)


def _why(run: Run, family: str) -> str:
    """The causes of the first protocol of a family that has any."""
    causes: dict[str, set[str]] = defaultdict(set)
    for row in run.rows:
        if _is_success(row) and row.value is None and row.note and _family(_place(row)) == family:
            causes[row.protocol].add(row.note)
    return "; ".join(sorted(causes[min(causes)])) if causes else "not measured"


def in_zone(run: Run, zone: str) -> Estimate:
    """The index of a zone's places."""
    return profile(run).get(zone, Estimate(None, note="nothing was measured there"))


def beyond_name(run: Run) -> Estimate:
    """The index as a share of what the names leave open."""
    found = recoverable(run)
    named = run.select("probe_accuracy", "embedding", split="target")
    if found.value is None or not named:
        return Estimate(None, note=found.note or "no probe of the names was measured")
    raise NotImplementedError


def removed(run: Run) -> Estimate:
    """Harmonic mean of 1 − the index and accuracy elsewhere."""
    found = recoverable(run)
    kept = estimate(rows_of("other_accuracy", "vocabulary")(run))
    if found.value is None or kept.value is None:
        cause = found.note if found.value is None else f"other accuracy: {kept.note}"
        return Estimate(None, note=cause)
    ends = (found.value, kept.value), (found.high, kept.low), (found.low, kept.high)
    value, low, high = (
        None if None in pair else harmonic_mean([1 - pair[0], pair[1]]) for pair in ends
    )
    return Estimate(value, low, high, found.n, found.note, found.place)


def recoverable_beyond(run: Run, other: Run) -> Estimate:
    """By how much the index of one run exceeds another's, like for like and fact by fact."""
    for each in (run, other):
        if recoverable(each).value is None:
            return Estimate(None, note=recoverable(each).note)
    rows = [successes(each) for each in (run, other)]
    shared = set.intersection(*({_place(row)[1:] for row in some} for some in rows))
    alike = [[row for row in some if _place(row)[1:] in shared] for some in rows]
    facts = []
    for each, some in zip((run, other), alike, strict=True):
        common = _common(attacks(each, some), some)
        if isinstance(common, Estimate):
            return common
        facts.append(common)
    both = sorted({*facts[0]} & {*facts[1]})
    told = {row.fact_id for some in alike for row in some if row.value is not None}
    lacking = len(told) - len(both)
    if len(both) < LEAST:
        return Estimate(None, note=f"fewer than {LEAST} facts have a value on both sides")
    sides = [_told(attacks(r, s), s, both) for r, s in zip((run, other), alike, strict=True)]
    (one, owners, place, width), (two, _, against, other_width) = sides
    value = float(max(0.0, one.mean()) - max(0.0, two.mean()))
    wide = max(width, other_width)
    found = (one - two) / wide
    low, high = _wider(found.mean(), *interval(found, owners, kind="difference"))
    low, high = max(-1.0, min(low * wide, value)), max(min(1.0, high * wide), value)
    return Estimate(value, low, high, len(both), left_out(lacking), f"{place}, against {against}")


def profile(run: Run) -> dict[str, Estimate]:
    """The same index of the places of each zone by themselves, by its name in `ZONES`.

    Zones without places are left out; of an unchanged model there are none.
    """
    rows = successes(run)
    reached = [row.layer for row in rows if row.layer is not None and not row.upstream]
    if not reached:
        return {}
    zones: dict[str, list[Row]] = {zone: [] for zone in ZONES}
    for row in rows:
        zones[_zone(row, min(reached))].append(row)
    return {zone: _index(run, some) for zone, some in zones.items() if some}


def _zone(row: Row, site: int) -> str:
    if row.layer is None:
        return ZONES[3]
    if row.upstream:
        return ZONES[0]
    return ZONES[1] if row.layer == site else ZONES[2]


def _reached(run: Run) -> list[Row]:
    """Successes at or after the change; if it is at none of the measured states, all."""
    rows = successes(run)
    reached = [row for row in rows if not row.upstream]
    return reached if any(row.layer is not None for row in reached) else rows


def _index(run: Run, rows: Sequence[Row]) -> Estimate:
    """What the strongest attack finds of facts that did not choose it."""
    tried = attacks(run, rows)
    facts = _common(tried, rows)
    if isinstance(facts, Estimate):
        return facts
    values, owners, place, width = _told(tried, rows, facts)
    shares = (values - 1) / width + 1
    low, high = _wider(shares.mean(), *interval(shares, owners, kind="share"))
    found = (values.mean(), (low - 1) * width + 1, min(1.0, (high - 1) * width + 1))
    value, low, high = (max(0.0, float(x)) for x in found)
    counts = {f: sum(_family(place) == f for place in tried) for f in FAMILIES}
    counted = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    dropped = len({row.fact_id for row in rows if row.value is not None}) - len(facts)
    note = f"facts without a value at some place are left out: {dropped}" if dropped else None
    return Estimate(value, low, high, len(facts), note, f"{place} (of {counted})")


def _wider(mean: float, low: float, high: float) -> tuple[float, float]:
    """As of one and a half times less facts."""
    return mean - (mean - low) * 1.5**0.5, mean + (high - mean) * 1.5**0.5


def _common(tried: Mapping[Place, Reading], rows: Sequence[Row]) -> list[str] | Estimate:
    """The facts that all places have; or why there are too few."""
    if not tried:
        return Estimate(None, note="no attacks were measured")
    facts = sorted(set.intersection(*(set(each.success) for each in tried.values())))
    if len(facts) < LEAST:
        return Estimate(None, n=len(facts), note=f"fewer than {LEAST} facts with a value")
    return facts


def _told(
    tried: Mapping[Place, Reading], rows: Sequence[Row], facts: Sequence[str]
) -> tuple[Floats, tuple[str | None, ...], str, float]:
    """By fact what the place finds that is surest beyond chance on the other folds."""
    relations = {str(row.fact_id): row.relation for row in rows}
    owners = tuple(relations[fact] for fact in facts)
    generator, chosen, width = np.random.default_rng(_SEED), [], 1.0
    values = dict.fromkeys(facts, 0.0)
    for _ in range(REPEATS):
        shuffled = [facts[n] for n in generator.permutation(len(facts))]
        ranked = sorted(shuffled, key=lambda fact: relations[fact] or "")
        fold = {fact: n % FOLDS for n, fact in enumerate(ranked)}
        for fact in facts:
            best = _surest(tried, [other for other in facts if fold[other] != fold[fact]])
            (hit,), chance = tried[best].of([fact])
            values[fact] += (hit - chance) / (1 - chance) / REPEATS
            width = max(width, 1 / (1 - chance))
            chosen.append(best)
    order = list(tried)
    place = max(order, key=lambda place: (chosen.count(place), -order.index(place)))
    return np.array(list(values.values())), owners, _named(place), width


def _surest(tried: Mapping[Place, Reading], facts: Sequence[str]) -> Place:
    """The place that is furthest beyond chance at the lower end of its success."""
    best, most = None, -math.inf
    for place, reading in tried.items():
        success, chance = reading.of(facts)
        share, n = fmean(success), len(facts)  # Wilson: where (p − share)² is p (1 − p) / n
        low = min(np.roots([1 + 1 / n, -(2 * share + 1 / n), share**2]).real)
        if (low - chance) / (1 - chance) > most + 1e-12:
            best, most = place, (low - chance) / (1 - chance)
    assert best is not None
    return best


def _family(place: Place) -> str:
    protocol, layer, _ = place
    if protocol in PROBES:
        return FAMILIES[1] if protocol == "shadow" else FAMILIES[0]
    return FAMILIES[2] if layer >= 0 else FAMILIES[3]


def attacks(run: Run, rows: Sequence[Row]) -> dict[Place, Reading]:
    """Everything that was tried: what some rows tell of its success, and its baseline."""
    hits: dict[Place, dict[str, float]] = defaultdict(dict)
    chances: dict[Place, list[float]] = defaultdict(list)
    for row in rows:
        if row.value is not None:
            hits[_place(row)][str(row.fact_id)] = row.value
    for row in run.rows:
        if row.metric == "attack_baseline" and row.budget == BUDGET and row.value is not None:
            chances[_place(row)].append(row.value)
    guess = [row.value for row in run.select("probe_baseline", "majority")]
    for place in hits:
        if place[0] in PROBES:
            chances[place] = [value for value in guess if value is not None]
    every = {fact for found in hits.values() for fact in found}
    return {
        place: Reading(found, fmean(chances[place]))
        for place, found in hits.items()
        if chances[place] and 2 * len(found) >= len(every)
    }


def successes(run: Run) -> list[Row]:
    """Rows of attacks at the budget, and of probes, on target facts; of states that are read."""
    rows = [row for row in run.rows if row.split == "target" and _is_success(row)]
    last = max((row.layer for row in rows if row.layer is not None), default=None)
    return [r for r in rows if r.layer is None or (r.layer, r.position) != (last, "last_subject")]


def _is_success(row: Row) -> bool:
    if row.metric == "attack_success":
        return row.budget == BUDGET
    return row.metric == "probe_accuracy" and row.protocol in PROBES


def _place(row: Row) -> Place:
    return row.protocol, -1 if row.layer is None else row.layer, row.position or ""


def _named(place: Place) -> str:
    protocol, layer, position = place
    return protocol if layer < 0 else f"{protocol}, layer {layer}, {position}"


_QuantityKey = tuple[str, str, str, str]


def _quantities(run: Run) -> dict[_QuantityKey, list[Row]]:
    """A run's rows that are no curves, by what they measure; several layers stay apart."""
    rows = [r for r in run.rows if r.axis == "cost" or (r.layer is None and r.position is None)]
    layers: dict[str, set[int | None]] = {}
    for row in rows:
        layers.setdefault(row.metric, set()).add(row.layer)
    found: dict[_QuantityKey, list[Row]] = {}
    for row in rows:
        found.setdefault(_quantity(row, len(layers[row.metric]) > 1), []).append(row)
    return {key: last_step(group) for key, group in found.items()}


def _quantity(row: Row, by_layer: bool) -> _QuantityKey:
    kind = (row.prompt_id or "").partition("/")[0]
    parts = [
        row.split,
        "fit prompt, in-sample" if kind == "fit" else kind,
        f"layer {row.layer}" if by_layer and row.layer is not None else None,
        f"budget {row.budget}" if row.budget is not None else None,
    ]
    return (row.axis, row.metric, row.protocol, ", ".join(part for part in parts if part))


def details(run: Run) -> dict[tuple[str, str, str, str], Estimate]:
    """Every quantity that is no curve."""
    return {key: estimate(rows) for key, rows in _quantities(run).items()}


def contrast(column: Column, run: Run, reference: Run) -> Estimate:
    """A run's number less another's, over the prompts and facts that have a value on both sides.

    Intervals are of the facts' differences. Numbers that are no single fact's have none.
    """
    if column.read is index.recoverable:
        return recoverable_beyond(run, reference)
    sides = [
        {_asked_by(row): row for row in asked(column, each) if row.value is not None}
        for each in (run, reference)
    ]
    if not all(sides):
        return Estimate(None, note="one of the two has no value")
    if any(row.fact_id is None for side in sides for row in side.values()):
        return _of_aggregates(*(read(column, each) for each in (run, reference)))
    shared = sides[0].keys() & sides[1].keys()
    left, right = (facts_of([side[key] for key in shared]) for side in sides)
    if not left:
        return Estimate(None, note="no fact has a value on both sides")
    each = np.array([left[fact][0] - right[fact][0] for fact in left])
    kind: Kind = "difference" if column.rows.metric in SHARES else "number"
    low, high = interval(each, tuple(relation for _, relation in left.values()), kind=kind)
    facts = {row.fact_id for side in sides for row in side.values()}
    return Estimate(float(each.mean()), low, high, len(left), left_out(len(facts) - len(left)))


def _asked_by(row: Row) -> tuple[str | None, ...]:
    return row.fact_id, row.relation, row.prompt_id


def _of_aggregates(one: Estimate, other: Estimate) -> Estimate:
    """The difference of numbers over the same things; null where their counts tell otherwise."""
    if one.value is None or other.value is None or one.n != other.n:
        return Estimate(None, note=f"not over the same: n = {one.n:,} and {other.n:,}")
    return Estimate(one.value - other.value, n=one.n, note=one.note or other.note)


# -- along a sequence ------------------------------------------------------------------------------


def courses(runs: Sequence[Run]) -> dict[str, dict[int, dict[str, Estimate]]]:
    """By run, number of edits and measure; runs of `none` beside the run that shares the most."""
    edited = {run.run_id: (run, facts) for run in runs if (facts := _edited(run))}
    found = {
        run.run_id: {step: _stage(run, step, some, facts) for step, some in sorted(facts.items())}
        for run, facts in edited.values()
    }
    for unchanged in (run for run in runs if run.method == "none" and run.run_id not in edited):
        known = {row.fact_id for row in unchanged.select("efficacy", "probability")}
        same = [facts for run, facts in edited.values() if _model(run) == _model(unchanged)]
        if same:
            beside = max(same, key=lambda facts: sum(some <= known for some in facts.values()))
            kept = {step: some if some <= known else set() for step, some in beside.items()}
            found[unchanged.run_id] = {
                step: _stage(unchanged, None, some, kept) for step, some in kept.items()
            }
    return found


def _model(run: Run) -> Any:
    return (run.run.get("model") or {}).get("fingerprint")


def _edited(run: Run) -> dict[int, set[str]]:
    facts: dict[int, set[str]] = {}
    for row in run.select("efficacy", "probability"):
        if row.step is not None and row.fact_id is not None:
            facts.setdefault(row.step, set()).add(row.fact_id)
    return facts


def _stage(
    run: Run, at: int | None, edited: set[str], facts: Mapping[int, set[str]]
) -> dict[str, Estimate]:
    """The rows whose step is `at`, over the facts edited so far, or over the first of them."""
    first = {fact for k, some in facts.items() if k <= FIRST for fact in some} & edited
    return {m.key: _followed(run, m, at, first if m.first else edited) for m in MEASURES}


def _followed(run: Run, measure: Measure, at: int | None, facts: set[str]) -> Estimate:
    rows = rows_of(*measure.rows, measure.prompt, step=at)(run)
    if at is None and measure.metric == "score":
        rows = []
    return estimate([row for row in rows if row.fact_id is None or row.fact_id in facts])


# -- traces against edits and erasures -------------------------------------------------------------


def chances(run: Run, metric: str) -> dict[tuple[str, str | None, str], float]:
    """Probabilities by fact, relation and prompt, after the last edit, on unseen prompts."""
    return {
        (str(row.fact_id), row.relation, str(row.prompt_id)): row.value
        for row in run.select(metric, "string", step=None)
        if row.value is not None and row.prompt_id != "fit"
    }


def success(run: Run, unchanged: Run, objective: str) -> dict[tuple[str, str | None], float]:
    """How well an edit worked by fact and relation."""
    metric = "new_probability" if objective == "inject" else "old_probability"
    before = chances(unchanged, metric)
    reached: dict[tuple[str, str | None], list[float]] = {}
    for (fact, relation, prompt), p in chances(run, metric).items():
        p0 = before.get((fact, relation, prompt))
        if p0 is not None:
            removed = max(0.0, (p0 - p) / p0) if p0 > 0 else 1.0
            wrote = (p - p0) / (1 - p0) if p0 < 1 else 1.0
            share = removed if objective in ("erase", "trace_reversal") else wrote
            reached.setdefault((fact, relation), []).append(share)
    return {key: fmean(values) for key, values in reached.items()}


def restored_shares(
    traced: Sequence[Run], protocol: str
) -> tuple[dict[tuple[str, int], float], set[str]]:
    """The share of the total effect that restoring a state brings back, and facts left out."""
    shares: dict[tuple[str, int], float] = {}
    left_out: set[str] = set()
    for run in traced:
        totals = {
            row.fact_id: row.value for row in run.select("total_effect", protocol.partition("/")[0])
        }
        for row in run.select("indirect_effect", protocol, position="last_subject"):
            total = totals.get(row.fact_id)
            if row.value is None or total is None or row.layer is None:
                continue
            if total < LEAST_EFFECT:
                left_out.add(str(row.fact_id))
            else:
                shares[str(row.fact_id), row.layer] = row.value / total
    return shares, left_out


def effects(traced: Sequence[Run], protocol: str, position: str) -> dict[int, dict[str, float]]:
    """Indirect effects by layer and fact; a fact's tokens of one group averaged."""
    found: dict[int, dict[str, list[float]]] = {}
    for run in traced:
        for row in run.select("indirect_effect", protocol, position=position):
            if row.value is not None and row.layer is not None:
                found.setdefault(row.layer, {}).setdefault(str(row.fact_id), []).append(row.value)
    return {
        layer: {fact: float(np.mean(values)) for fact, values in facts.items()}
        for layer, facts in found.items()
    }


def brought(run: Run, unchanged: Run, outcome: str) -> dict[str, float]:
    """Unchanged less erased, by fact."""
    before, after = (
        {str(r.fact_id): r.value for r in _outcome(each, outcome) if r.value is not None}
        for each in (unchanged, run)
    )
    return {fact: before[fact] - value for fact, value in after.items() if fact in before}


def _outcome(run: Run, outcome: str) -> list[Row]:
    if outcome == "answers removed":
        return run.select("relation_accuracy", "vocabulary")
    if outcome == "cost elsewhere":
        return run.select("other_accuracy", "vocabulary")
    rows = run.select("probe_accuracy", "retrained", split="test", position="last_prompt")
    return [row for row in rows if row.layer == _deepest(rows)]
