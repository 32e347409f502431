"""Controls: the null methods that every comparison runs beside the real ones."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from palimpsest.facts.splits import Splits
from palimpsest.intervene.deltas import WeightDeltas
from palimpsest.intervene.intervention import Method, Unchanged
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site


@dataclass(frozen=True)
class NoChange:
    """Leave the model as it is."""

    @property
    def part(self) -> str:
        """Nothing is changed; the residual stream, by convention."""
        return "residual"

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Unchanged:
        """The intervention that changes nothing."""
        return Unchanged(change=Change("fact", False, None), model=model.fingerprint)


@dataclass(frozen=True)
class RandomDelta:
    """ROME's own u with output directions drawn at random, of the same norm: is any push enough?

    Attributes:
        base: the editor that is imitated.
        seed: of the directions.
    """

    base: Any
    seed: int = 0

    @property
    def part(self) -> str:
        """The base's."""
        method: Method = self.base
        return method.part

    @property
    def imitates(self) -> Method:
        """The editor whose u and norm it takes."""
        return self.base  # type: ignore[no-any-return]

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> WeightDeltas:
        """Fit the base, then turn each output vector to a random direction."""
        real: WeightDeltas = self.base.fit(model, facts, site)
        noise = torch.randn(real.right.shape, generator=torch.Generator().manual_seed(self.seed))
        unit = noise / noise.norm(dim=-1, keepdim=True)
        return replace(real, right=unit * real.right.norm(dim=-1, keepdim=True))
