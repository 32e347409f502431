"""Does the tracing effect at a layer predict how well an edit at that layer works for that fact?

The regressions of Hase, Bansal, Kim, Ghandeharioun 2023 (arXiv 2301.04213).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import numpy as np
from scipy.special import fdtrc

from palimpsest.study.intervals import STEADY, Estimate, Floats, ends, resampling
from palimpsest.study.ranks import repeated, spearman

Verdict = Literal["undecided", "adds nothing that matters", "adds"]
"""Whether the effect tells more of an edit's success than the layer does."""

MARGIN = 0.03
"""An increase of R² below this does not matter."""

CEILING = 0.98
"""An edit of this success is at the ceiling."""

PERMUTATIONS = 100
"""Permutations of the effects behind `chance`."""

_AT_CEILING = 0.9
_LEAST_SPREAD = 0.02
_LEAST_FACTS = 10  # of fewer, many resamples hold two or three, which a line fits too well
_ROUNDING = 1e-10
_SEED = 20_230_110
_CONSTANT = "the same success everywhere"


@dataclass(frozen=True, slots=True)
class Observation:
    """One fact at one layer.

    Attributes:
        fact_id: the fact.
        relation: its relation.
        layer: the layer that is traced and edited.
        success: how well the edit works.
        effect: the tracing effect.
    """

    fact_id: str
    relation: str | None
    layer: int
    success: float
    effect: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Regressions:
    """What layer and effect tell of success, as R² in the sample.

    Intervals are those of `intervals.interval`: a fact is resampled with all its layers. Where
    success does not vary there are no values, and such resamples are left out. In the interval of
    an R² what noise explains counts twice, since resamples repeat facts; `corrected` is free of it.

    Attributes:
        n_facts: facts.
        n_layers: layers.
        n: observations.
        layer: R² of success ~ factor(layer).
        effect: R² of success ~ effect.
        both: R² of success ~ factor(layer) * effect: an intercept and a slope for each layer.
        both_additive: R² of success ~ factor(layer) + effect: one slope for all layers.
        increase: both − layer.
        increase_additive: both_additive − layer.
        p: of the F test of both against layer, which takes observations for independent; None
            without a slope or without degrees of freedom.
        chance: mean of `increase` with the effects permuted among the facts of each layer.
        corrected: increase − chance, where each resample has its own chance.
        correlations: by layer, Spearman's correlation of effect and success over facts.
        ceiling: share of the observations with success >= 0.98.
        spread: standard deviation of success.
        margin: the increase that matters, given in advance.
        verdict: what the interval of `corrected` says against the margin; undecided also at the
            ceiling, without spread, with fewer than ten facts or with effects that do not vary.
        reason: the verdict's cause in one line.
    """

    n_facts: int
    n_layers: int
    n: int
    layer: Estimate
    effect: Estimate
    both: Estimate
    both_additive: Estimate
    increase: Estimate
    increase_additive: Estimate
    p: float | None
    chance: float | None
    corrected: Estimate
    correlations: Mapping[int, Estimate]
    ceiling: float
    spread: float
    margin: float
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class _Grid:
    """Observations as facts × layers, zero where `present` is zero."""

    relations: tuple[str | None, ...]
    layers: tuple[int, ...]
    present: Floats
    success: Floats
    effect: Floats


@dataclass(frozen=True, slots=True)
class _Squares:
    """Sums about the weighted mean of effect x and success y: [samples, layers] or [samples].

    Moments are all that a line's R² needs.
    """

    xx: Floats
    xy: Floats
    yy: Floats

    def explained(self) -> Floats:
        """The part of yy that the least-squares line explains; 0 where x is constant."""
        zero = np.zeros_like(self.xx)
        return np.minimum(np.divide(self.xy**2, self.xx, out=zero, where=self.xx > 0), self.yy)

    def sum(self) -> "_Squares":
        """Over layers: [samples]."""
        return _Squares(self.xx.sum(axis=1), self.xy.sum(axis=1), self.yy.sum(axis=1))


