"""The headline index: how much of the old object the strongest of many attacks still finds.

The strongest is chosen on other facts than those of which it is told (cross-fitting), so that
being the best of many gains nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from palimpsest.record.results import Results, sql_text
from palimpsest.record.row import IN_SAMPLE, UPSTREAM
from palimpsest.study.comparable import compared
from palimpsest.study.intervals import Ends, Estimate, Floats, Relations, interval

LEAST = 6
"""Facts, below which a best place says nothing."""

FOLDS = 3
"""Of the facts; the place that is told of one fold is chosen on the others."""

REPEATS = 10
"""How often the facts are dealt to folds anew."""

_WIDER = 1.5**0.5
"""How much wider an interval is for the choice of the place (docs/statistics.md)."""

_SEED = 20_230_103

BUDGET = 20
"""Candidates that an attacker may name."""

FROZEN = ("frozen", "frozen_mlp")
SHADOW = ("shadow",)
PROBES = (*FROZEN, *SHADOW)
"""Protocols of probes that face every method alike: trained on as many subjects for each.

Probes retrained on all probe subjects are not among them: independent edits cannot have them.
"""

FAMILIES = ("frozen probes", "shadow probes", "lenses", "prompts")
"""Families of attacks; the index of a whole model has all of them, or none is told."""


class Place(NamedTuple):
    """What was tried where.

    Attributes:
        protocol: the attack's or probe's.
        layer: of the state; None for a prompt.
        position: of the state; empty for a prompt.
    """

    protocol: str
    layer: int | None
    position: str

    @property
    def family(self) -> str:
        """One of `FAMILIES`."""
        if self.protocol in PROBES:
            return FAMILIES[0] if self.protocol in FROZEN else FAMILIES[1]
        return FAMILIES[2] if self.layer is not None else FAMILIES[3]

    def __str__(self) -> str:
        """In words."""
        if self.layer is None or self.layer < 0:
            return self.protocol
        return f"{self.protocol}, layer {self.layer}, {self.position}"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one attack finds of one run's target facts.

    Attributes:
        place: the attack, and where it reads.
        facts: those with a value, sorted; none where no value could be had.
        relations: `[facts]` their relations.
        success: `[facts]` in [0, 1].
        baseline: the mean of the same attack on objects that have nothing to do with the fact; for
            probes the share of the most common object; None if it was not measured.
        upstream: whether the change cannot reach it.
        alike: whether it was configured as in most runs.
    """

    place: Place
    facts: tuple[str, ...]
    relations: Relations
    success: Floats
    baseline: float | None
    upstream: bool
    alike: bool

    def of(self, facts: Sequence[str]) -> tuple[Floats, float]:
        """The success on some of the facts, `[facts]`, and what chance finds.

        What finds everything by chance tells nothing, and counts as what finds nothing.
        """
        chance = 0.0 if self.baseline is None else self.baseline
        if chance >= 1:
            return np.zeros(len(facts)), 0.0
        found = dict(zip(self.facts, self.success, strict=True))
        return np.array([found[fact] for fact in facts]), chance


@lru_cache(maxsize=2)
def recoverable(results: Results) -> dict[str, Estimate]:
    """By run what can be recovered from the whole changed model, chance-corrected, in [0, 1].

    All states count that a later block or the head reads, those before the change included.
    """
    return _by_run(results, lambda found: found)


def recoverable_after(results: Results) -> dict[str, Estimate]:
    """By run the same of prompts and of states at or after the change alone.

    Methods that change different layers are asked at different states. Of an unchanged model all
    states count.
    """
    return _by_run(results, _reached)


def recoverable_beyond_name(results: Results) -> dict[str, Estimate]:
    """By run the index as a share of what the subject's name alone leaves open, in [0, 1].

    (r − e) / (1 − e), where r is the index and e what a linear probe of the name's input embeddings
    finds of the same facts beyond the most common object. The interval is conditional on e.
    """
    names, guesses = _names(results), _guesses(results)
    made = {}
    for run_id, found in recoverable(results).items():
        if found.value is None or run_id not in names or run_id not in guesses:
            note = found.note or "no probe of the names was measured"
            made[run_id] = Estimate(None, note=note)
            continue
        chance = guesses[run_id]
        known = max(0.0, (names[run_id] - chance) / (1 - chance)) if chance < 1 else 0.0
        if known >= 1:
            made[run_id] = Estimate(None, note="the names alone tell every object")
            continue
        value, low, high = (
            None if x is None else max(0.0, (x - known) / (1 - known))
            for x in (found.value, found.low, found.high)
        )
        made[run_id] = replace(found, value=value, low=low, high=high)
    return made


