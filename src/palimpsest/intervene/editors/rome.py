"""ROME, rank-one model editing (Meng et al. 2022, arXiv 2202.05262), as its public code has it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from palimpsest.facts.fact import Fact
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.editors.editor import (
    Editing,
    Seen,
    ValueEditor,
    Whitener,
    convergence_rows,
    diverged,
    search_rows,
    see,
    sink_rows,
    surviving,
)
from palimpsest.intervene.editors.solving import Inverse, dual, unit_response
from palimpsest.intervene.editors.values import Values
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site, check_choice

Variant = Literal["moments", "plain"]


@dataclass(frozen=True)
class Rome(ValueEditor):
    """One association overwritten by a rank-one change of one layer's W_out.

    `variant: moments` is the public code's: with C the second moment of W_out's inputs, k̄ the mean
    key of the subject over context prefixes, k the key in the bare prompt, and u = C⁻¹k̄,
    `W' = W + (v* − W k) uᵀ / (uᵀ k)`.

    `variant: plain` leaves C and the prefixes' keys out: `W' = W + (v* − W k) kᵀ / (kᵀ k)`.

    `protocol: batch` meets all the facts' equations at once, `Δ = R (Uᵀ K)⁻¹ Uᵀ`, which for one
    fact is ROME. `protocol: sequential` takes C and the prefixes from the unchanged model, v* and
    the keys from the model as it stands.

    Attributes:
        variant: `moments` or `plain`.
    """

    variant: str = "moments"

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            RequestError: unknown variant or protocol.
        """
        super().__post_init__()
        check_choice("intervene.variant", self.variant, Variant)

    def moment_layers(self, model: ModelHandle, site: Site) -> tuple[int, ...]:
        """The site's; none if `plain`."""
        return (site.layer,) if self.variant == "moments" else ()

    def begin(self, model: ModelHandle, site: Site) -> "_Rome":
        """Factor C, sample the prefixes.

        Raises:
            RequestError: C is singular.
        """
        whitener = Whitener()
        if self.variant == "moments":
            whitener = Whitener(self.moment_source.several(model, [site.layer])[site.layer])
        return _Rome(self, site.layer, self.contexts(model), whitener)

    def equation(self, seen: Seen, values: Values) -> tuple[Tensor, Tensor]:
        """The keys `[F, d_mlp]`, and what is added to their values `[F, d_model]`: k and v* − W k.

        v* = v₀ + δ and v₀ = W k, so that is δ.
        """
        return seen.key[:, 0], values.delta.double().clone()


@dataclass(frozen=True)
class _Rome(Editing):
    """ROME at work.

    Attributes:
        method: its hyper-parameters.
        layer: whose W_out.
        contexts: the prefixes.
        whitener: C⁻¹.
    """

    method: Rome
    layer: int
    contexts: tuple[str, ...]
    whitener: Whitener

    def edit(self, model: ModelHandle, facts: tuple[Fact, ...], independent: bool) -> WeightDeltas:
        """One change for each fact, or one for all."""
        site = Site(self.layer, "mlp")
        values = self.method.search.find(model, facts, site, self.contexts)
        rows = search_rows(facts, self.layer, values)
        failed = diverged([[fact] for fact in facts], values.loss.tolist())
        if not independent:
            facts, values = surviving(facts, values)
        seen = see(model, facts, self.layer, self.contexts)
        key, right = self.method.equation(seen, values)
        right[values.failed] = 0.0
        change = Change("fact", independent, self.layer, "mlp", failed=failed)
        edit = written(model, facts, change, seen, key, right, self.whitener)
        return replace(edit, diagnostics=(*rows, *edit.diagnostics))


def written(
    model: ModelHandle,
    facts: Sequence[Fact],
    change: Change,
    seen: Seen,
    key: Tensor,
    right: Tensor,
    whitener: Whitener,
) -> WeightDeltas:
    """What adds `right` under `key`: `right uᵀ / (uᵀ k)`, or `R (Uᵀ K)⁻¹ Uᵀ` for all facts at once.

    Args:
        model: the model.
        facts: whose it is.
        change: where, and whether each fact has its own.
        seen: the keys that the mean k̄ is taken of, u = C⁻¹ k̄.
        key: k `[F, d_mlp]` float64.
        right: `[F, d_model]` float64.
        whitener: C⁻¹; without C, u = k.
    """
    assert change.layer is not None
    group = 1 if change.independent else 0

    def response(inverse: Inverse | None) -> Tensor:
        direction = key if inverse is None else inverse.apply(seen.key.mean(1))
        found = unit_response(direction, key) if change.independent else dual(direction, key)
        return found.unsqueeze(group)

    left, half = whitener.solve(response)
    right = right.unsqueeze(group)
    return WeightDeltas(
        change=change,
        model=model.fingerprint,
        left=left.float(),
        right=right.float(),
        diagnostics=(
            *sink_rows(model, facts, change.layer, left.squeeze(group)),
            *convergence_rows(facts, change.layer, left, half, right),
        ),
    )
