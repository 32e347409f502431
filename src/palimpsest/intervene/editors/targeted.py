"""An edit that sets what tells objects apart to the new object's, and writes the new object."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.errors import RequestError, check_at_least, check_number
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.intervene.changes.composition import Composition, joined
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.editors.editor import (
    Editing,
    ValueEditor,
    Whitener,
    diverged,
    search_rows,
    see,
    silenced,
)
from palimpsest.intervene.editors.rome import written
from palimpsest.intervene.editors.spread import state
from palimpsest.intervene.editors.values import Hold, Values
from palimpsest.intervene.erasers.eraser import Affine, concept, orthonormal, states_of
from palimpsest.intervene.erasers.leace import erased, fit_leace
from palimpsest.intervene.intervention import Intervention
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site

TOLERANCE = 1e-9
"""Singular values of R below this share of the largest are none."""


@dataclass(frozen=True)
class Coordinates:
    """What tells a relation's objects apart at one layer, at the subject's last token.

    Attributes:
        affine: LEACE's map there, fitted on the relation's fit facts.
        means: by object, its mean state `[d_model]` float64.
    """

    affine: Affine
    means: Mapping[str, Tensor]

    def moved(self, states: Tensor, wanted: Sequence[str | None]) -> Tensor:
        """What has to be added to states `[n, d_model]` so that they have the wanted coordinates.

        L R (μ − h), μ being the mean state of the wanted object, or of all facts for None or for an
        object that no fit fact has: then r(h + it) = r(h) and R (h + it) = R μ.
        """
        a = self.affine
        aims = torch.stack([self.means.get(name or "", a.bias) for name in wanted])
        return ((aims - states) @ a.right.T) @ a.left.T


@dataclass(frozen=True)
class Targeted(ValueEditor):
    """A rank-one change at each of a few layers, which cancels the old object and writes the new.

    At layer l let r(x) = x − L R (x − b) be LEACE of *which object* on the relation's fit facts, at
    the subject's last token, μ_o the mean state of those with the object o, and h the state of the
    edited subject. Adding L R (μ_new − h) leaves r(h) as it is, and gives the state the coordinates
    R h of an average subject of the new object: a reader that sees objects only by what LEACE takes
    out finds the new one. At the located layer ROME's search adds to that a vector δ' with R δ' = 0
    which makes the new object likely. The coordinates are set at layers below too, before later
    tokens have read the old object off the subject, and above, where blocks derive it again; each
    time in the model that carries the changes below. Every vector is written into W_out under the
    subject's key as ROME writes v* − W k.

    Probes of the evaluation are trained on other subjects than those that this is fitted on. With
    the objective `erase` the coordinates become those of the mean of all facts, and δ' makes the
    true object unlikely. Derived here; LEACE is arXiv 2306.03819, ROME arXiv 2202.05262.

    Attributes:
        below: changed layers below the located one, if there are so many.
        above: changed layers above it.
        stride: blocks from one to the next.
        svd_tol: of LEACE.
    """

    below: int = 2
    above: int = 2
    stride: int = 2
    svd_tol: float = 1e-6

    def __post_init__(self) -> None:
        """Check the numbers and the objective too.

        Raises:
            RequestError: a number below its least, another objective than `inject` or `erase`, or
                as of other editors.
        """
        super().__post_init__()
        check_at_least("intervene.below", self.below, 0)
        check_at_least("intervene.above", self.above, 0)
        check_at_least("intervene.stride", self.stride, 1)
        check_number("intervene.svd_tol", self.svd_tol, above=0)
        if self.search.objective not in ("inject", "erase"):
            raise RequestError(
                "expected objective inject or erase for a targeted edit, which cancels the old "
                f"object, found {self.search.objective!r}; set objective=inject or erase"
            )

    def layers(self, model: ModelHandle, site: Site) -> tuple[int, ...]:
        """The changed layers, from below; those that the model lacks are left out."""
        steps = range(-self.below, self.above + 1)
        layers = (site.layer + self.stride * step for step in steps)
        return tuple(layer for layer in layers if 0 <= layer < model.n_layers)

    def moment_layers(self, model: ModelHandle, site: Site) -> tuple[int, ...]:
        """All changed ones."""
        return self.layers(model, site)

    def begin(self, model: ModelHandle, site: Site) -> "_Targeted":
        """Factor C of every layer, sample the prefixes.

        Raises:
            RequestError: C is singular.
        """
        layers = self.layers(model, site)
        second = self.moment_source.several(model, layers)
        whiteners = {layer: Whitener(second[layer]) for layer in layers}
        return _Targeted(self, site.layer, layers, self.contexts(model), whiteners, {})

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Intervention:
        """Learn each relation's coordinates on its fit facts, then edit by the protocol.

        Raises:
            RequestError: a relation without fit facts of two objects, or as of other editors.
        """
        for fact in facts.target:
            self.check(fact)
        editing = self.begin(model, site)
        for relation in sorted({fact.relation for fact in facts.target}):
            sample = [fact for fact in facts.fit if fact.relation == relation]
            found = self.coordinates(model, sample, editing.layers)
            editing.coordinates.update({(relation, layer): each for layer, each in found.items()})
        return self.carried_out(editing, model, facts)

    def coordinates(
        self, model: ModelHandle, sample: Sequence[Fact], layers: Sequence[int]
    ) -> dict[int, Coordinates]:
        """One relation's coordinates, by layer.

        Raises:
            RequestError: fewer than two objects, or too many.
        """
        known = concept(sample, model.width)
        sites = [Site(layer) for layer in layers]
        found = {}
        for site, states in zip(
            sites, states_of(model, known.facts, sites, "last_subject"), strict=True
        ):
            affine = erased(fit_leace(states, known.labels, self.svd_tol), states, known.labels)
            means = known.labels.T @ states / known.labels.sum(0)[:, None]
            found[site.layer] = Coordinates(affine, dict(zip(known.classes, means, strict=True)))
        return found


@dataclass(frozen=True)
class _Targeted(Editing):
    """At work.

    Attributes:
        method: its hyper-parameters.
        located: where the new object is written.
        layers: changed, from below.
        contexts: the prefixes.
        whiteners: C⁻¹ by layer.
        coordinates: by relation and layer.
    """

    method: Targeted
    located: int
    layers: tuple[int, ...]
    contexts: tuple[str, ...]
    whiteners: Mapping[int, Whitener]
    coordinates: dict[tuple[str, int], Coordinates]

    def edit(self, model: ModelHandle, facts: tuple[Fact, ...], independent: bool) -> Composition:
        """One change for each fact, or one for all."""
        parts: list[WeightDeltas] = []
        with ExitStack() as carried:
            for layer in self.layers:
                if layer == self.located:
                    values = self.values(model, facts)
                    right = values.delta.double()
                else:
                    right = self.moved(model, facts, layer)
                part = self.written(model, facts, layer, right, independent)
                carried.enter_context(part.applied(model))
                parts.append(part)
        rows = search_rows(facts, self.located, values)
        edit = Composition(
            change=joined(parts),
            model=model.fingerprint,
            parts=tuple(parts),
            diagnostics=(*rows, *(row for part in parts for row in part.diagnostics)),
        )
        return self.without(model, facts, edit, values, independent)

    def without(
        self,
        model: ModelHandle,
        facts: tuple[Fact, ...],
        edit: Composition,
        values: Values,
        independent: bool,
    ) -> Composition:
        """The edit without facts whose search failed: nothing is changed for them anywhere."""
        if not values.failed:
            return edit
        failed = diverged([[fact] for fact in facts], values.loss.tolist())
        rest = tuple(fact for fact in facts if fact.id not in failed)
        if independent or not rest:
            return silenced(edit, values.failed if independent else [0], failed)
        edit = self.edit(model, rest, independent)
        return silenced(edit, [], failed)

    def written(
        self,
        model: ModelHandle,
        facts: Sequence[Fact],
        layer: int,
        right: Tensor,
        independent: bool,
    ) -> WeightDeltas:
        """`right` `[F, d_model]` added under the subjects' keys."""
        seen = see(model, facts, layer, self.contexts)
        change = Change("fact", independent, layer, "mlp")
        return written(model, facts, change, seen, seen.key[:, 0], right, self.whiteners[layer])

    def values(self, model: ModelHandle, facts: Sequence[Fact]) -> Values:
        """The search at the located layer, which leaves each fact's coordinates alone."""
        site = Site(self.located)
        bases = {
            relation: orthonormal(each.affine.right.T, TOLERANCE).float()
            for (relation, at), each in self.coordinates.items()
            if at == self.located
        }
        moved = self.moved(model, facts, self.located).float()
        holds = [Hold(m, bases[fact.relation]) for m, fact in zip(moved, facts, strict=True)]
        return self.method.search.find(model, facts, site, self.contexts, holds)

    def moved(self, model: ModelHandle, facts: Sequence[Fact], layer: int) -> Tensor:
        """What sets the facts' coordinates in the model as it stands, `[F, d_model]`."""
        states = state(model, facts, Site(layer)).cpu()
        erase = self.method.search.objective == "erase"
        return torch.cat(
            [
                self.coordinates[fact.relation, layer].moved(each, [None if erase else fact.new])
                for fact, each in zip(facts, states.split(1), strict=True)
            ]
        )
