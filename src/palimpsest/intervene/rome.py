"""ROME, rank-one model editing (Meng et al. 2022, arXiv 2202.05262), as its public code has it."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.intervene.deltas import WeightDeltas
from palimpsest.intervene.moments import Moments, MomentSource
from palimpsest.intervene.prefixes import Prefixes, SampledPrefixes, in_contexts
from palimpsest.intervene.values import ValueSearch
from palimpsest.model.forward import keys
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site, check_choice
from palimpsest.model.tokens import Tokens
from palimpsest.record.row import Row

Variant = Literal["moments", "plain"]
Protocol = Literal["independent", "batch"]


@dataclass(frozen=True)
class Rome:
    """One association overwritten by a rank-one change of one layer's W_out.

    `variant: moments` is the public code's: with C the second moment of W_out's inputs, k̄ the mean
    key of the subject over context prefixes, k the key in the bare prompt, and u = C⁻¹k̄,
    `W' = W + (v* − W k) uᵀ / (uᵀ k)`.

    `variant: plain` leaves C and the prefixes' keys out: `W' = W + (v* − W k) kᵀ / (kᵀ k)`.

    `protocol: independent` makes one such change for each target fact. `protocol: batch` makes a
    single change that meets all the facts' equations at once, `Δ = R (Uᵀ K)⁻¹ Uᵀ`, which for one
    fact is ROME.

    Attributes:
        variant: `moments` or `plain`.
        protocol: `independent` or `batch`.
        search: how v* is found.
        prefixes: where context prefixes come from.
        moments: where C comes from.
    """

    variant: str = "moments"
    protocol: str = "independent"
    search: ValueSearch = field(default_factory=ValueSearch)
    prefixes: Any = field(default_factory=SampledPrefixes)
    moments: Any = field(default_factory=Moments)

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            RequestError: unknown variant or protocol.
        """
        check_choice("intervene.variant", self.variant, Variant)
        check_choice("intervene.protocol", self.protocol, Protocol)

    @property
    def part(self) -> str:
        """W_out."""
        return "mlp"

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> WeightDeltas:
        """Fit one delta for each target fact, or one for all.

        Raises:
            RequestError: a fact has no new object; C is singular; two facts share a key (batch).
        """
        for fact in facts.target:
            check_editable(fact)
        contexts = self._prefixes.texts(model)
        values = self.search.find(model, facts.target, site.layer, contexts)
        key, direction = self.keys(model, facts.target, site.layer, contexts)
        independent = self.protocol == "independent"
        left = (
            direction / (direction * key).sum(1, keepdim=True)
            if independent
            else _dual(direction, key)
        )
        right = values.delta.double()
        sink = (left * _first_keys(model, facts.target, site.layer)).sum(1)
        if independent:
            left, right = left.unsqueeze(1), right.unsqueeze(1)
        else:
            left, right = left.unsqueeze(0), right.unsqueeze(0)
        return WeightDeltas(
            change=Change("fact", independent, site.layer, "mlp"),
            model=model.fingerprint,
            left=left.float(),
            right=right.float(),
            diagnostics=tuple(
                _diagnostics(facts.target, site.layer, values.delta, values.loss, sink)
            ),
        )

    @property
    def _prefixes(self) -> Prefixes:
        return self.prefixes  # type: ignore[no-any-return]

    @property
    def _moments(self) -> MomentSource:
        return self.moments  # type: ignore[no-any-return]

    def keys(
        self, model: ModelHandle, facts: tuple[Fact, ...], layer: int, contexts: tuple[str, ...]
    ) -> tuple[Tensor, Tensor]:
        """Bare keys k and directions u of the facts' subjects, both `[F, d_mlp]` float64."""
        rows = [model.encode(p) for fact in facts for p in in_contexts(fact, contexts)]
        found = keys(model, rows, layer)[0].double().cpu()
        by_fact = found.view(len(facts), len(contexts) + 1, -1)
        bare = by_fact[:, 0]
        if self.variant == "plain":
            return bare, bare
        return bare, solve(self._moments.matrix(model, layer), by_fact.mean(1))


def _first_keys(model: ModelHandle, facts: tuple[Fact, ...], layer: int) -> Tensor:
    """The key at position 0 of each fact's bare prompt, `[F, d_mlp]` float64."""
    rows = [Tokens(model.encode(fact.prompt).ids[:1], 1, (0, 0)) for fact in facts]
    return keys(model, rows, layer)[0].double().cpu()


def check_editable(fact: Fact) -> None:
    """Refuse a fact that cannot be edited.

    Raises:
        RequestError: no new object, or a fit prompt without its subject.
    """
    if not fact.new or fact.prompt.span is None:
        missing = "new object" if not fact.new else "subject in its prompt"
        raise RequestError(
            f"expected a new object and a subject in the prompt of every target fact, found fact "
            f"{fact.id} without a {missing}; mend the facts file"
        )


def solve(moments: Tensor, rows: Tensor) -> Tensor:
    """C⁻¹ applied to each row, by Cholesky.

    Args:
        moments: C `[d, d]` float64.
        rows: `[F, d]` float64.

    Raises:
        RequestError: C is singular.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(moments)
    width = moments.shape[0]
    # Rounding may leave a pivot that should be zero a little above it.
    pivots = factor.diagonal().square() / moments.diagonal()
    if int(info) != 0 or not pivots.min() > width * torch.finfo(pivots.dtype).eps:
        raise RequestError(
            f"expected second moments of full rank {width}, found a singular matrix; raise "
            f"intervene.moments.tokens to at least {10 * width} (ten tokens a dimension), or take "
            "intervene.variant=plain where units are dead on any text"
        )
    return torch.cholesky_solve(rows.T, factor).T


def _dual(direction: Tensor, key: Tensor) -> Tensor:
    """Rows L with L K = 1: `(U Kᵀ)⁻¹ U` for directions and keys `[F, d_mlp]`.

    Raises:
        RequestError: the keys are linearly dependent.
    """
    gram = direction @ key.T
    condition = float(torch.linalg.cond(gram))
    if not condition < 1e12:
        raise RequestError(
            f"expected facts whose keys are linearly independent, found a condition number of "
            f"{condition:.1e} over {len(key)} facts; drop facts that share a subject and all that "
            "comes before it"
        )
    dual: Tensor = torch.linalg.solve(gram, direction)
    return dual


def _diagnostics(
    facts: tuple[Fact, ...], layer: int, delta: Tensor, loss: Tensor, sink: Tensor
) -> list[Row]:
    """Per fact: the final loss, ‖v* − v₀‖ and the multiplier that the delta has at position 0."""
    return [
        Row(
            axis="cost", scope="fact", split="target", metric=metric, protocol=protocol,
            fact_id=fact.id, relation=fact.relation, layer=layer, value=float(value),
        )
        for i, fact in enumerate(facts)
        for metric, protocol, value in (
            ("value_loss", "last_step", loss[i]),
            ("value_norm", "l2", delta[i].norm()),
            ("sink_multiplier", "position_0", sink[i]),
        )
    ]  # fmt: skip
