"""Numbers and their uncertainty. The unit of statistics is the fact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Center = Literal["mean", "median"]
"""What stands for many values."""

Floats = NDArray[np.float64]
Relations = tuple[str | None, ...]

CLUSTERS = 10
"""With this many relations, whole relations are resampled; with fewer, facts within relations."""

RESAMPLES = 2000
"""Bootstrap samples behind an interval."""

_SEED = 20_220_210
_TOGETHER = 256
"""Quantities whose resamples are held at once."""

K = TypeVar("K")


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


@dataclass(frozen=True, slots=True)
class Sample:
    """One quantity of one run before any statistics.

    Attributes:
        values: `[facts]` each fact's mean over its prompts; empty where no fact has a value.
        facts: their ids, sorted.
        relations: `[facts]` their relations.
        aggregate: the mean with weight n of values that are no single fact's, and the sum of the
            weights; None if a fact has a value, or none is there.
        asked: rows.
        present: rows with a value.
        causes: why values are missing, sorted.
        upstream: whether all values were read where the change cannot reach.
        unlike: measures of these rows that were configured otherwise than in most runs.
    """

    values: Floats
    facts: tuple[str, ...]
    relations: Relations
    aggregate: tuple[float, int] | None = None
    asked: int = 0
    present: int = 0
    causes: tuple[str, ...] = ()
    upstream: bool = False
    unlike: tuple[str, ...] = ()

    @property
    def note(self) -> str | None:
        """Why values are missing, and whether what is there can be compared; None if all is."""
        parts = [absence(self.causes, self.asked, self.present)]
        if self.unlike:
            parts.append(
                f"measured differently from most runs here ({', '.join(self.unlike)}): not "
                "comparable with theirs"
            )
        return "; ".join(part for part in parts if part) or None


def absence(causes: Sequence[str], asked: int, present: int) -> str | None:
    """Why values are missing, and how many if only some are; None if none is."""
    if present == asked:
        return None
    told = "; ".join(causes)
    return f"{asked - present} of {asked} values missing: {told}" if present else told


def estimates(
    samples: Mapping[K, Sample],
    center: Center = "mean",
    places: Mapping[K, str | None] | None = None,
) -> dict[K, Estimate]:
    """The centre of each quantity's facts, with a 95% percentile-bootstrap interval.

    Facts are resampled as in `interval`. Quantities over facts of the same relations share the
    resamples, so that all their intervals come from one matrix product. Aggregates have a value and
    no interval.

    Args:
        samples: the quantities.
        center: how facts are combined.
        places: where some of them were read, to be told with the value.
    """
    alike: dict[Relations, list[K]] = {}
    for key, sample in samples.items():
        if len(sample.values):
            alike.setdefault(sample.relations, []).append(key)
    ends_of: dict[K, tuple[float, float] | tuple[None, None]] = {}
    for relations, keys in alike.items():
        for start in range(0, len(keys), _TOGETHER):
            some = keys[start : start + _TOGETHER]
            values = np.stack([samples[key].values for key in some])
            ends_of |= zip(some, intervals(values, relations, center), strict=True)
    places = places or {}
    return {
        key: _estimate(sample, center, ends_of.get(key, (None, None)), places.get(key))
        for key, sample in samples.items()
    }


def _estimate(
    sample: Sample,
    center: Center,
    ends: tuple[float, float] | tuple[None, None],
    place: str | None,
) -> Estimate:
    if len(sample.values):
        value = _center(sample.values, center)
        low, high = ends
        return Estimate(value, low, high, len(sample.values), sample.note, place)
    if sample.aggregate:
        value, n = sample.aggregate
        return Estimate(value, n=n, note=sample.note, place=place)
    return Estimate(None, note=sample.note or "not measured", place=place)


def interval(
    values: Floats, relations: Relations, center: Center = "mean"
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
    return intervals(values[None], relations, center)[0]


def intervals(
    values: Floats, relations: Relations, center: Center = "mean"
) -> list[tuple[float, float] | tuple[None, None]]:
    """`interval` of many quantities over the same facts, `[quantities, facts]`."""
    if not varies(relations):
        return [(None, None)] * len(values)
    weights = resampling(relations)
    if center == "mean":
        drawn = weighted_means(values, weights)
    else:
        drawn = np.stack([_medians(row, weights) for row in values])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    flat = np.ptp(values, axis=1) == 0
    low, high = (np.where(flat, values[:, 0], end) for end in (low, high))
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def varies(relations: Relations) -> bool:
    """Whether a resample can differ: not with fewer than ten relations of one fact each."""
    distinct = len(set(relations))
    return distinct < len(relations) or distinct >= CLUSTERS


def ends(statistics: Floats) -> tuple[float, float]:
    """The 95% percentile interval of a statistic's values `[resamples]`."""
    low, high = np.quantile(statistics, [0.025, 0.975])
    return float(low), float(high)


def _center(values: Floats, center: Center) -> float:
    return float(np.mean(values) if center == "mean" else np.median(values))


@lru_cache(maxsize=8)
def resampling(relations: Relations) -> Floats:
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


def weighted_means(values: Floats, weights: Floats) -> Floats:
    """The same `[quantities, resamples]` of values `[quantities, facts]`."""
    result: Floats = values @ weights.T / weights.sum(axis=1)
    return result


def _medians(values: Floats, weights: Floats) -> Floats:
    """Median of every resample: the midpoint of its lower and its upper median."""
    order = np.argsort(values)
    filled = np.cumsum(weights[:, order], axis=1)
    half = filled[:, -1:] / 2
    lower, upper = (filled >= half).argmax(axis=1), (filled > half).argmax(axis=1)
    result: Floats = (values[order][lower] + values[order][upper]) / 2
    return result
