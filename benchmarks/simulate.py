"""How often the intervals hold the truth, and how a strongest attack is told without flattery.

`make simulate` prints the tables of docs/statistics.md.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from palimpsest.study.intervals import CLUSTERS, Floats, Relations, interval
from palimpsest.study.recoverable import FOLDS, REPEATS, Place, Told, cross_fitted


class World(NamedTuple):
    """Facts whose hits are drawn.

    Attributes:
        p: the mean chance of a hit.
        facts: how many there are.
        relations: that they are spread over.
        alike: intra-class correlation of chances within a relation.
        prompts: of each fact; the fact's value is the share of hits among them.
    """

    p: float
    facts: int
    relations: int = 1
    alike: float = 0.0
    prompts: int = 1

    @property
    def names(self) -> Relations:
        """Each fact's relation."""
        return tuple(f"P{n % self.relations}" for n in range(self.facts))

    def draw(self, random: np.random.Generator) -> tuple[Floats, float]:
        """Values `[facts]`, and the truth that the interval is conditional on."""
        chances = _spread(np.full(self.relations, self.p), self.alike, random)
        own = chances[np.arange(self.facts) % self.relations]
        truth = self.p if self.relations >= CLUSTERS else float(own.mean())
        if self.prompts > 1:
            own = _spread(own, 0.3, random)
        return random.binomial(self.prompts, own) / self.prompts, truth


def _spread(chances: Floats, alike: float, random: np.random.Generator) -> Floats:
    """Chances drawn around others by a beta distribution of this intra-class correlation."""
    if not alike:
        return chances
    scale, inner = (1 - alike) / alike, np.clip(chances, 1e-6, 1 - 1e-6)
    drawn: Floats = random.beta(inner * scale, (1 - inner) * scale)
    return drawn


def coverage(world: World, samples: int, seed: int) -> float:
    """The share of samples whose interval of a share holds the truth."""
    random, held = np.random.default_rng(seed), 0
    for _ in range(samples):
        values, truth = world.draw(random)
        low, high = interval(values, world.names, kind="share", trials=world.facts * world.prompts)
        assert low is not None
        assert high is not None
        assert low < high
        held += low <= truth <= high
    return held / samples


def paired_coverage(
    p: float, changed: float, facts: int, samples: int, seed: int, relations: int = 1
) -> float:
    """The same of differences: a second method flips some hits and misses of a first one.

    Args:
        p: the first one's chance of a hit.
        changed: the chance that a hit becomes a miss; a miss becomes a hit half as often.
        facts: how many there are.
        samples: to draw.
        seed: of all that is drawn.
        relations: that the facts are spread over.
    """
    random, held = np.random.default_rng(seed), 0
    names = tuple(f"P{n % relations}" for n in range(facts))
    truth = -p * changed + (1 - p) * changed / 2
    for _ in range(samples):
        first = random.random(facts) < p
        flipped = random.random(facts) < np.where(first, changed, changed / 2)
        difference = (first ^ flipped).astype(float) - first
        low, high = interval(difference, names, kind="difference")
        assert low is not None
        assert high is not None
        assert low < high
        held += low <= truth <= high
    return held / samples


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
    """The best place on dev facts."""
    told: Floats = table[int(dev.mean(1).argmax())]
    return told


def chosen_by_folds(table: Floats, dev: Floats, random: np.random.Generator) -> Floats:
    """For each fold of the facts, the best place on the other folds; the mean of several deals."""
    chosen = cross_fitted(table, np.zeros(len(table)), ("r",) * table.shape[1])
    told: Floats = table[chosen, np.arange(table.shape[1])].mean(0)
    return told


ESTIMATORS = {
    "best, less optimism": chosen_best,
    "chosen on 16 dev facts": chosen_on_dev,
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
        table, dev = draw(random, facts), draw(random, 16)
        values = estimator(table, dev, random)
        low, high = Told(np.clip(values, 0, 1), ("r",) * facts, Place("", None, ""), 1.0).ends
        assert low is not None
        assert high is not None
        means.append(values.mean())
        held += low <= truth <= high
    error = np.array(means) - truth
    return Fared(float(error.mean()), float((error**2).mean() ** 0.5), held / samples)


# -- the tables ------------------------------------------------------------------------------------


def lines(samples: int) -> Iterator[str]:
    """All tables, in Markdown."""
    yield "Shares: least coverage over p = .02, .05, .2, .5, .8, .95, .98"
    yield "| facts | relations | alike | 1 prompt | 3 prompts |"
    yield "|---|---|---|---|---|"
    for facts, relations, icc in product((12, 24, 96, 384), (1, 3, 10, 12), (0.0, 0.1, 0.3)):
        if facts <= relations * (icc > 0) or (relations == 1 and icc):
            continue
        worst = [
            min(
                coverage(World(p, facts, relations, icc, prompts), samples, 0)
                for p in (0.02, 0.05, 0.2, 0.5, 0.8, 0.95, 0.98)
            )
            for prompts in (1, 3)
        ]
        yield f"| {facts} | {relations} | {icc} | " + " | ".join(f"{w:.3f}" for w in worst) + " |"
    yield ""
    yield "Differences: coverage where a second method changes 0, .1, .3, .6 of the hits"
    yield "| facts | relations | p | 0 | .1 | .3 | .6 |"
    yield "|---|---|---|---|---|---|---|"
    for facts, relations, p in product((12, 24, 96, 384), (1, 12), (0.05, 0.5, 0.95)):
        each = [
            paired_coverage(p, changed, facts, samples, 0, relations)
            for changed in (0.0, 0.1, 0.3, 0.6)
        ]
        yield f"| {facts} | {relations} | {p} | " + " | ".join(f"{c:.3f}" for c in each) + " |"
    yield ""
    yield f"The strongest of {PLACES} places: bias, root mean square error, coverage"
    yield "| world | facts | " + " | ".join(ESTIMATORS) + " |"
    yield "|---|---|---|---|---|"
    for (name, (draw, truth)), facts in product(WORLDS.items(), (24, 96)):
        cells = [told(draw, truth, each, facts, samples // 2, 0) for each in ESTIMATORS]
        shown = " | ".join(f"{c.bias:+.3f}, {c.error:.3f}, {c.coverage:.3f}" for c in cells)
        yield f"| {name} | {facts} | {shown} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=500)
    for line in lines(parser.parse_args().samples):
        print(line, flush=True)


if __name__ == "__main__":
    main()