def _names(results: Results) -> dict[str, float]:
    """By run the share of target facts that a probe of the name's input embeddings gets right."""
    compared(results)
    return dict(
        results.query(
            "SELECT run_id, favg(value) FROM compared WHERE metric = 'probe_accuracy' "
            "AND protocol = 'embedding' AND split = 'target' AND value IS NOT NULL GROUP BY ALL"
        )
    )


def fitted(results: Results) -> set[str]:
    """The runs whose method was fitted on the target facts: nothing is told of these."""
    compared(results)
    found = f"SELECT DISTINCT run_id FROM compared WHERE split = {sql_text(IN_SAMPLE)}"
    return {run_id for (run_id,) in results.query(found)}


def _by_run(
    results: Results, kept: Callable[[Sequence[Reading]], Sequence[Reading]]
) -> dict[str, Estimate]:
    found, causes, seen = readings(results), _causes(results), fitted(results)
    made = {}
    for run in results.runs:
        some = kept(found.get(run.run_id, ()))
        present = {reading.place.family for reading in _usable(some)}
        lacking = [name for name in FAMILIES if name not in present]
        if run.run_id in seen:
            made[run.run_id] = Estimate(None, note=FITTED)
        elif lacking:
            why = [f"{name}: {causes.get((run.run_id, name), 'not measured')}" for name in lacking]
            made[run.run_id] = Estimate(None, note="; ".join(why))
        else:
            made[run.run_id] = _index(some)
    return made


def _usable(found: Sequence[Reading]) -> list[Reading]:
    """Places with a chance to set them against, and values for half of the facts."""
    every = {fact for reading in found for fact in reading.facts}
    known = [reading for reading in found if reading.facts and reading.baseline is not None]
    return [reading for reading in known if 2 * len(reading.facts) >= len(every)]


def recoverable_beyond(results: Results, run_id: str, other: str) -> Estimate:
    """By how much the index of one run's whole model exceeds another's, fact by fact.

    Both sides are asked in words and at the layers and positions that were read on both, of the
    facts that have a value at all of them. The interval is over facts, each with its value on both
    sides.
    """
    found, whole = readings(results), recoverable(results)
    for name in (run_id, other):
        if whole[name].value is None:
            return Estimate(None, note=whole[name].note)
    sides = [found.get(name, ()) for name in (run_id, other)]
    if not all(reading.alike for side in sides for reading in side):
        return Estimate(None, note=UNLIKE)
    shared = set.intersection(*({reading.place[1:] for reading in side} for side in sides))
    alike = [[reading for reading in side if reading.place[1:] in shared] for side in sides]
    first, second = (Attacked.by(some) for some in alike)
    for each in (first, second):
        if isinstance(each, Estimate):
            return each
    assert isinstance(first, Attacked)
    assert isinstance(second, Attacked)
    facts = sorted({*first.facts} & {*second.facts})
    lacking = len({fact for side in alike for r in side for fact in r.facts}) - len(facts)
    if len(facts) < LEAST:
        return Estimate(None, note=f"fewer than {LEAST} facts have a value on both sides")
    one, two = (each.of(facts).told() for each in (first, second))
    value = max(0.0, one.values.mean()) - max(0.0, two.values.mean())
    width = max(one.width, two.width)
    differences = (one.values - two.values) / width
    ends = interval(differences, one.owners, kind="difference")
    low, high = _stretched(differences, ends, 0.0, width)
    if low is not None and high is not None:  # values below chance count as chance
        low, high = max(-1.0, min(low, value)), max(high, value)
    place = f"{one.place}, against {two.place}"
    return Estimate(float(value), low, high, len(facts), left_out(lacking), place)


def left_out(facts: int) -> str | None:
    """What to say of facts that cannot be compared; None if there are none."""
    return f"facts without a value on both sides are left out: {facts}" if facts else None


