"""The headline index: how much of the old object the best of many attacks still finds.

A maximum over many places flatters the attacker: what it has over its own facts is corrected by how
much the best of so many places gains by being chosen, which the bootstrap tells.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from palimpsest.record.row import Row
from palimpsest.record.store import Run
from palimpsest.study.intervals import (
    Estimate,
    Floats,
    ends,
    interval,
    resampling,
    varies,
    weighted_mean,
)

LEAST = 6
"""Facts, below which a best place says nothing."""

BUDGET = 20
"""Candidates that an attack may name."""

PROBES = ("frozen", "retrained", "adaptive", "frozen_mlp", "retrained_mlp")

Place = tuple[str, int, str]
"""An attack's or probe's protocol, the layer (-1 for a prompt) and the position."""


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

    def corrected(self, facts: Sequence[str]) -> list[float]:
        """(s − b) / (1 − b) of some facts: 0 is what finds nothing, 1 what always finds."""
        if self.baseline >= 1:
            return [0.0] * len(facts)
        return [(self.success[fact] - self.baseline) / (1 - self.baseline) for fact in facts]


def recoverable(run: Run) -> Estimate:
    """The index in [0, 1], chance-corrected, with an interval over facts.

    States count at or after the change only; of an unchanged model all do.
    """
    return _index(_strongest(run, _reached(run)))


def recoverable_beyond(run: Run, other: Run) -> Estimate:
    """By how much the index of one run exceeds another's, like for like and fact by fact.

    Both sides are asked in words and at the layers and positions that count for both, and of the
    facts that have a value on both. Either is what the strongest attack finds that is defined for
    it, less its optimism, and at least 0. The interval is over facts, each with its value on both
    sides.
    """
    rows = [_reached(each) for each in (run, other)]
    shared = set.intersection(*({_place(row)[1:] for row in some} for some in rows))
    alike = [[row for row in some if _place(row)[1:] in shared] for some in rows]
    first, second = (_strongest(each, some) for each, some in zip((run, other), alike, strict=True))
    for side in (first, second):
        if isinstance(side, Estimate):
            return side
    assert isinstance(first, Best)
    assert isinstance(second, Best)
    common = {*first.facts} & {*second.facts}
    lacking = len({*first.facts} | {*second.facts}) - len(common)
    if not lacking:
        return _beyond(first, second)
    kept = [[row for row in some if row.fact_id in common] for some in alike]
    first, second = (_strongest(each, some) for each, some in zip((run, other), kept, strict=True))
    if isinstance(first, Estimate) or isinstance(second, Estimate):
        return Estimate(None, note=f"fewer than {LEAST} facts have a value on both sides")
    return replace(_beyond(first, second), note=left_out(lacking))


def left_out(facts: int) -> str | None:
    """What to say of facts that cannot be compared; None if there are none."""
    return f"facts with a value on one side only are left out: {facts}" if facts else None


def _beyond(first: "Best", second: "Best") -> Estimate:
    """The difference of two indices over the same facts."""
    place = f"{first.place}, against {second.place}"
    value = first.index(first.values.mean()) - second.index(second.values.mean())
    low = high = None
    if varies(first.owners):
        weights = resampling(first.owners)
        one, two = (each.index(weighted_mean(each.values, weights)) for each in (first, second))
        low, high = ends(one - two)
    return Estimate(float(value), low, high, len(first.facts), place=place)


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
    return {zone: _index(_strongest(run, some)) for zone, some in zones.items() if some}


ZONES = ("upstream, unchanged by construction", "at the site", "downstream", "prompts")
"""Where the change cannot reach; the first measured layer that it reaches; above; in words."""


def _zone(row: Row, site: int) -> str:
    if row.layer is None:
        return ZONES[3]
    if row.upstream:
        return ZONES[0]
    return ZONES[1] if row.layer == site else ZONES[2]


@dataclass(frozen=True)
class Best:
    """The strongest of many attacks.

    Attributes:
        place: its name.
        facts: which it was tried on, sorted.
        owners: their relations.
        values: `[facts]` what it finds, chance-corrected.
        optimism: what its mean gains by being the best of so many.
    """

    place: str
    facts: tuple[str, ...]
    owners: tuple[str | None, ...]
    values: Floats
    optimism: float

    def index(self, found: Any) -> Any:
        """The index where the attack finds so much on average: less its optimism, at least 0."""
        return np.maximum(0.0, found - self.optimism)


def _reached(run: Run) -> list[Row]:
    """Successes at or after the change; if it is at none of the measured states, all."""
    rows = successes(run)
    reached = [row for row in rows if not row.upstream]
    return reached if any(row.layer is not None for row in reached) else rows


def _index(best: Best | Estimate) -> Estimate:
    """What the best of the attacks finds, less what a best of so many finds by chance."""
    if isinstance(best, Estimate):
        return best
    found = (best.values.mean(), *interval(best.values, best.owners))
    value, low, high = (None if x is None else float(best.index(x)) for x in found)
    return Estimate(value, low, high, len(best.facts), place=best.place)


def _strongest(run: Run, rows: Sequence[Row]) -> Best | Estimate:
    """The attack that finds most; or no value, and why."""
    readings = attacks(run, rows)
    if not readings:
        return Estimate(None, note="no attacks were measured")
    relations = {str(row.fact_id): row.relation for row in rows}
    facts = tuple(sorted(set.intersection(*(set(each.success) for each in readings.values()))))
    if len(facts) < LEAST:
        return Estimate(None, n=len(facts), note=f"fewer than {LEAST} facts with a value")
    owners = tuple(relations[fact] for fact in facts)
    places = list(readings)
    table = np.array([readings[place].corrected(facts) for place in places])
    best = int(table.mean(1).argmax())
    return Best(_named(places[best]), facts, owners, table[best], optimism(table, owners))


def optimism(table: Floats, relations: tuple[str | None, ...]) -> float:
    """By how much the best of several means flatters (Efron 1983, doi 10.2307/2288636).

    In a resample of the facts the best place is chosen; what it has there, less what the same place
    has over all facts, averaged over resamples.

    Args:
        table: `[places, facts]`.
        relations: `[facts]` each fact's relation.
    """
    table = table[np.argsort(-table.mean(1), kind="stable")]  # of equals, what is best over all
    alone = len(set(relations)) == len(relations)
    weights = resampling(("",) * len(relations) if alone else relations)
    means = weights @ table.T / weights.sum(1, keepdims=True)
    whole = table.mean(1)
    drawn = means[:, 0] - whole[0]  # so that one place alone has none, whatever was drawn
    return float((means.max(1) - whole[means.argmax(1)] - drawn).mean())


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
    most = max((len(found) for found in hits.values()), default=0)
    return {
        place: Reading(found, fmean(chances[place]))
        for place, found in hits.items()
        if chances[place] and len(found) == most
    }


def successes(run: Run) -> list[Row]:
    """Rows of attacks at the budget, and of probes, on target facts."""
    return [row for row in run.rows if row.split == "target" and _is_success(row)]


def _is_success(row: Row) -> bool:
    if row.metric == "attack_success":
        return row.budget == BUDGET
    return row.metric == "probe_accuracy" and row.protocol in PROBES


def _place(row: Row) -> Place:
    return row.protocol, -1 if row.layer is None else row.layer, row.position or ""


def _named(place: Place) -> str:
    protocol, layer, position = place
    return protocol if layer < 0 else f"{protocol}, layer {layer}, {position}"
