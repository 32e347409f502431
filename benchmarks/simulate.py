"""How often the intervals hold the truth, and how a strongest attack is told without flattery.

`make simulate` prints the tables of docs/statistics.md.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm

from palimpsest.study.intervals import CLUSTERS, Floats, Relations, intervals
from palimpsest.study.recoverable import FOLDS, REPEATS, Place, Told, cross_fitted


class World(NamedTuple):
    """Facts whose hits are drawn.

    Attributes:
        p: the mean chance of a hit.
        facts: how many there are.
        relations: that they are spread over.
        alike: intra-class correlation of chances within a relation.
        prompts: of each fact; the fact's value is the share of hits among them.
        equal: whether relations have as many facts each; else the last has most, the first least.
    """

    p: float
    facts: int
    relations: int = 1
    alike: float = 0.0
    prompts: int = 1
    equal: bool = True

    @property
    def index(self) -> Any:
        """Each fact's relation by number: int `[facts]`."""
        if self.equal:
            return np.arange(self.facts) % self.relations
        weights = np.arange(1, self.relations + 1)
        sizes = np.maximum(1, self.facts * weights // weights.sum())
        sizes[-1] += self.facts - sizes.sum()
        return np.repeat(np.arange(self.relations), sizes)

    @property
    def names(self) -> Relations:
        """Each fact's relation."""
        return tuple(f"P{n}" for n in self.index)

    def draw(self, random: np.random.Generator, samples: int) -> tuple[Floats, Floats]:
        """Values `[samples, facts]`, and the truths that the intervals are conditional on."""
        chances = _spread(np.full((samples, self.relations), self.p), self.alike, random)
        own = chances[:, self.index]
        truths = np.full(samples, self.p) if self.relations >= CLUSTERS else own.mean(1)
        if self.prompts > 1:
            own = _spread(own, 0.3, random)
        return random.binomial(self.prompts, own) / self.prompts, truths

    def changed(
        self, rate: float, random: np.random.Generator, samples: int
    ) -> tuple[Floats, Floats]:
        """Differences `[samples, facts]` of a second method's hits, and the truths.

        Args:
            rate: the mean chance that a hit becomes a miss; a miss becomes a hit half as often. It
                varies between relations as `p` does.
            random: what draws.
            samples: how many.
        """
        wide = samples, self.relations
        chances = _spread(np.full(wide, self.p), self.alike, random)[:, self.index]
        rates = _spread(np.full(wide, rate), self.alike, random)[:, self.index]
        hits = random.random(chances.shape) < chances
        flipped = random.random(chances.shape) < np.where(hits, rates, rates / 2)
        meant = (1 - chances) * rates / 2 - chances * rates
        overall = (1 - self.p) * rate / 2 - self.p * rate
        truths = np.full(samples, overall) if self.relations >= CLUSTERS else meant.mean(1)
        return (hits ^ flipped).astype(float) - hits, truths


def _spread(chances: Floats, alike: float, random: np.random.Generator) -> Floats:
    """Chances drawn around others by a beta distribution of this intra-class correlation."""
    if not alike or not chances.any():
        return chances
    scale, inner = (1 - alike) / alike, np.clip(chances, 1e-6, 1 - 1e-6)
    drawn: Floats = random.beta(inner * scale, (1 - inner) * scale)
    return drawn


def coverage(world: World, samples: int, seed: int) -> float:
    """The share of samples whose interval of a share holds the truth."""
    values, truths = world.draw(np.random.default_rng(seed), samples)
    trials = np.full(samples, float(world.facts * world.prompts))
    return _held(np.array(intervals(values, world.names, "mean", "share", trials)), truths)


def paired_coverage(world: World, changed: float, samples: int, seed: int) -> float:
    """The same of differences: a second method flips some hits and misses of a first one."""
    values, truths = world.changed(changed, np.random.default_rng(seed), samples)
    return _held(np.array(intervals(values, world.names, "mean", "difference")), truths)


def _held(ends: Floats, truths: Floats) -> float:
    """How many intervals `[samples, 2]` hold the truth; none may be a point or lacking."""
    low, high = ends.astype(float).T
    assert (low < high).all()
    return float(((low <= truths) & (truths <= high)).mean())


# -- the strongest of many places ------------------------------------------------------------------

Draw = Callable[[np.random.Generator, int], Floats]
"""Hits `[places, facts]` of so many facts."""


def independent(truths: Sequence[float]) -> Draw:
    """Every place by itself."""
    chances = np.array(truths)[:, None]
    return lambda random, facts: (random.random((len(chances), facts)) < chances).astype(float)


def alike(truths: Sequence[float], correlation: float = 0.9) -> Draw:
    """Neighbouring places agree, and some facts are easy at all of them."""
    edges, keep = norm.ppf(np.array(truths))[:, None], correlation**0.5

    def draw(random: np.random.Generator, facts: int) -> Floats:
        common = random.normal(size=facts)
        walk = np.empty((len(edges), facts))
        walk[0] = random.normal(size=facts)
        for n in range(1, len(edges)):
            fresh = random.normal(size=facts)
            walk[n] = correlation * walk[n - 1] + (1 - correlation**2) ** 0.5 * fresh
        score = keep * common * 0.6**0.5 + (1 - 0.6 * keep**2) ** 0.5 * walk
        return (score < edges).astype(float)

    return draw


def chosen_best(table: Floats, dev: Floats, random: np.random.Generator) -> Floats:
    """The best place on the facts that it is told of, less its optimism by the bootstrap."""
    best = int(table.mean(1).argmax())
    weights = random.multinomial(table.shape[1], [1 / table.shape[1]] * table.shape[1], size=200)
    means = weights @ table.T / table.shape[1]
    optimism = (means.max(1) - table.mean(1)[means.argmax(1)]).mean()
    told: Floats = table[best] - optimism
    return told


def chosen_on_dev(table: Floats, dev: Floats, random: np.random.Generator) -> Floats:
    """The best place on 16 dev facts."""
    told: Floats = table[int(dev[:, :16].mean(1).argmax())]
    return told


def chosen_on_more(table: Floats, dev: Floats, random: np.random.Generator) -> Floats:
    """The best place on all 24 dev facts."""
    told: Floats = table[int(dev.mean(1).argmax())]
    return told


def chosen_once(table: Floats, dev: Floats, random: np.random.Generator) -> Floats:
    """For each of six folds of the facts, the best place on the others."""
    return _folded(table, random.permutation(table.shape[1]) % 6)


def chosen_by_others(table: Floats, dev: Floats, random: np.random.Generator) -> Floats:
    """For each fact, the best place on all others."""
    return _folded(table, np.arange(table.shape[1]))


def _folded(table: Floats, fold: Any) -> Floats:
    told = np.empty(table.shape[1])
    for n in range(fold.max() + 1):
        told[fold == n] = table[table[:, fold != n].mean(1).argmax()][fold == n]
    return told


def chosen_by_folds(table: Floats, dev: Floats, random: np.random.Generator) -> Floats:
    """For each fold of the facts, the best place on the other folds; the mean of several deals."""
    chosen = cross_fitted(table, np.zeros(len(table)), ("r",) * table.shape[1])
    told: Floats = table[chosen, np.arange(table.shape[1])].mean(0)
    return told


ESTIMATORS = {
    "best, less optimism": chosen_best,
    "chosen on 16 dev facts": chosen_on_dev,
    "on 24 dev facts": chosen_on_more,
    "cross-fitted, one deal to 6 folds": chosen_once,
    "leaving one out": chosen_by_others,
    f"cross-fitted, {REPEATS} deals to {FOLDS} folds": chosen_by_folds,
}
PLACES = 132
WORLDS: dict[str, tuple[Draw, float]] = {
    ".60 at every place, independent": (independent([0.6] * PLACES), 0.6),
    ".60 at every place, alike": (alike([0.6] * PLACES), 0.6),
    "chance (.125) at every place": (independent([0.125] * PLACES), 0.125),
    ".80 at one place, .40 elsewhere": (independent([0.8] + [0.4] * (PLACES - 1)), 0.8),
    "from .20 to .80, alike": (alike(list(np.linspace(0.2, 0.8, PLACES))), 0.8),
}
"""Hits by place, and the best place's truth."""


class Fared(NamedTuple):
    """What an estimator makes of a world: bias and error against the best place, and coverage."""

    bias: float
    error: float
    coverage: float


def told(draw: Draw, truth: float, name: str, facts: int, samples: int, seed: int) -> Fared:
    """An estimator over many samples of a world."""
    random, estimator = np.random.default_rng(seed), ESTIMATORS[name]
    means, held = [], 0
    for _ in range(samples):
        table, dev = draw(random, facts), draw(random, 24)
        values = estimator(table, dev, random)
        low, high = Told(np.clip(values, 0, 1), ("r",) * facts, Place("", None, ""), 1.0).ends
        assert low is not None
        assert high is not None
        means.append(values.mean())
        held += low <= truth <= high
    error = np.array(means) - truth
    return Fared(float(error.mean()), float((error**2).mean() ** 0.5), held / samples)


# -- the tables ------------------------------------------------------------------------------------


CHANCES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98)
CHANGED = (0.0, 0.02, 0.1, 0.3, 0.6, 0.98)