def profiles(results: Results) -> dict[str, dict[str, Estimate]]:
    """By run the same index of the places of each zone by themselves, by its name in `ZONES`.

    Zones without places are left out; of an unchanged model there are none.
    """
    return {run_id: _profile(some) for run_id, some in readings(results).items()}


def families(results: Results) -> dict[str, dict[str, Estimate]]:
    """By run the index of each family of attacks by itself, over the whole model."""
    return {
        run_id: {
            name: _index(part)
            for name in FAMILIES
            if (part := [reading for reading in some if reading.place.family == name])
        }
        for run_id, some in readings(results).items()
    }


def _profile(found: Sequence[Reading]) -> dict[str, Estimate]:
    states = [r.place.layer for r in found if r.place.layer is not None and not r.upstream]
    if not states:
        return {}
    zones: dict[str, list[Reading]] = {zone: [] for zone in ZONES}
    for reading in found:
        zones[_zone(reading, min(states))].append(reading)
    return {zone: _index(some) for zone, some in zones.items() if some}


ZONES = ("upstream, unchanged by construction", "at the site", "downstream", "prompts")
"""Where the change cannot reach; the first measured layer that it reaches; above; in words."""


def _zone(reading: Reading, site: int) -> str:
    if reading.place.layer is None:
        return ZONES[3]
    if reading.upstream:
        return ZONES[0]
    return ZONES[1] if reading.place.layer == site else ZONES[2]


UNLIKE = "measured differently from most runs here: not comparable"
"""What is said in place of a comparison of values that are not comparable."""

FITTED = "the method was fitted on these facts: choose intervene.fit_on=fit"
"""Why nothing is told of facts that a relation-wide method has seen."""


@dataclass(frozen=True)
class Told:
    """What the strongest attack finds of each fact, chosen on other facts.

    Attributes:
        values: `[facts]` chance-corrected: (s − b) / (1 − b), from 1 − `width` to 1.
        owners: `[facts]` relations.
        place: the place that most facts were told by.
        width: of the range of values: 1 / (1 − b) of the place with the largest b.
    """

    values: Floats
    owners: Relations
    place: Place
    width: float

    @property
    def ends(self) -> Ends:
        """The interval of the mean: that of a share, stretched to the range of the values."""
        shares = 1 - (1 - self.values) / self.width
        return _stretched(
            shares, interval(shares, self.owners, kind="share"), 1 - self.width, self.width
        )


def _stretched(shares: Floats, ends: Ends, least: float, width: float) -> Ends:
    """An interval of shares, wider for the choice of the place, on the scale of the values."""
    low, high = ends
    if low is None or high is None:
        return None, None
    mean = float(shares.mean())
    low, high = mean - (mean - low) * _WIDER, mean + (high - mean) * _WIDER
    return least + low * width, min(1.0, least + high * width)


@dataclass(frozen=True)
class Attacked:
    """The same facts at many places.

    Attributes:
        places: attacks.
        facts: those with a value at every place, sorted.
        owners: `[facts]` their relations.
        success: `[places, facts]` in [0, 1].
        baselines: `[places]` what each finds by chance.
        dropped: facts that lack a value at some place, and are left out.
        alike: whether all was configured as in most runs.
    """

    places: tuple[Place, ...]
    facts: tuple[str, ...]
    owners: Relations
    success: Floats
    baselines: Floats
    dropped: int
    alike: bool

    @classmethod
    def by(cls, found: Sequence[Reading]) -> "Attacked | Estimate":
        """The facts that all places have in common; or no value, and why.

        A place counts if it has a value for half of the facts. A fact that it then lacks is left
        out everywhere, so that all places are judged by the same facts.
        """
        every = {fact for reading in found for fact in reading.facts}
        usable = _usable(found)
        if not usable:
            return Estimate(None, note="no attacks were measured")
        facts = tuple(sorted(set.intersection(*(set(reading.facts) for reading in usable))))
        if len(facts) < LEAST:
            return Estimate(None, n=len(facts), note=f"fewer than {LEAST} facts with a value")
        relations = dict(zip(usable[0].facts, usable[0].relations, strict=True))
        success, chances = zip(*(reading.of(facts) for reading in usable), strict=True)
        return cls(
            tuple(reading.place for reading in usable),
            facts,
            tuple(relations[fact] for fact in facts),
            np.array(success),
            np.array(chances),
            len(every) - len(facts),
            all(reading.alike for reading in usable),
        )

    def of(self, facts: Sequence[str]) -> "Attacked":
        """The same of some of the facts."""
        kept = [self.facts.index(fact) for fact in facts]
        owners = tuple(self.owners[place] for place in kept)
        return replace(self, facts=tuple(facts), owners=owners, success=self.success[:, kept])

    def told(self) -> Told:
        """What the strongest place finds of each fact, chosen on others; the mean of all deals."""
        chosen = cross_fitted(self.success, self.baselines, self.owners)
        chance = self.baselines[chosen]
        success = self.success[chosen, np.arange(len(self.facts))]
        place = self.places[np.bincount(chosen.ravel()).argmax()]
        values = ((success - chance) / (1 - chance)).mean(0)
        return Told(values, self.owners, place, float(1 / (1 - chance.max())))

    @property
    def counted(self) -> str:
        """How many places of each family were tried."""
        names = [place.family for place in self.places]
        return ", ".join(f"{n} {name}" for name in FAMILIES if (n := names.count(name)))


