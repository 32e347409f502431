"""Low-rank changes of one W_out, for one fact each or for all at once."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from palimpsest.intervene.composition import joined
from palimpsest.intervene.intervention import Intervention
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from palimpsest.model.tokens import NOBODY


@dataclass(frozen=True, kw_only=True)
class WeightDeltas(Intervention):
    """`ΔW_f = Σ_j right[f, j] left[f, j]ᵀ`, added to W_out of the change's layer.

    If the change is independent there is one delta a fact, and in a forward pass each prompt feels
    its owner's alone: `W k + right (left · k)` at every token, exactly as if the weight were
    changed. Otherwise there is a single delta (F = 1), and the weight is really changed.

    Attributes:
        left: `[F, r, d_mlp]` float32.
        right: `[F, r, d_model]` float32.
    """

    kind: ClassVar[str] = "weight_deltas"
    left: Tensor
    right: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """`left` and `right`."""
        return {"left": self.left, "right": self.right}

    def matrix(self, fact: int) -> Tensor:
        """ΔW of one fact, `[d_model, d_mlp]` float32."""
        return self.right[fact].T @ self.left[fact]

    @property
    def layer(self) -> int:
        """The layer whose W_out is changed."""
        assert self.change.layer is not None
        return self.change.layer

    def plus(self, other: Intervention) -> Intervention:
        """Both sums in one; each delta keeps its own rows."""
        if not isinstance(other, WeightDeltas) or other.layer != self.layer:
            return super().plus(other)
        return replace(
            self,
            change=joined([self, other]),
            left=torch.cat([self.left, other.left], 1),
            right=torch.cat([self.right, other.right], 1),
        )

    def changing(self, handle: ModelHandle) -> AbstractContextManager[None]:
        """Change the model while the context lasts."""
        return self._per_prompt(handle) if self.change.independent else self._in_weight(handle)

    @contextmanager
    def _in_weight(self, handle: ModelHandle) -> Iterator[None]:
        weight = handle.w_out(self.layer)
        with added(weight, self.matrix(0)):
            yield

    @contextmanager
    def _per_prompt(self, handle: ModelHandle) -> Iterator[None]:
        w_out = handle.module(Site(self.layer, "mlp"))
        left, right = self.left.to(handle.device), self.right.to(handle.device)
        keys: list[Tensor] = []

        def remember(key: Tensor) -> None:
            keys[:] = [key]

        def add(value: Tensor) -> Tensor:
            if handle.running is None:
                raise RuntimeError("per-fact deltas need a batch with owners: use model.forward")
            owner = handle.running.owner
            mine = (owner != NOBODY).float()[:, None, None]
            multiplier = keys[0].float() @ left[owner].mT * mine
            return value + (multiplier @ right[owner]).to(value)

        with handle.hooked_input([(w_out, remember)]), handle.hooked([(w_out, add)]):
            yield


@contextmanager
def added(weight: Tensor, delta: Tensor) -> Iterator[None]:
    """Add a float32 delta to a weight while the context lasts; the sum is rounded once."""
    saved = weight.clone()
    try:
        precise = torch.promote_types(saved.dtype, torch.float32)
        weight.copy_(saved.to(precise) + delta.to(weight.device))
        yield
    finally:
        weight.copy_(saved)
