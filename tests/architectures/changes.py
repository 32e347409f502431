"""Changes of a tiny model's middle."""

import torch

from palimpsest.intervene.deltas import WeightDeltas
from palimpsest.intervene.erasure import Erasure
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Part, Policy
from tests.architectures.tiny import WIDTH

LAYER = 2
"""What is changed: there are layers before and after it."""


def make_deltas(handle: ModelHandle, facts: int, independent: bool) -> WeightDeltas:
    generator = torch.Generator().manual_seed(3)
    return WeightDeltas(
        change=Change("fact", independent, LAYER, "mlp"),
        model=handle.fingerprint,
        left=torch.randn(facts, 1, handle.w_out(LAYER).shape[1], generator=generator) / 8,
        right=torch.randn(facts, 1, WIDTH, generator=generator),
    )


def make_eraser(handle: ModelHandle, part: Part, policy: Policy) -> Erasure:
    generator = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(WIDTH, 3, generator=generator).double()).Q
    return Erasure(
        change=Change("relation", False, LAYER, part, policy),
        model=handle.fingerprint,
        proj_left=basis,
        proj_right=basis.T,
        bias=torch.randn(WIDTH, generator=generator).double(),
    )