def cross_fitted(success: Floats, baselines: Floats, owners: Relations) -> Any:
    """By deal and fact the number of the place that is strongest on the facts of the other folds.

    The strongest is the one whose success is furthest beyond chance, (s − b) / (1 − b), at the
    lower end s of its Wilson interval one standard error wide: of two attacks that find all of few
    facts, the one that finds little by chance is surer. Of equal places the first is taken.

    Args:
        success: `[places, facts]` in [0, 1].
        baselines: `[places]` below 1.
        owners: `[facts]` relations; each is spread over the folds.

    Returns:
        int `[deals, facts]`.
    """
    generator = np.random.default_rng(_SEED)
    chosen = np.empty((REPEATS, len(owners)), dtype=int)
    for deal in chosen:
        fold = _dealt(owners, generator)
        for n in range(FOLDS):
            others = success[:, fold != n]
            surely = _wilson_low(others.mean(1), others.shape[1])
            deal[fold == n] = ((surely - baselines) / (1 - baselines)).argmax()
    return chosen


def _dealt(owners: Relations, generator: np.random.Generator) -> Any:
    """A fold for each fact, in turn within each relation, in a random order."""
    order = generator.permutation(len(owners)).tolist()
    order.sort(key=lambda n: owners[n] or "")
    fold = np.empty(len(owners), dtype=int)
    fold[order] = np.arange(len(owners)) % FOLDS
    return fold


def _wilson_low(share: Floats, n: int) -> Floats:
    """Lower ends of Wilson intervals of shares of n, one standard error wide (z = 1)."""
    low: Floats = (share + 0.5 / n - np.sqrt(share * (1 - share) / n + 0.25 / n**2)) / (1 + 1 / n)
    return low


def _reached(found: Sequence[Reading]) -> Sequence[Reading]:
    """Places at or after the change; if it is at none of the measured states, all."""
    reached = [reading for reading in found if not reading.upstream]
    return reached if any(reading.place.layer is not None for reading in reached) else found


def _index(found: Sequence[Reading]) -> Estimate:
    """What the strongest attack finds of facts that did not choose it, at least 0."""
    attacked = Attacked.by(found)
    if isinstance(attacked, Estimate):
        return attacked
    told = attacked.told()
    value, low, high = (
        None if x is None else max(0.0, float(x)) for x in (told.values.mean(), *told.ends)
    )
    notes = [] if attacked.alike else [UNLIKE]
    if attacked.dropped:
        notes.append(f"facts without a value at some place are left out: {attacked.dropped}")
    place = f"{told.place} (of {attacked.counted})"
    return Estimate(value, low, high, len(told.values), "; ".join(notes) or None, place)


