"""Affine erasure of states at one site, under an explicit position policy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from palimpsest.intervene.intervention import Intervention
from palimpsest.model.calls import followed
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site


@dataclass(frozen=True, kw_only=True)
class Erasure(Intervention):
    """`r(x) = x − L R (x − b)` at the change's site, on the tokens that its policy names.

    It works in every call of the model, but where the policy or the gate asks where a prompt's
    subject is or where it ends: that our own forward passes alone can tell.

    Attributes:
        proj_left: L, `[d_model, rank]` float64.
        proj_right: R, `[rank, d_model]` float64.
        bias: b, `[d_model]` float64: the mean of the states it was fitted on.
        subjects: `[m]` what stands for the target subjects, if it acts in their prompts alone.
    """

    kind: ClassVar[str] = "erasure"
    proj_left: Tensor
    proj_right: Tensor
    bias: Tensor
    subjects: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """`proj_left`, `proj_right` and `bias`, and `subjects` if there is a gate."""
        own = {"proj_left": self.proj_left, "proj_right": self.proj_right, "bias": self.bias}
        return own if self.subjects is None else {**own, "subjects": self.subjects}

    def erase(self, states: Tensor) -> Tensor:
        """r(x) of states `[..., d_model]`, computed and returned in their own precision."""
        left, right, bias = (t.to(states) for t in (self.proj_left, self.proj_right, self.bias))
        return states - ((states - bias) @ right.T) @ left.T

    @contextmanager
    def changing(self, handle: ModelHandle) -> Iterator[None]:
        """Erase while the context lasts."""
        assert self.change.layer is not None

        def hook(states: Tensor) -> Tensor:
            chosen = handle.under_way.selects(self.change.policy)
            if self.subjects is not None:
                chosen = chosen & handle.under_way.holds(self.subjects).unsqueeze(1)
            return torch.where(chosen.unsqueeze(-1), self.erase(states), states)

        module = handle.module(Site(self.change.layer, self.change.part))
        with followed(handle), handle.hooked([(module, hook)]):
            yield
