"""Numbers and their uncertainty. The unit of statistics is the fact.

docs/statistics.md says how each interval is made, what it is conditional on, and how often it holds
the truth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, norm, t

Center = Literal["mean", "median"]
"""What stands for many values."""

Kind = Literal["share", "difference", "number"]
"""`share`: hits or parts of them, in [0, 1]. `difference`: of two shares. `number`: any other."""

Floats = NDArray[np.float64]
Relations = tuple[str | None, ...]
Ends = tuple[float, float] | tuple[None, None]

CLUSTERS = 10
"""With this many relations, the unit is the relation; with fewer, facts within each relation."""

RESAMPLES = 2000
"""Bootstrap samples behind the interval of a number that is no share."""

_FEW = 6
"""Effective hits or misses, below which the data say little of how alike facts of a relation are.

Found by simulation: with 4, coverage is as good for shares and lower for differences.
"""

_ALIKE = 0.3
"""Their intra-class correlation then, where relations are the unit: a large one, to be safe."""

_LEVEL = 0.975
"""Of the upper end."""

_ROUNDING = 1e-9
_SEED = 20_220_210
_TOGETHER = 256
"""Quantities whose resamples are held at once."""

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval.

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
        kind: what the values are.
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
    kind: Kind = "number"

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
    """The centre of each quantity's facts, with a 95% interval; see `interval`.

    Numbers over facts of the same relations share the bootstrap's resamples, so that all their
    intervals come from one matrix product. Aggregates have a value and no interval.

    Args:
        samples: the quantities.
        center: how facts are combined.
        places: where some of them were read, to be told with the value.
    """
    alike: dict[tuple[Relations, Kind], list[K]] = {}
    for key, sample in samples.items():
        if len(sample.values):
            alike.setdefault((sample.relations, sample.kind), []).append(key)
    ends_of: dict[K, Ends] = {}
    for (relations, kind), keys in alike.items():
        for start in range(0, len(keys), _TOGETHER):
            some = keys[start : start + _TOGETHER]
            values = np.stack([samples[key].values for key in some])
            trials = np.array([samples[key].present for key in some])
            found = intervals(values, relations, center, kind, trials)
            ends_of |= zip(some, found, strict=True)
    places = places or {}
    return {
        key: _estimate(sample, center, ends_of.get(key, (None, None)), places.get(key))
        for key, sample in samples.items()
    }


def _estimate(sample: Sample, center: Center, ends: Ends, place: str | None) -> Estimate:
    if len(sample.values):
        value = _center(sample.values, center)
        low, high = ends
        return Estimate(value, low, high, len(sample.values), sample.note, place)
    if sample.aggregate:
        value, n = sample.aggregate
        return Estimate(value, n=n, note=sample.note, place=place)
    return Estimate(None, note=sample.note or "not measured", place=place)


def interval(
    values: Floats,
    relations: Relations,
    center: Center = "mean",
    kind: Kind = "number",
    trials: int | None = None,
) -> Ends:
    """The 95% interval of a mean, or of a median, over facts.

    With ten relations or more the inference is over relations; with fewer it is conditional on
    them, and over facts within each. A mean of shares has Clopper and Pearson's interval at its
    effective sample size, a mean of differences of shares one by t with a pseudo-fact on each side,
    every other number a bootstrap. No interval is a point.

    Args:
        values: `[facts]` one value per fact.
        relations: `[facts]` each fact's relation.
        center: the statistic; an interval of a median is a bootstrap's whatever the kind.
        kind: what the values are.
        trials: of a share, single hits and misses behind the values; None: one for each fact.

    Returns:
        both ends, or two Nones where nothing can be said: a single fact; of numbers also where all
        are equal, or fewer than ten relations have one fact each.
    """
    return intervals(values[None], relations, center, kind, np.array([trials or len(values)]))[0]


def intervals(
    values: Floats,
    relations: Relations,
    center: Center = "mean",
    kind: Kind = "number",
    trials: Floats | None = None,
) -> list[Ends]:
    """`interval` of many quantities over the same facts, `[quantities, facts]`."""
    facts = values.shape[1]
    if facts < 2:
        return [(None, None)] * len(values)
    if kind == "number" or center == "median":
        return _bootstrapped(values, relations, center)
    if kind == "difference":
        low, high = _of_differences(values, relations)
    else:
        low, high = _of_shares(
            values, relations, np.full(len(values), facts) if trials is None else trials
        )
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def _of_shares(values: Floats, relations: Relations, trials: Floats) -> tuple[Floats, Floats]:
    """Clopper and Pearson's interval at the effective sample size (Korn, Graubard 1998, §3).

    The effective size is n over the design effect: the variance of the mean as the facts are
    sampled, over that of n independent hits or misses.
    """
    mean, n = values.mean(1), values.shape[1]
    variance, freedom, crowd = _variance(values, relations)
    rare = n * np.minimum(mean, 1 - mean)
    effect = _effect(variance, mean * (1 - mean) / (n - 1), rare, crowd)
    size = np.minimum(n / effect, np.where(rare < _FEW, n, np.maximum(trials, n)))
    size = size * (t.ppf(_LEVEL, n - 1) / t.ppf(_LEVEL, freedom)) ** 2
    hits = mean * size
    low = np.where(mean > 0, beta.ppf(1 - _LEVEL, hits, size - hits + 1), 0.0)
    high = np.where(mean < 1, beta.ppf(_LEVEL, hits + 1, size - hits), 1.0)
    return low, high


def _of_differences(values: Floats, relations: Relations) -> tuple[Floats, Floats]:
    """By t, with a pseudo-fact that gains and one that loses (Agresti, Min 2005, for pairs).

    They are added to as many facts as the effective sample size has, so that they weigh as much as
    relations do where these are the unit.
    """
    mean, n = values.mean(1), values.shape[1]
    variance, freedom, crowd = _variance(values, relations)
    rare = np.min([np.abs(values - same).sum(1) for same in (-1, 0, 1)], axis=0)
    simple = values.var(1, ddof=1) / n
    effect = _effect(variance, simple, rare, crowd)
    size = n / effect if crowd > 1 else np.full_like(mean, n)
    variance = simple * effect if crowd > 1 else variance
    center = mean * size / (size + 2)
    spread = np.sqrt(variance * (size / (size + 2)) ** 2 + 2 / (size + 2) ** 2)
    width = t.ppf(_LEVEL, freedom) * spread
    low, high = np.minimum(center - width, mean), np.maximum(center + width, mean)
    return np.maximum(low, -1.0), np.minimum(high, 1.0)


def _effect(variance: Floats, simple: Floats, rare: Floats, crowd: float) -> Floats:
    """The design effect: the variance of the mean over that of n independent facts.

    Where relations are the unit it is at least 1, and, where too few facts are unlike the others
    for the data to tell it, at least that of facts that are much alike.

    Args:
        variance: of the mean, `[quantities]`.
        simple: the same if facts were independent.
        rare: how many facts, or parts of them, are unlike the others.
        crowd: how many facts the relation of an average fact has; 1 where facts are the unit.
    """
    effect = np.divide(variance, simple, out=np.ones_like(simple), where=simple > 0)
    if crowd > 1:
        assumed = 1 + (crowd - 1) * _ALIKE
        effect = np.maximum(effect, np.where(rare < _FEW * assumed, assumed, 1.0))
    return np.maximum(effect, 1e-9)


def _variance(values: Floats, relations: Relations) -> tuple[Floats, float, float]:
    """Of the mean, `[quantities]`; its degrees of freedom; how many facts share a sampling unit.

    Relations are the units if there are ten or more, and strata if there are fewer: those of one
    fact then have the variance of all facts. Relations of unequal size count as fewer (Kish 1965).
    """
    n = values.shape[1]
    names, index = np.unique([name or "" for name in relations], return_inverse=True)
    member = np.eye(len(names))[index]
    sizes = member.sum(0)
    if len(names) >= CLUSTERS:
        totals = (values - values.mean(1, keepdims=True)) @ member
        units, crowd = len(names), float((sizes**2).sum() / n)
        return units / (units - 1) * (totals**2).sum(1) / n**2, max(n / crowd - 1, 1.0), crowd
    overall = values.var(1, ddof=1)
    freedom = float((sizes - 1).sum())
    if not freedom:
        return overall / n, n - 1, 1.0
    own = values - (values @ member / sizes) @ member.T
    within = np.where(sizes > 1, (own**2) @ member / np.maximum(sizes - 1, 1), overall[:, None])
    return (within * sizes).sum(1) / n**2, freedom, 1.0


def _bootstrapped(values: Floats, relations: Relations, center: Center) -> list[Ends]:
    """Expanded percentile intervals (Hesterberg 2015, section 3.4); none where they are a point."""
    if not varies(relations):
        return [(None, None)] * len(values)
    weights = resampling(relations)
    if center == "mean":
        drawn = weighted_means(values, weights)
    else:
        drawn = np.stack([_medians(row, weights) for row in values])
    units = len(set(relations)) if len(set(relations)) >= CLUSTERS else values.shape[1]
    outer = float(norm.cdf(t.ppf(_LEVEL, units - 1) * (units / (units - 1)) ** 0.5))
    low, high = np.quantile(drawn, [1 - outer, outer], axis=1)
    point = (np.ptp(values, axis=1) == 0) | (low == high)
    return [
        (None, None) if same else (float(a), float(b))
        for a, b, same in zip(low, high, point, strict=True)
    ]


STEADY = "no interval: nearly all resamples of the facts give the same value"
"""What is said of a statistic whose bootstrap interval would be a point."""


def ends(drawn: Floats) -> Ends:
    """The 95% percentile interval of a statistic's values `[resamples]`; none if it is a point."""
    if not len(drawn):
        return None, None
    low, high = np.quantile(drawn, [1 - _LEVEL, _LEVEL])
    return (float(low), float(high)) if high - low > _ROUNDING else (None, None)


def varies(relations: Relations) -> bool:
    """Whether a resample can differ: not with fewer than ten relations of one fact each."""
    distinct = len(set(relations))
    return distinct < len(relations) or distinct >= CLUSTERS


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


def weighted_means(values: Floats, weights: Floats) -> Floats:
    """Means `[quantities, resamples]` of values `[quantities, facts]` in resamples."""
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
