"""The headline index: how much of the old object the best of many attacks still finds.

Which attack and which layer is best is decided on some facts and told of others, so that a maximum
over many places does not flatter the attacker.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from palimpsest.record.intervals import Estimate, interval
from palimpsest.record.row import Row
from palimpsest.record.store import Run

FOLDS = 6
"""Parts of the facts: on all but one the attack is chosen, of that one it is told."""

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
    rows = successes(run)
    reached = [row for row in rows if not row.upstream]
    return _index(run, reached if any(row.layer is not None for row in reached) else rows)


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


ZONES = ("upstream, unchanged by construction", "at the site", "downstream", "prompts")
"""Where the change cannot reach; the first measured layer that it reaches; above; in words."""


def _zone(row: Row, site: int) -> str:
    if row.layer is None:
        return ZONES[3]
    if row.upstream:
        return ZONES[0]
    return ZONES[1] if row.layer == site else ZONES[2]


def _index(run: Run, rows: Sequence[Row]) -> Estimate:
    """What the attack that is best on other facts finds, each fact being told by such a one."""
    readings = attacks(run, rows)
    if not readings:
        return Estimate(None, note="no attacks were measured")
    relations = {str(row.fact_id): row.relation for row in rows}
    facts = sorted(set.intersection(*(set(each.success) for each in readings.values())))
    if len(facts) < FOLDS:
        return Estimate(None, n=len(facts), note=f"fewer than {FOLDS} facts with a value")
    values: dict[str, float] = {}
    chosen: dict[Place, int] = defaultdict(int)
    for fold in range(FOLDS):
        told = facts[fold::FOLDS]
        others = [fact for fact in facts if fact not in told]
        best = max(readings, key=lambda place: fmean(readings[place].corrected(others)))
        chosen[best] += 1
        values |= zip(told, readings[best].corrected(told), strict=True)
    found = np.array([values[fact] for fact in facts])
    ends = interval(found, tuple(relations[fact] for fact in facts))
    value, low, high = (None if x is None else max(0.0, float(x)) for x in (found.mean(), *ends))
    usual = max(chosen, key=lambda place: chosen[place])
    return Estimate(value, low, high, len(facts), place=_named(usual))


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