@lru_cache(maxsize=2)
def readings(results: Results) -> dict[str, tuple[Reading, ...]]:
    """By run everything that was tried on its target facts: attacks at the budget, and probes."""
    compared(results)
    chances, guesses = _chances(results), _guesses(results)
    found: dict[str, list[Reading]] = {}
    for run_id, protocol, layer, position, upstream, alike, facts, owners, success in results.query(
        _SUCCESSES
    ):
        place = Place(protocol, layer, position)
        chance = guesses.get(run_id) if protocol in PROBES else chances.get((run_id, place))
        reading = Reading(
            place,
            tuple(facts or ()),
            tuple(owners or ()),
            np.array(success or [], dtype=np.float64),
            chance,
            upstream,
            alike,
        )
        found.setdefault(run_id, []).append(reading)
    return {run_id: tuple(some) for run_id, some in found.items()}


_PLACE = "run_id, protocol, layer, coalesce(position, '') AS position"
_VALUED = "FILTER (value IS NOT NULL)"
_SUCCESSES = f"""WITH found AS (
    SELECT {_PLACE}, metric, fact_id, last(relation ORDER BY prompt_id, step) AS relation,
        last(value ORDER BY prompt_id NULLS FIRST, step NULLS FIRST) {_VALUED} AS value,
        first(prompt_id ORDER BY prompt_id NULLS FIRST) {_VALUED} AS prompt,
        contains(coalesce(note, ''), {sql_text(UPSTREAM)}) AS upstream, bool_and(alike) AS alike
    FROM compared
    WHERE split = 'target' AND fact_id IS NOT NULL AND (
        (metric = 'attack_success' AND budget = {BUDGET})
        OR (metric = 'probe_accuracy' AND protocol IN {PROBES!r})
    )
    GROUP BY ALL
), deepest AS (SELECT run_id, max(layer) AS last FROM found GROUP BY run_id)
SELECT run_id, protocol, layer, position, upstream, bool_and(alike),
    list(fact_id ORDER BY fact_id) {_VALUED}, list(relation ORDER BY fact_id) {_VALUED},
    list(value ORDER BY fact_id) {_VALUED}
FROM found JOIN deepest USING (run_id)
WHERE layer IS DISTINCT FROM last OR position <> 'last_subject'
GROUP BY run_id, protocol, layer, position, metric, upstream
ORDER BY run_id, metric, protocol, min(fact_id) {_VALUED},
    first(prompt ORDER BY fact_id) {_VALUED} NULLS FIRST, layer NULLS FIRST, position"""
"""A record for each place, in the order of the rows; those that the change reaches apart.

Nothing reads the last block's output at the subject: it is left out.
"""


def _chances(results: Results) -> dict[tuple[str, Place], float]:
    """What each attack finds of objects that have nothing to do with the fact."""
    records = results.query(
        f"SELECT {_PLACE}, favg(value) FROM compared WHERE metric = 'attack_baseline' "
        f"AND budget = {BUDGET} AND value IS NOT NULL GROUP BY ALL"
    )
    return {(run_id, Place(*place)): value for run_id, *place, value in records}


def _guesses(results: Results) -> dict[str, float]:
    """The share of the most common object."""
    return dict(
        results.query(
            "SELECT run_id, favg(value) FROM compared WHERE metric = 'probe_baseline' "
            "AND protocol = 'majority' AND value IS NOT NULL GROUP BY ALL"
        )
    )


def _causes(results: Results) -> dict[tuple[str, str], str]:
    """By run and family, why its attacks have no value."""
    compared(results)
    causes: dict[tuple[str, str], str] = {}
    for run_id, protocol, layer, why in results.query(_NULLS):
        causes.setdefault((run_id, Place(protocol, layer, "").family), why)
    for run_id, budgets in results.query(_OTHER_BUDGETS):
        for family in FAMILIES[2:]:
            causes[run_id, family] = f"no attack at B = {BUDGET}, only at {budgets}"
    return causes


_NULLS = f"""SELECT run_id, protocol, max(layer), string_agg(DISTINCT note, '; ' ORDER BY note)
FROM compared WHERE value IS NULL AND note IS NOT NULL AND (
    (metric = 'attack_success' AND budget = {BUDGET})
    OR (metric = 'probe_accuracy' AND protocol IN {PROBES!r})
) GROUP BY run_id, protocol ORDER BY ALL"""

_OTHER_BUDGETS = f"""SELECT run_id, string_agg(DISTINCT budget, ', ' ORDER BY budget)
FROM compared WHERE metric = 'attack_success' GROUP BY run_id
HAVING NOT bool_or(budget = {BUDGET})"""