def regress(observations: Sequence[Observation], margin: float = MARGIN) -> Regressions:
    """Regress success on layer and effect.

    Args:
        observations: one for each fact and layer where both numbers are known.
        margin: the increase of R² that would matter.

    Raises:
        ValueError: fewer than 3 facts or 2 layers, a pair twice, or a number that is not finite.
    """
    grid = _grid(observations)
    samples, n_facts = _samples(grid.relations), len(grid.relations)
    within, overall = _within(samples, grid), _overall(samples, grid)
    r2 = _r2(within, overall)
    chance = _share(_chance(samples, grid), overall.yy)
    corrected = _estimate(r2["increase"] - chance, n_facts, _CONSTANT)
    success = grid.success[grid.present > 0]
    ceiling, spread = float(np.mean(success >= CEILING)), float(np.std(success))
    cause = _undecidable(n_facts, ceiling, spread, bool(within.xx[0].any()))
    verdict, reason = _verdict(corrected, margin, cause)
    return Regressions(
        n_facts=n_facts,
        n_layers=len(grid.layers),
        n=len(observations),
        **{name: _estimate(value, n_facts, _CONSTANT) for name, value in r2.items()},
        p=_p(within, len(observations)),
        chance=None if np.isnan(chance[0]) else float(chance[0]),
        corrected=corrected,
        correlations=_correlations(samples, grid),
        ceiling=ceiling,
        spread=spread,
        margin=margin,
        verdict=verdict,
        reason=reason,
    )


def _grid(observations: Sequence[Observation]) -> _Grid:
    """Facts and layers in order.

    Raises:
        ValueError: see `regress`.
    """
    found = {(each.fact_id, each.layer): each for each in observations}
    relations = {each.fact_id: each.relation for each in observations}
    facts, layers = sorted(relations), sorted({layer for _, layer in found})
    if len(facts) < 3 or len(layers) < 2:
        raise ValueError(
            f"expected at least 3 facts and 2 layers, found {len(facts)} and {len(layers)}: "
            "measure more of them"
        )
    if len(found) < len(observations):
        raise ValueError("expected one observation for a fact and layer, found more: average them")
    present, success, effect = np.zeros((3, len(facts), len(layers)))
    for (fact, layer), each in found.items():
        if not (isfinite(each.success) and isfinite(each.effect)):
            raise ValueError(f"expected finite numbers, found {each}: leave it out")
        place = facts.index(fact), layers.index(layer)
        present[place], success[place], effect[place] = 1, each.success, each.effect
    names = tuple(relations[fact] for fact in facts)
    return _Grid(names, tuple(layers), present, success, effect)


def _samples(relations: tuple[str | None, ...]) -> Floats:
    """The weights of the facts as they are, then of each resample: [samples, facts].

    No resamples where nothing can vary: fewer than ten relations of one fact each.
    """
    resamples = resampling(relations)
    once = np.ones((1, len(relations)))
    return once if (resamples == 1).all() else np.vstack([once, resamples])


def _within(samples: Floats, grid: _Grid) -> _Squares:
    """About each layer's own mean: [samples, layers]."""
    return _squares(samples, _terms(grid, 0))


def _overall(samples: Floats, grid: _Grid) -> _Squares:
    """About the mean of all observations: [samples]."""
    terms = [term.sum(axis=1, keepdims=True) for term in _terms(grid, None)]
    return _squares(samples, terms).sum()


def _terms(grid: _Grid, axis: Literal[0] | None) -> list[Floats]:
    """1, x, y, x², xy, y² of each observation, centred along the axis: six [facts, layers]."""
    x, y = (_centred(values, grid.present, axis) for values in (grid.effect, grid.success))
    return [grid.present, x, y, x * x, x * y, y * y]


def _centred(values: Floats, present: Floats, axis: Literal[0] | None) -> Floats:
    """Minus the unweighted mean, against cancellation; exactly zero where they are constant."""
    mean = values.sum(axis, keepdims=True) / present.sum(axis, keepdims=True)
    centred = (values - mean) * present
    size = np.abs(values).max(axis, keepdims=True)
    varies = np.abs(centred).max(axis, keepdims=True) > _ROUNDING * size
    return np.where(varies, centred, 0)


def _squares(samples: Floats, terms: Sequence[Floats]) -> _Squares:
    """Of `_terms`, about each column's weighted mean: [samples, columns]."""
    n, x, y, xx, xy, yy = (samples @ term for term in terms)
    n = np.maximum(n, 1)
    return _Squares(_less(xx, x * x / n), xy - x * y / n, _less(yy, y * y / n))


def _less(squares: Floats, part: Floats) -> Floats:
    """Squares less a part of them; zero where only rounding is left."""
    left = squares - part
    return np.where(left > _ROUNDING * squares, left, 0)


def _share(part: Floats, total: Floats) -> Floats:
    """Part of the total, NaN where the total is zero: [samples]."""
    return np.divide(part, total, out=np.full_like(total, np.nan), where=total > 0)


