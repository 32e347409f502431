"""Changes of a tiny model's middle."""

import torch

from palimpsest.intervene.changes.deltas import ReaderDeltas, WeightDeltas
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Part, Policy, Site
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


def make_folded(handle: ModelHandle, eraser: Erasure) -> ReaderDeltas:
    """An eraser at a norm's output in its readers' weights, and in the biases that they have."""
    layer, part = eraser.change.layer, eraser.change.part
    assert layer is not None
    readers = handle.readers(Site(layer, part))
    left, shift = eraser.proj_left, eraser.proj_left @ (eraser.proj_right @ eraser.bias)
    moved = [weight.double() @ shift for weight, bias in readers if bias is not None]
    return ReaderDeltas(
        change=Change("relation", False, layer, part),
        model=handle.fingerprint,
        left=torch.cat([-weight.double() @ left for weight, _ in readers]),
        right=eraser.proj_right,
        shift=torch.cat(moved) if moved else shift[:0],
    )
