"""Changes of one W_out of any rank, as fine-tuning makes them."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from palimpsest.intervene.changes.composition import joined
from palimpsest.intervene.changes.deltas import OutDeltas, responding
from palimpsest.intervene.intervention import Intervention
from palimpsest.model.difference import Difference
from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import NOBODY


@dataclass(frozen=True, kw_only=True)
class DenseDeltas(OutDeltas):
    """ΔW itself, one for each fact if the change is independent, otherwise one (F = 1).

    Attributes:
        delta: `[F, d_model, d_mlp]` float32.
    """

    kind: ClassVar[str] = "dense_deltas"
    delta: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """`delta`."""
        return {"delta": self.delta}

    def matrix(self, fact: int) -> Tensor:
        """ΔW of one fact, `[d_model, d_mlp]` float32."""
        return self.delta[fact]

    def differences(self) -> tuple[Difference, ...]:
        """ΔW itself for the left factor, the identity for the right one."""
        facts, width, _ = self.delta.shape
        identity = torch.eye(width).expand(facts, -1, -1)
        return (Difference(self.layer, self.delta, identity, self.change.independent),)

    def plus(self, other: Intervention) -> Intervention:
        """The sum."""
        if not isinstance(other, DenseDeltas) or other.layer != self.layer:
            return super().plus(other)
        return replace(self, change=joined([self, other]), delta=self.delta + other.delta)

    def per_prompt(self, handle: ModelHandle) -> AbstractContextManager[None]:
        """`ΔW k` of each prompt's owner is added at every token."""
        return by_owner(handle, self.layer, self.delta.to(handle.device))


def by_owner(handle: ModelHandle, layer: int, delta: Tensor) -> AbstractContextManager[None]:
    """Let each prompt feel its owner's ΔW alone; gradients flow to `delta`.

    Args:
        handle: the model.
        layer: whose W_out.
        delta: `[F, d_model, d_mlp]`.
    """

    def response(key: Tensor, owner: Tensor) -> Tensor:
        change = torch.zeros(*key.shape[:2], delta.shape[1], dtype=delta.dtype, device=key.device)
        for one in owner.unique().tolist():
            if one != NOBODY:  # one owner at a time: a copy of ΔW for each prompt would be large
                change[owner == one] = key[owner == one].to(delta) @ delta[one].T
        return change

    return responding(handle, layer, response)
