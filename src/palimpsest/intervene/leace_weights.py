"""LEACE folded into W_out: no hook, a plain checkpoint, the matrix that ROME edits."""

from dataclasses import dataclass, replace

import torch

from palimpsest.errors import RequestError
from palimpsest.facts.splits import Splits
from palimpsest.intervene.composition import Composition, joined
from palimpsest.intervene.deltas import BiasShift, WeightDeltas
from palimpsest.intervene.erasure import Erasure
from palimpsest.intervene.intervention import Intervention
from palimpsest.intervene.leace import Leace
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site
from palimpsest.record.row import Row


@dataclass(frozen=True)
class LeaceWeights(Leace):
    """W_out' = P W_out, b' = P b + (1 − P) μ, with P = 1 − L R: at most of rank k − 1.

    Every output of the MLP is P y + (1 − P) μ, exactly what LEACE's hook gives at the site `mlp` on
    all tokens. Where W_out has no bias the shift (1 − P) μ is left out: the outputs are P y, which
    differ from the hook's by one vector for all, so that the cross-covariance is zero as well. What
    is guarded is the output of that MLP alone; attention and the residual stream carry on whatever
    they carried.
    """

    part: str = "mlp"
    policy: str = "all"

    def __post_init__(self) -> None:
        """Check that it is W_out at every token that is to be changed.

        Raises:
            RequestError: another part, policy or gate, or as of `Leace`.
        """
        super().__post_init__()
        for name, wanted in (("part", "mlp"), ("policy", "all"), ("gate", "always")):
            if getattr(self, name) != wanted:
                raise RequestError(
                    f"expected intervene.{name}={wanted} for a change of W_out, which acts on "
                    f"every token, found {getattr(self, name)!r}; take intervene=leace for others"
                )

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Intervention:
        """LEACE at the site `mlp`, folded into the weights.

        Raises:
            RequestError: as of `Leace`.
        """
        found = super().fit(model, facts, site)
        erasures = found.parts if isinstance(found, Composition) else (found,)
        parts = tuple(
            part for each in erasures if isinstance(each, Erasure) for part in folded(model, each)
        )
        rows = (*found.diagnostics, *(row for part in parts for row in part.diagnostics))
        if len(parts) == 1:
            return replace(parts[0], diagnostics=rows)
        return Composition(
            change=joined(parts), model=model.fingerprint, parts=parts, diagnostics=rows
        )


def folded(model: ModelHandle, erasure: Erasure) -> tuple[Intervention, ...]:
    """An erasure of W_out's output as a change of its weight, and of its bias if it has one."""
    change = erasure.change
    assert change.layer is not None
    left, right, mean = erasure.proj_left, erasure.proj_right, erasure.bias
    weight = model.w_out(change.layer).detach().cpu().double()
    bias = getattr(model.module(Site(change.layer, "mlp")), "bias", None)
    shift = left @ (right @ mean)
    deltas = WeightDeltas(
        change=Change("relation", False, change.layer, "mlp"),
        model=model.fingerprint,
        left=(right @ weight).float().unsqueeze(0),
        right=-left.T.float().unsqueeze(0),
        diagnostics=() if bias is not None else (_left_out(change.layer, shift, mean),),
    )
    if bias is None:
        return (deltas,)
    moved = shift - left @ (right @ bias.detach().cpu().double())
    return deltas, BiasShift(change=deltas.change, model=model.fingerprint, shift=moved.float())


def _left_out(layer: int, shift: torch.Tensor, mean: torch.Tensor) -> Row:
    """How large the shift is that a W_out without a bias cannot have."""
    return Row(
        axis="cost", scope="relation", split="fit", layer=layer, metric="shift_left_out",
        protocol="share_of_mean", value=float(shift.norm() / mean.norm()), n=1,
    )  # fmt: skip
