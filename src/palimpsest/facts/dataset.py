"""What every data set is: a plan of the split, and a way to load facts."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from palimpsest.errors import RequestError
from palimpsest.facts.fact import FactSet

SPLITS = ("target", "test", "fit", "probe", "dev")
"""The splits that subjects are dealt to, in the order in which shares accumulate."""


@dataclass(frozen=True)
class DataSet(ABC):
    """The options of a data set; subclasses add what they read and implement `load`.

    Sizes say how many facts a split may hold at most; they never move a subject from one split to
    another, which `shares` and the seed alone decide (see `split`).

    Attributes:
        limit: target facts, the ones that every method must change.
        test: known facts of the same relations that no fit sees.
        fit: facts for statistics such as LEACE's; true labels only.
        probe: facts to train probes on; true labels only.
        dev: known facts to choose layers, attacks and hyper-parameters on.
        others: known facts of other relations.
        neighbors: neighborhood prompts for a target fact that brings none.
        shares: by split, the fraction of each relation's subjects dealt to it; they sum to 1.
    """

    limit: int = 24
    test: int = 64
    fit: int = 400
    probe: int = 320
    dev: int = 16
    others: int = 48
    neighbors: int = 5
    shares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0.2))

    @abstractmethod
    def load(self) -> FactSet:
        """Read every usable fact, before any split or knowledge filter.

        Raises:
            RequestError: the data cannot be read as asked.
        """

    def by_relation(self) -> Iterator[FactSet]:
        """Sets that together hold the facts of every relation that the options do not exclude.

        Raises:
            RequestError: the data cannot be read as asked.
        """
        yield self.load()

    def sizes(self) -> dict[str, int]:
        """How many facts each split, and `others`, may hold at most."""
        return {
            "target": self.limit,
            "test": self.test,
            "fit": self.fit,
            "probe": self.probe,
            "dev": self.dev,
            "others": self.others,
        }

    def check(self) -> None:
        """Refuse sizes and shares that no split can follow.

        Raises:
            RequestError: `limit` is below 1, another size is negative, or `shares` does not give
                each of `SPLITS` a fraction such that they sum to 1.
        """
        if self.limit < 1:
            raise RequestError(
                f"expected at least one target fact, found facts.limit={self.limit}; "
                "ask for 1 or more"
            )
        for name, size in (self.sizes() | {"neighbors": self.neighbors}).items():
            if size < 0:
                raise RequestError(
                    f"expected a size of 0 or more, found facts.{name}={size}; ask for 0 or more"
                )
        shares = dict(self.shares)
        if set(shares) != set(SPLITS):
            raise RequestError(
                f"expected facts.shares to name {', '.join(SPLITS)}, found "
                f"{', '.join(shares) or 'none'}; give each of them a fraction"
            )
        if min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
            listed = ", ".join(f"{name}={share:g}" for name, share in shares.items())
            raise RequestError(
                f"expected facts.shares to be fractions that sum to 1, found {listed} "
                f"(sum {sum(shares.values()):g}); change them together"
            )
