"""What MEMIT and its descendants share: a residual, spread over the W_out of several layers."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from palimpsest.errors import RequestError, check_at_least
from palimpsest.facts.fact import Fact
from palimpsest.intervene.changes.composition import Composition, joined
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
from palimpsest.intervene.editors.prefixes import SampledPrefixes
from palimpsest.intervene.editors.solving import Inverse, ridge
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.model.forward import features
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site
from palimpsest.record.row import Row


@dataclass(frozen=True)
class Spread(ValueEditor):
    """z is a state of the residual stream after the last edited layer.

    Going up the layers, each W_out writes an equal share of what is then still missing:
    `R = (z − h) / (layers left)`, h being the state in the model that carries the changes so far
    (Meng et al. 2022b, arXiv 2210.07229, equations 19 and 20).

    Attributes:
        span: how many layers are changed; the last is the located one.
        search: how z is found.
        prefixes: where context prefixes come from.
    """

    span: int = 5
    search: ValueSearch = field(default_factory=lambda: ValueSearch(clamp=0.75))
    prefixes: Any = field(default_factory=lambda: SampledPrefixes(lengths=[10]))

    def __post_init__(self) -> None:
        """Check protocol and span.

        Raises:
            RequestError: an unknown protocol, or no layer.
        """
        super().__post_init__()
        check_at_least("intervene.span", self.span, 1)

    @property
    def place(self) -> str:
        """The table of layers that it goes by: the last of a span."""
        return "span" if self.span > 1 else "mlp"

    @property
    def lowest(self) -> int:
        """The lowest layer that a span can end at."""
        return self.span - 1

    def layers(self, site: Site) -> tuple[int, ...]:
        """The changed layers, from below.

        Raises:
            RequestError: there are fewer layers up to the site.
        """
        if site.layer - self.span < -1:
            raise RequestError(
                f"expected at least {self.span} layers up to layer {site.layer}, found "
                f"{site.layer + 1}; raise locate.layer or lower intervene.span"
            )
        return tuple(range(site.layer - self.span + 1, site.layer + 1))

    def moment_layers(self, model: ModelHandle, site: Site) -> tuple[int, ...]:
        """All changed ones."""
        return self.layers(site)

    @abstractmethod
    def penalty(self, edits: int) -> float:
        """What is added to the diagonal of KᵀC⁻¹K for a group of so many edits."""

    def begin(self, model: ModelHandle, site: Site) -> "Written":
        """Factor C of every layer, sample the prefixes.

        Raises:
            RequestError: too few layers, or C is singular.
        """
        layers = self.layers(site)
        second = self.moment_source.several(model, layers)
        whiteners = {layer: Whitener(second[layer]) for layer in layers}
        return _Whitened(self, layers, self.contexts(model), whiteners)


@dataclass(frozen=True)
class Written(Editing):
    """An editor that writes residuals, at work.

    Attributes:
        method: its hyper-parameters.
        layers: changed, from below.
        contexts: the prefixes.
    """

    method: Spread
    layers: tuple[int, ...]
    contexts: tuple[str, ...]

    @abstractmethod
    def left(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """ΔW's row factors of each group, and what they would be with half of C's tokens.

        Args:
            layer: whose W_out.
            key: `[G, n, d_mlp]` float64.
        """

    def edit(self, model: ModelHandle, facts: tuple[Fact, ...], independent: bool) -> Composition:
        """One change for each fact, or one for all."""
        site = Site(self.layers[-1], "residual")
        values = self.method.search.find(model, facts, site, self.contexts)
        failed = diverged([[fact] for fact in facts], values.loss.tolist())
        rows: list[Row] = search_rows(facts, site.layer, values)
        if not independent:
            facts, values = surviving(facts, values)
        wanted = values.start.double() + values.delta.double()
        parts: list[WeightDeltas] = []
        with ExitStack() as carried:
            for number, layer in enumerate(self.layers):
                residual = (wanted - state(model, facts, site)) / (len(self.layers) - number)
                residual[values.failed] = 0.0
                key = mean_key(see(model, facts, layer, self.contexts))
                group = 1 if independent else 0
                right = residual.unsqueeze(group)
                left, half = self.left(layer, key.unsqueeze(group))
                part = WeightDeltas(
                    change=Change("fact", independent, layer, "mlp", failed=failed),
                    model=model.fingerprint,
                    left=left.float(),
                    right=right.float(),
                )
                rows += sink_rows(model, facts, layer, left.squeeze(group))
                rows += convergence_rows(facts, layer, left, half, right)
                carried.enter_context(part.applied(model))
                parts.append(part)
        return Composition(
            change=joined(parts),
            model=model.fingerprint,
            parts=tuple(parts),
            diagnostics=tuple(rows),
        )


@dataclass(frozen=True)
class _Whitened(Written):
    """At work with C⁻¹.

    Attributes:
        whiteners: C⁻¹ by layer.
    """

    whiteners: Mapping[int, Whitener]

    def left(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """`(Kᵀ C⁻¹ K + penalty 1)⁻¹ Kᵀ C⁻¹` of each group."""
        penalty = self.method.penalty(key.shape[1])

        def response(inverse: Inverse | None) -> Tensor:
            flat = key.flatten(0, 1)
            direction = flat if inverse is None else inverse.apply(flat)
            return ridge(direction.view_as(key), key, penalty)

        return self.whiteners[layer].solve(response)


def mean_key(seen: Seen) -> Tensor:
    """MEMIT's key, `[F, d_mlp]`: the mean of the bare prompt's and of the contexts' mean."""
    if seen.key.shape[1] == 1:
        return seen.key[:, 0]
    return (seen.key[:, 0] + seen.key[:, 1:].mean(1)) / 2


@torch.no_grad()
def state(model: ModelHandle, facts: Sequence[Fact], site: Site) -> Tensor:
    """H `[F, d_model]` float64 at the subjects in the bare prompts, in the model as it stands."""
    rows = [model.encode(fact.prompt, owner=owner) for owner, fact in enumerate(facts)]
    return features(model, rows, [site], ["last_subject"])[0, 0].double()
