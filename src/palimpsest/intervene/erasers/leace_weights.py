"""LEACE folded into W_out: no hook, a plain checkpoint, the matrix that ROME edits."""

from dataclasses import dataclass
from typing import ClassVar

from palimpsest.intervene.changes.deltas import BiasShift, WeightDeltas
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.erasers.folding import FoldedLeace, shift_left_out
from palimpsest.intervene.intervention import Intervention
from palimpsest.model import offload
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Part, Site


@dataclass(frozen=True)
class LeaceWeights(FoldedLeace):
    """W_out' = P W_out, b' = P b + (1 − P) μ, with P = 1 − L R: at most of rank k − 1.

    Every output of the MLP is P y + (1 − P) μ, exactly what LEACE's hook gives at the site `mlp` on
    all tokens. Where W_out has no bias the shift (1 − P) μ is left out: the outputs are P y, which
    differ from the hook's by one vector for all, so that the cross-covariance is zero as well. What
    is guarded is the output of that MLP alone; attention and the residual stream carry on whatever
    they carried.
    """

    part: str = "mlp"

    sites_of: ClassVar[tuple[Part, ...]] = ("mlp",)
    weights: ClassVar[str] = "W_out"

    def fold(self, model: ModelHandle, erasure: Erasure) -> tuple[Intervention, ...]:
        """An erasure of W_out's output as a change of its weight, and of its bias if it has one."""
        layer = erasure.change.layer
        assert layer is not None
        left, right, mean = erasure.proj_left, erasure.proj_right, erasure.bias
        weight = model.w_out(layer).detach().cpu().double()
        module = model.module(Site(layer, "mlp"))
        bare = getattr(module, "bias", None) is None
        deltas = WeightDeltas(
            change=Change("relation", False, layer, "mlp", fitted_on=erasure.change.fitted_on),
            model=model.fingerprint,
            left=(right @ weight).float().unsqueeze(0),
            right=-left.T.float().unsqueeze(0),
            diagnostics=(shift_left_out(erasure),) if bare else (),
        )
        if bare:
            return (deltas,)
        bias = offload.value(module, "bias").cpu().double()
        moved = left @ (right @ mean) - left @ (right @ bias)
        return deltas, BiasShift(change=deltas.change, model=model.fingerprint, shift=moved.float())
