"""One number and its uncertainty from rows. The unit of statistics is the fact."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from palimpsest.record.row import Row

Center = Literal["mean", "median"]
"""What stands for many values."""

Floats = NDArray[np.float64]

CLUSTERS = 10
"""With this many relations, whole relations are resampled; with fewer, facts within relations."""

RESAMPLES = 2000
"""Bootstrap samples behind an interval."""

_SEED = 20_220_210


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% percentile-bootstrap interval.

    Attributes:
        value: the number; None with the cause in `note`.
        low: lower end of the interval; None where there is none (an aggregate, a single fact).
        high: upper end.
        n: facts that the value is over; for an aggregate, its row's n.
        note: why there is no value, or why some facts lack one.
        place: where the value was read, e.g. `layer 27`.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    note: str | None = None
    place: str | None = None


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
    low, high = interval(values, tuple(relation for _, relation in found), center)
    return Estimate(_center(values, center), low, high, len(values), note, place)


def interval(
    values: Floats, relations: tuple[str | None, ...], center: Center = "mean"
) -> tuple[float, float] | tuple[None, None]:
    """95% percentile bootstrap over facts, seeded.

    Whole relations are resampled when there are ten or more, else facts within each relation (the
    inference is then conditional on the relations).

    Args:
        values: [facts] one value per fact.
        relations: [facts] each fact's relation.
        center: the statistic.

    Returns:
        Both ends, or two Nones where nothing can vary: fewer than ten relations of one fact each.
    """
    if not varies(relations):
        return None, None
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    weights = resampling(relations)
    return ends(weighted_mean(values, weights) if center == "mean" else _medians(values, weights))


def varies(relations: tuple[str | None, ...]) -> bool:
    """Whether a resample can differ: not with fewer than ten relations of one fact each."""
    distinct = len(set(relations))
    return distinct < len(relations) or distinct >= CLUSTERS


def ends(statistics: Floats) -> tuple[float, float]:
    """The 95% percentile interval of a statistic's values `[resamples]`."""
    low, high = np.quantile(statistics, [0.025, 0.975])
    return float(low), float(high)


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


@lru_cache(maxsize=8)
def resampling(relations: tuple[str | None, ...]) -> Floats:
    """How often each resample holds each fact: [resamples, facts]."""
    generator = np.random.default_rng(_SEED)
    names, index = np.unique([name or "" for name in relations], return_inverse=True)
    if len(names) >= CLUSTERS:
        return _draw(generator, len(names))[:, index]
    weights = np.empty((RESAMPLES, len(relations)))
    for relation in range(len(names)):
        members = np.flatnonzero(index == relation)
        weights[:, members] = _draw(generator, len(members))
    return weights


def _draw(generator: np.random.Generator, size: int) -> Floats:
    """Resampling `size` things with replacement, as counts: [resamples, size]."""
    counts = generator.multinomial(size, np.full(size, 1 / size), size=RESAMPLES)
    return counts.astype(np.float64)


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """The mean `[resamples]` of values `[facts]` that each resample holds so often."""
    result: Floats = weights @ values / weights.sum(axis=1)
    return result


def _medians(values: Floats, weights: Floats) -> Floats:
    """Median of every resample: the midpoint of its lower and its upper median."""
    order = np.argsort(values)
    filled = np.cumsum(weights[:, order], axis=1)
    half = filled[:, -1:] / 2
    lower, upper = (filled >= half).argmax(axis=1), (filled > half).argmax(axis=1)
    result: Floats = (values[order][lower] + values[order][upper]) / 2
    return result
