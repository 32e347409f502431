"""The headline index: how much of the old object the best of many attacks still finds.

A maximum over many places flatters the attacker: what it has over its own facts is corrected by how
much the best of so many places gains by being chosen, which the bootstrap tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from palimpsest.record.results import Results, sql_text
from palimpsest.record.row import UPSTREAM
from palimpsest.study.comparable import compared
from palimpsest.study.intervals import (
    Estimate,
    Floats,
    Relations,
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

    def corrected(self, facts: Sequence[str]) -> Floats:
        """(s − b) / (1 − b) of some facts: 0 is what finds nothing, 1 what always finds."""
        if self.baseline is None or self.baseline >= 1:
            return np.zeros(len(facts))
        success = self.success
        if tuple(facts) != self.facts:
            found = dict(zip(self.facts, self.success, strict=True))
            success = np.array([found[fact] for fact in facts])
        corrected: Floats = (success - self.baseline) / (1 - self.baseline)
        return corrected

    def of(self, facts: set[str]) -> "Reading":
        """The same of some of the facts."""
        kept = [place for place, fact in enumerate(self.facts) if fact in facts]
        names = tuple(self.facts[place] for place in kept)
        owners = tuple(self.relations[place] for place in kept)
        return replace(self, facts=names, relations=owners, success=self.success[kept])


def recoverable(results: Results) -> dict[str, Estimate]:
    """By run the index in [0, 1], chance-corrected, with an interval over facts.

    States count at or after the change only; of an unchanged model all do.
    """
    found = readings(results)
    return {run.run_id: _index(_reached(found.get(run.run_id, ()))) for run in results.runs}


def recoverable_beyond(results: Results, run_id: str, other: str) -> Estimate:
    """By how much the index of one run exceeds another's, like for like and fact by fact.

    Both sides are asked in words and at the layers and positions that count for both, and of the
    facts that have a value on both. Either is what the strongest attack finds that is defined for
    it, less its optimism, and at least 0. The interval is over facts, each with its value on both
    sides.
    """
    found = readings(results)
    sides = [_reached(found.get(each, ())) for each in (run_id, other)]
    if not all(reading.alike for side in sides for reading in side):
        return Estimate(None, note=UNLIKE)
    shared = set.intersection(*({reading.place[1:] for reading in side} for side in sides))
    alike = [[reading for reading in side if reading.place[1:] in shared] for side in sides]
    first, second = map(_strongest, alike)
    for best in (first, second):
        if isinstance(best, Estimate):
            return best
    assert isinstance(first, Best)
    assert isinstance(second, Best)
    common = {*first.facts} & {*second.facts}
    lacking = len({*first.facts} | {*second.facts}) - len(common)
    if not lacking:
        return _beyond(first, second)
    first, second = (_strongest([reading.of(common) for reading in side]) for side in alike)
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


def profiles(results: Results) -> dict[str, dict[str, Estimate]]:
    """By run the same index of the places of each zone by themselves, by its name in `ZONES`.

    Zones without places are left out; of an unchanged model there are none.
    """
    return {run_id: _profile(some) for run_id, some in readings(results).items()}


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
    owners: Relations
    values: Floats
    optimism: float

    def index(self, found: Any) -> Any:
        """The index where the attack finds so much on average: less its optimism, at least 0."""
        return np.maximum(0.0, found - self.optimism)


def _reached(found: Sequence[Reading]) -> Sequence[Reading]:
    """Places at or after the change; if it is at none of the measured states, all."""
    reached = [reading for reading in found if not reading.upstream]
    return reached if any(reading.place.layer is not None for reading in reached) else found


def _index(found: Sequence[Reading]) -> Estimate:
    """What the best of the attacks finds, less what a best of so many finds by chance."""
    best = _strongest(found)
    if isinstance(best, Estimate):
        return best
    numbers = (best.values.mean(), *interval(best.values, best.owners))
    value, low, high = (None if x is None else float(best.index(x)) for x in numbers)
    note = None if all(reading.alike for reading in found) else UNLIKE
    return Estimate(value, low, high, len(best.facts), note, best.place)


def _strongest(found: Sequence[Reading]) -> Best | Estimate:
    """The attack that finds most; or no value, and why."""
    most = max((len(reading.facts) for reading in found), default=0)
    usable = [r for r in found if r.baseline is not None and len(r.facts) == most and most]
    if not usable:
        return Estimate(None, note="no attacks were measured")
    facts = tuple(sorted(set.intersection(*(set(reading.facts) for reading in usable))))
    if len(facts) < LEAST:
        return Estimate(None, n=len(facts), note=f"fewer than {LEAST} facts with a value")
    relations = dict(zip(usable[0].facts, usable[0].relations, strict=True))
    owners = tuple(relations[fact] for fact in facts)
    table = np.array([reading.corrected(facts) for reading in usable])
    best = int(table.mean(1).argmax())
    return Best(str(usable[best].place), facts, owners, table[best], optimism(table, owners))


def optimism(table: Floats, relations: Relations) -> float:
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
)
SELECT run_id, protocol, layer, position, upstream, bool_and(alike),
    list(fact_id ORDER BY fact_id) {_VALUED}, list(relation ORDER BY fact_id) {_VALUED},
    list(value ORDER BY fact_id) {_VALUED}
FROM found GROUP BY run_id, protocol, layer, position, metric, upstream
ORDER BY run_id, metric, protocol, min(fact_id) {_VALUED},
    first(prompt ORDER BY fact_id) {_VALUED} NULLS FIRST, layer NULLS FIRST, position"""
"""A record for each place, in the order of the rows; those that the change reaches apart."""


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