def _r2(within: _Squares, overall: _Squares) -> dict[str, Floats]:
    """R² of each regression: [samples]. factor(layer) * effect is one line for each layer."""
    total, common = overall.yy, within.sum()
    layer = 1 - _share(common.yy, total)
    increase = _share(within.explained().sum(axis=1), total)
    additive = _share(common.explained(), total)
    return {
        "layer": layer,
        "effect": _share(overall.explained(), total),
        "both": layer + increase,
        "both_additive": layer + additive,
        "increase": increase,
        "increase_additive": additive,
    }


def _p(within: _Squares, n: int) -> float | None:
    """F test of a slope for each layer against none, in the facts as they are."""
    slopes, layers = np.count_nonzero(within.xx[0]), within.xx.shape[1]
    explained = within.explained()[0].sum()
    rest, freedom = within.yy[0].sum() - explained, n - layers - slopes
    if slopes == 0 or freedom <= 0 or within.yy[0].sum() == 0:
        return None
    if rest <= 0:
        return 0.0
    return float(fdtrc(slopes, freedom, (explained / slopes) / (rest / freedom)))


def _chance(samples: Floats, grid: _Grid) -> Floats:
    """Mean of what permuted effects explain within the layers, seeded: [samples]."""
    generator = np.random.default_rng(_SEED)
    permuted = (_permuted(grid, generator) for _ in range(PERMUTATIONS))
    explained = sum(_within(samples, each).explained().sum(axis=1) for each in permuted)
    result: Floats = explained / PERMUTATIONS
    return result


def _permuted(grid: _Grid, generator: np.random.Generator) -> _Grid:
    """The effects of each layer handed around among its facts."""
    effect = grid.effect.copy()
    for values, here in zip(effect.T, grid.present.T > 0, strict=True):
        values[here] = generator.permutation(values[here])
    return replace(grid, effect=effect)


def _correlations(samples: Floats, grid: _Grid) -> dict[int, Estimate]:
    """By layer, over the facts that have both numbers there."""
    found = {}
    for column, layer in enumerate(grid.layers):
        here = grid.present[:, column] > 0
        effect, success = grid.effect[here, column], grid.success[here, column]
        values = _rank_correlation(samples[:, here], effect, success)
        constant = [name for name, x in (("effect", effect), ("success", success)) if not np.ptp(x)]
        note = f"the same {' and '.join(constant)} for all facts"
        found[layer] = _estimate(values, len(effect), note, f"layer {layer}")
    return found


def _rank_correlation(samples: Floats, x: Floats, y: Floats) -> Floats:
    """Spearman's over the facts that each sample holds, NaN where one is constant: [samples]."""
    return spearman(*(repeated(samples, values) for values in (x, y)))


def _estimate(samples: Floats, n: int, note: str, place: str | None = None) -> Estimate:
    """The first sample with the 95% interval of the others, those without a value left out.

    Args:
        samples: [samples] NaN where there is no value.
        n: facts.
        note: why there is no value, if there is none.
        place: where the value was read.
    """
    if np.isnan(samples[0]):
        return Estimate(None, n=n, note=note, place=place)
    known = samples[1:][~np.isnan(samples[1:])]
    if not len(known):
        return Estimate(float(samples[0]), n=n, place=place)
    low, high = ends(known)
    steady = None if low is not None else STEADY
    return Estimate(float(samples[0]), low, high, n, steady, place)


def _undecidable(facts: int, ceiling: float, spread: float, varies: bool) -> str | None:
    """Why the observations cannot decide, whatever the regressions say; None if they can."""
    if ceiling >= _AT_CEILING:
        return f"{ceiling:.0%} of the edits are at the ceiling (success >= {CEILING})"
    if spread < _LEAST_SPREAD:
        return f"success hardly varies: its standard deviation is {spread:.3f}"
    if facts < _LEAST_FACTS:
        return f"{facts} facts: the interval can be trusted from {_LEAST_FACTS} on"
    if not varies:
        return "the effect is the same for all facts of a layer"
    return None


def _verdict(corrected: Estimate, margin: float, cause: str | None) -> tuple[Verdict, str]:
    """The interval of the increase beyond chance against the margin, unless it cannot decide."""
    if cause:
        return "undecided", cause
    if corrected.low is None or corrected.high is None:
        return "undecided", "no interval: nothing to resample"
    ends = f"{corrected.low:z.3f} to {corrected.high:z.3f}"
    about = f"R² increases beyond chance by {ends} (95% interval)"
    if corrected.high < margin:
        return "adds nothing that matters", f"{about}, below the margin {margin}"
    if corrected.low > margin:
        return "adds", f"{about}, above the margin {margin}"
    return "undecided", f"{about}, on both sides of the margin {margin}"
