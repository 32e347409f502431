"""Controls: the null methods that every comparison runs beside the real ones."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from palimpsest.errors import RequestError, check_seed
from palimpsest.facts.splits import Splits
from palimpsest.intervene.changes.composition import Composition, Parts
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.intervention import Intervention, Method, Unchanged
from palimpsest.intervene.method import MethodBase, check_method
from palimpsest.intervene.moments import SampledMoments
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site


@dataclass(frozen=True)
class NoChange(MethodBase):
    """Leave the model as it is."""

    @property
    def part(self) -> str:
        """Nothing is changed; the residual stream, by convention."""
        return "residual"

    @property
    def sited(self) -> bool:
        """It is the same at every site."""
        return False

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Unchanged:
        """The intervention that changes nothing."""
        return Unchanged(change=Change("fact", False, None), model=model.fingerprint)


_APART = 1_000_003
"""Between the seeds of the layers of one change."""


@dataclass(frozen=True)
class RandomDelta(MethodBase):
    """ROME's own u with output directions drawn at random, of the same norm: is any push enough?

    Each fact's output vector keeps its norm, so ΔW of a single fact does too; that of many facts
    together only does so as far as their u are orthogonal. In a sequence u and the norms are those
    of the real edits, each fitted in the model that carried the real ones before it.

    Attributes:
        base: the editor that is imitated.
        seed: of the directions.
    """

    base: Any
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the base and the seed.

        Raises:
            RequestError: the base lacks something of a method, or the seed is out of range.
        """
        check_method(type(self.base), "intervene.base")
        check_seed("intervene.seed", self.seed)

    @property
    def part(self) -> str:
        """The base's."""
        return self.imitates.part

    @property
    def place(self) -> str:
        """The base's."""
        return self.imitates.place

    @property
    def lowest(self) -> int:
        """The base's."""
        return self.imitates.lowest

    @property
    def scope(self) -> str:
        """The base's."""
        return self.imitates.scope

    @property
    def imitates(self) -> Method:
        """The editor whose u and norm it takes."""
        return self.base  # type: ignore[no-any-return]

    def sampled_moments(self, model: ModelHandle, site: Site) -> SampledMoments | None:
        """The base's."""
        found = self.imitates.sampled_moments(model, site)
        return found and replace(found, key=f"base.{found.key}")

    def with_moments(self, tokens: int, length: int) -> "RandomDelta":
        """The same of the base with other second moments."""
        return replace(self, base=self.imitates.with_moments(tokens, length))

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Intervention:
        """Fit the base, then turn each output vector to a random direction.

        Raises:
            RequestError: the base is refused.
        """
        return _turned(self.imitates.fit(model, facts, site), self.seed)


def _turned(real: Intervention, seed: int) -> Intervention:
    if isinstance(real, Parts):
        apart = _APART * isinstance(real, Composition)  # a history keeps its directions
        turned = (_turned(part, seed + n * apart) for n, part in enumerate(real.parts))
        return replace(real, parts=tuple(turned))
    if not isinstance(real, WeightDeltas):
        raise RequestError(
            "expected an editor of low rank as intervene.base, found one whose change is "
            f"{real.kind.replace('_', ' ')}; take rome, r_rome, memit, emmet or alphaedit"
        )
    generator = torch.Generator().manual_seed(seed)
    facts, rank, width = real.right.shape
    # Row by row, so that a sequence of edits keeps its directions as it grows.
    noise = [torch.randn(width, generator=generator) for _ in range(facts * rank)]
    unit = torch.nn.functional.normalize(torch.stack(noise), dim=1).view_as(real.right)
    return replace(real, right=unit * real.right.norm(dim=-1, keepdim=True))
