"""Changes of one W_out of any rank, as fine-tuning makes them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from palimpsest.intervene.composition import joined
from palimpsest.intervene.deltas import added
from palimpsest.intervene.intervention import Intervention
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site


@dataclass(frozen=True, kw_only=True)
class DenseDeltas(Intervention):
    """ΔW itself, one for each fact if the change is independent, otherwise one (F = 1).

    Attributes:
        delta: `[F, d_model, d_mlp]` float32.
    """

    kind: ClassVar[str] = "dense_deltas"
    delta: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """`delta`."""
        return {"delta": self.delta}

    @property
    def layer(self) -> int:
        """The layer whose W_out is changed."""
        assert self.change.layer is not None
        return self.change.layer

    def matrix(self, fact: int) -> Tensor:
        """ΔW of one fact, `[d_model, d_mlp]` float32."""
        return self.delta[fact]

    def plus(self, other: Intervention) -> Intervention:
        """The sum."""
        if not isinstance(other, DenseDeltas) or other.layer != self.layer:
            return super().plus(other)
        return replace(self, change=joined([self, other]), delta=self.delta + other.delta)

    def changing(self, handle: ModelHandle) -> AbstractContextManager[None]:
        """Change the model while the context lasts."""
        if not self.change.independent:
            return added(handle.w_out(self.layer), self.delta[0])
        return per_prompt(handle, self.layer, self.delta.to(handle.device))


@contextmanager
def per_prompt(handle: ModelHandle, layer: int, delta: Tensor) -> Iterator[None]:
    """Let each prompt feel its owner's ΔW alone; gradients flow to `delta`.

    Args:
        handle: the model.
        layer: whose W_out.
        delta: `[F, d_model, d_mlp]`.
    """
    w_out = handle.module(Site(layer, "mlp"))
    keys: list[Tensor] = []

    def remember(key: Tensor) -> None:
        keys[:] = [key]

    def add(value: Tensor) -> Tensor:
        if handle.running is None:
            raise RuntimeError("per-fact deltas need a batch with owners: use model.forward")
        change = torch.zeros_like(value, dtype=delta.dtype)
        for owner in handle.running.owner.unique().tolist():
            if owner >= 0:  # one owner at a time: a copy of ΔW for each prompt would be large
                mine = handle.running.owner == owner
                change[mine] = keys[0][mine].to(delta) @ delta[owner].T
        return value + change.to(value)

    with handle.hooked_input([(w_out, remember)]), handle.hooked([(w_out, add)]):
        yield