def worlds() -> Iterator[World]:
    """Numbers of facts and of relations, alike or not, of equal size or not; p is left open."""
    for facts, relations, icc, equal in product(
        (12, 24, 96, 384), (1, 3, 6, 10, 12), (0.0, 0.1, 0.3), (True, False)
    ):
        if facts >= 2 * relations and not (relations == 1 and (icc or not equal)):
            yield World(0.5, facts, relations, icc, equal=equal)


def lines(samples: int) -> Iterator[str]:
    """All tables, in Markdown."""
    yield "Least coverage of shares over p, and of differences over p and the share of hits changed"
    yield "| facts | relations | sizes | alike | 1 prompt | 3 prompts | differences |"
    yield "|---|---|---|---|---|---|---|"
    for world in worlds():
        some = [world._replace(p=p) for p in CHANCES]
        least = [
            min(coverage(each._replace(prompts=prompts), samples, 0) for each in some)
            for prompts in (1, 3)
        ]
        pairs = product(some[::2], CHANGED)
        least.append(min(paired_coverage(each, rate, samples, 0) for each, rate in pairs))
        sizes = "equal" if world.equal else "unequal"
        told_of = " | ".join(f"{share:.3f}" for share in least)
        yield f"| {world.facts} | {world.relations} | {sizes} | {world.alike} | {told_of} |"
    yield ""
    yield f"The strongest of {PLACES} places: bias, root mean square error, coverage"
    yield "| world | facts | " + " | ".join(ESTIMATORS) + " |"
    yield "|---|---|" + "---|" * len(ESTIMATORS)
    for (name, (draw, truth)), facts in product(WORLDS.items(), (24, 96)):
        cells = [told(draw, truth, each, facts, samples // 8, 0) for each in ESTIMATORS]
        shown = " | ".join(f"{c.bias:+.3f}, {c.error:.3f}, {c.coverage:.3f}" for c in cells)
        yield f"| {name} | {facts} | {shown} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    for line in lines(parser.parse_args().samples):
        print(line, flush=True)


if __name__ == "__main__":
    main()
