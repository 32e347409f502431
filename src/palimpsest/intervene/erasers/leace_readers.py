"""LEACE at a norm's output, folded into every matrix that reads it: no hook, a plain checkpoint."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from palimpsest.intervene.changes.deltas import ReaderDeltas
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.erasers.eraser import Around, Concept, cross_covariance, nothing_to_erase
from palimpsest.intervene.erasers.folding import FoldedLeace, shift_left_out
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import NORMS, Change, Part, Site
from palimpsest.record.row import Row


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

    def at(self, around: Around, concept: Concept, states: Tensor, held_out: Tensor) -> Erasure:
        """The erasure of one site, with what its weights, rounded as they are, leave readable."""
        erasure = super().at(around, concept, states, held_out)
        left = None
        why = nothing_to_erase(states, concept.labels, around.model.model.dtype)
        if why is None:
            [folded] = self.fold(around.model, erasure)
            left = read_through(around.model, folded, cross_covariance(states, concept.labels))
        row = Row(
            axis="cost", scope="relation", relation=concept.facts[0].relation, split="fit",
            layer=around.site.layer, metric="residual_cross_covariance", protocol="as_read",
            value=left, n=0 if left is None else len(states), note=why,
        )  # fmt: skip
        return replace(erasure, diagnostics=(*erasure.diagnostics, row))

    def fold(self, model: ModelHandle, erasure: Erasure) -> tuple[ReaderDeltas]:
        """An erasure of a norm's output as a change of its readers' weights and biases."""
        layer, part = erasure.change.layer, erasure.change.part
        assert layer is not None
        readers = model.readers(Site(layer, part))
        read = [weight.cpu().double() @ erasure.proj_left for weight, _ in readers]
        biased = [bias is not None for _, bias in readers]
        shift = erasure.proj_right @ erasure.bias
        moved = [each @ shift for each, has in zip(read, biased, strict=True) if has]
        deltas = ReaderDeltas(
            change=Change("relation", False, layer, part, fitted_on=erasure.change.fitted_on),
            model=model.fingerprint,
            left=-torch.cat(read),
            right=erasure.proj_right,
            shift=torch.cat(moved) if moved else shift.new_empty(0),
            diagnostics=() if all(biased) else (shift_left_out(erasure),),
        )
        return (deltas,)


def read_through(model: ModelHandle, folded: ReaderDeltas, cross: Tensor) -> float:
    """‖Cov(W_in' x, z)‖ / ‖Cov(W_in x, z)‖ over all readers, their weights as the model holds them.

    Args:
        model: the model as it stood at the fit.
        folded: the change of the readers.
        cross: Cov(x, z) `[d_model, k]` float64.
    """

    def norm() -> float:
        readers = model.readers(folded.site)
        return float(torch.cat([weight.cpu().double() @ cross for weight, _ in readers]).norm())

    before = norm()
    with folded.applied(model):
        return norm() / before
