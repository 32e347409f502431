"""LEACE at a norm's output, folded into every matrix that reads it: no hook, a plain checkpoint."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from palimpsest.intervene.deltas import ReaderDeltas
from palimpsest.intervene.erasure import Erasure
from palimpsest.intervene.folding import FoldedLeace, shift_left_out
from palimpsest.intervene.intervention import Intervention
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import NORMS, Change, Part, Site


@dataclass(frozen=True)
class LeaceReaders(FoldedLeace):
    """W_in' = W_in P, b' = b + W_in (1 − P) μ for each reader, P = 1 − L R: at most of rank k − 1.

    Every reader then gives W_in (P x + (1 − P) μ) + b for the norm's output x, exactly what it
    gives under LEACE's hook at `attention_norm` or `mlp_norm` on all tokens. Where a reader has no
    bias the shift is left out: it reads P x, which differs from the hook's by one vector for all,
    so that the cross-covariance is zero as well. What is guarded is what the readers of this one
    norm read; the residual stream, other layers' readers, the last norm and the head carry on
    whatever they carried.
    """

    part: str = "mlp_norm"

    sites_of: ClassVar[tuple[Part, ...]] = NORMS
    weights: ClassVar[str] = "what reads a norm"

    def fold(self, model: ModelHandle, erasure: Erasure) -> tuple[Intervention, ...]:
        """An erasure of a norm's output as a change of its readers' weights and biases."""
        layer, part = erasure.change.layer, erasure.change.part
        assert layer is not None
        readers = model.readers(Site(layer, part))
        read = [weight.cpu().double() @ erasure.proj_left for weight, _ in readers]
        biased = [bias is not None for _, bias in readers]
        shift = erasure.proj_right @ erasure.bias
        moved = [each @ shift for each, has in zip(read, biased, strict=True) if has]
        deltas = ReaderDeltas(
            change=Change("relation", False, layer, part),
            model=model.fingerprint,
            left=-torch.cat(read),
            right=erasure.proj_right,
            shift=torch.cat(moved) if moved else shift.new_empty(0),
            diagnostics=() if all(biased) else (shift_left_out(erasure),),
        )
        return (deltas,)
