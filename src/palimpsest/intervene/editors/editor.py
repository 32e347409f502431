"""What the editors share: protocols, context prefixes, second moments, and what a fit reports.

An editor is hyper-parameters. `begin` takes what it needs from the unchanged model and gives an
`Editing`, which edits some facts, each by itself or all together, in the model as it then stands.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.intervene.changes.composition import History, Parts
from palimpsest.intervene.editors.prefixes import Prefixes, SampledPrefixes, in_contexts
from palimpsest.intervene.editors.solving import Inverse, change_norm
from palimpsest.intervene.editors.values import Values, ValueSearch
from palimpsest.intervene.intervention import Intervention, Method
from palimpsest.intervene.method import MethodBase
from palimpsest.intervene.moments import Moments, MomentSource, SampledMoments, Second
from palimpsest.model.forward import keys
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site, check_choice
from palimpsest.model.tokens import Tokens
from palimpsest.record.row import Row

Protocol = Literal["independent", "batch", "sequential"]

E = TypeVar("E", bound=Intervention)

NOT_FINITE = "the search came to no finite loss; the fact was left as it is"
"""Cause of a fact's missing values after a search that diverged."""

OVERFLOWN = "the change came out not finite; the fact was left as it is"
"""The same after keys or residuals that were not finite."""


class Editing(ABC):
    """An editor at work on one model."""

    @abstractmethod
    def edit(self, model: ModelHandle, facts: tuple[Fact, ...], independent: bool) -> Intervention:
        """Edit facts in the model as it stands, each by itself or all by one change."""


@dataclass(frozen=True)
class Editor(MethodBase, ABC):
    """A method that writes facts into W_out.

    Attributes:
        protocol: `independent`: one change for each target fact, felt by that fact's prompts alone.
            `batch`: a single change for all. `sequential`: one fact after another, each in the
            model that carries all the edits before it, and none is undone.
    """

    protocol: str = "independent"

    def __post_init__(self) -> None:
        """Check the protocol.

        Raises:
            RequestError: an unknown one.
        """
        check_choice("intervene.protocol", self.protocol, Protocol)

    @property
    def part(self) -> str:
        """W_out."""
        return "mlp"

    @abstractmethod
    def begin(self, model: ModelHandle, site: Site) -> Editing:
        """Take what the editor needs of the unchanged model."""

    @abstractmethod
    def check(self, fact: Fact) -> None:
        """Refuse a fact that the editor's objective cannot be pursued on.

        Raises:
            RequestError: something of the fact is missing.
        """

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Intervention:
        """Edit the target facts by the protocol.

        Raises:
            RequestError: a fact cannot be written; C is singular; two facts share a key (batch).
        """
        for fact in facts.target:
            self.check(fact)
        return self.carried_out(self.begin(model, site), model, facts)

    def carried_out(self, editing: Editing, model: ModelHandle, facts: Splits) -> Intervention:
        """The target facts' edits, by the protocol."""
        if self.protocol == "sequential":
            return one_after_another(editing, model, facts.target)
        edit = editing.edit(model, facts.target, self.protocol == "independent")
        return sound(edit, facts.target)


@dataclass(frozen=True)
class ValueEditor(Editor):
    """An editor that looks for the value a fact needs, and writes it under the fact's key.

    Attributes:
        search: how the value is found.
        prefixes: where context prefixes come from.
        moments: where C comes from.
    """

    search: ValueSearch = field(default_factory=ValueSearch)
    prefixes: Any = field(default_factory=SampledPrefixes)
    moments: Any = field(default_factory=Moments)

    def check(self, fact: Fact) -> None:
        """Refuse a fact that the search's objective cannot be pursued on.

        Raises:
            RequestError: no new object though one is to be written, or no subject in the prompt.
        """
        self.search.check(fact)

    def contexts(self, model: ModelHandle) -> tuple[str, ...]:
        """The context prefixes."""
        prefixes: Prefixes = self.prefixes
        return prefixes.texts(model)

    def moment_layers(self, model: ModelHandle, site: Site) -> tuple[int, ...]:
        """The layers whose second moments it takes."""
        return (site.layer,)

    def sampled_moments(self, model: ModelHandle, site: Site) -> SampledMoments | None:
        """Those of `moments`, where it takes any and they are over sampled text."""
        layers = self.moment_layers(model, site)
        return self.moment_source.sampled(model, layers) if layers else None

    def with_moments(self, tokens: int, length: int) -> Method:
        """The same with other `moments`."""
        return replace(self, moments=self.moment_source.over(tokens, length))

    @property
    def moment_source(self) -> MomentSource:
        """`moments`, typed."""
        return self.moments  # type: ignore[no-any-return]


def one_after_another(
    editing: Editing, model: ModelHandle, facts: tuple[Fact, ...]
) -> Intervention:
    """Edit fact after fact, each in the model that carries the edits before it.

    Every edit is a change of the unchanged model once it is added to those before it: a History
    holds the sum after 1, 2, 5, 10, ... and after all edits.
    """
    total: Intervention | None = None
    kept: dict[int, Intervention] = {}
    rows: list[Row] = []
    for number, fact in enumerate(facts, 1):
        with _carrying(total, model):
            edit = sound(editing.edit(model, (fact,), independent=False), (fact,))
        rows += edit.diagnostics
        total = edit if total is None else total.plus(edit)
        if number in milestones(len(facts)):
            kept[number] = total
    last = kept[len(facts)]
    return History(
        change=last.change,
        model=model.fingerprint,
        parts=tuple(kept.values()),
        steps=tuple(kept),
        diagnostics=tuple(rows),
    )


def sound(edit: Intervention, facts: Sequence[Fact]) -> Intervention:
    """The edit without what is not finite in it: zeros instead, and its facts have failed."""
    bad = {
        place
        for tensor in edit.tensors().values()
        for place in (~tensor.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
    }
    if not bad:
        return edit
    lost = [facts[place] for place in bad] if edit.change.independent else facts
    return silenced(edit, sorted(bad), {fact.id: OVERFLOWN for fact in lost})


def silenced(edit: E, places: list[int], causes: dict[str, str]) -> E:
    """The edit with zeros at some places of every tensor, for the causes by fact id."""
    change = replace(edit.change, failed={**edit.change.failed, **causes})
    if isinstance(edit, Parts):
        parts = tuple(silenced(part, places, causes) for part in edit.parts)
        return replace(edit, change=change, parts=parts)
    index = torch.tensor(places, dtype=torch.long)
    tensors: dict[str, Any] = {n: t.index_fill(0, index, 0.0) for n, t in edit.tensors().items()}
    return replace(edit, change=change, **tensors)


def _carrying(total: Intervention | None, model: ModelHandle) -> AbstractContextManager[None]:
    return nullcontext() if total is None else total.applied(model)


def milestones(edits: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... below `edits`, and `edits` itself."""
    digits = (lead * 10**power for power in range(len(str(edits))) for lead in (1, 2, 5))
    return (*(step for step in digits if step < edits), edits)


@dataclass(frozen=True)
class Seen:
    """What W_out took and gave at facts' subjects, in the bare prompt and in each context.

    Attributes:
        key: `[F, contexts + 1, d_mlp]` float64, the bare prompt first.
        value: `[F, contexts + 1, d_model]` float64.
    """

    key: Tensor
    value: Tensor


def see(model: ModelHandle, facts: Sequence[Fact], layer: int, contexts: tuple[str, ...]) -> Seen:
    """Keys and values of the facts' subjects at W_out of a layer, in the model as it stands."""
    rows = [
        model.encode(prompt, owner=owner)
        for owner, fact in enumerate(facts)
        for prompt in in_contexts(fact, contexts)
    ]
    shape = (len(facts), len(contexts) + 1)
    key, value = keys(model, rows, layer)
    return Seen(key.double().cpu().unflatten(0, shape), value.double().cpu().unflatten(0, shape))


def first_keys(model: ModelHandle, facts: Sequence[Fact], layer: int) -> Tensor:
    """The key at position 0 of each fact's bare prompt, `[F, d_mlp]` float64."""
    encoded = [model.encode(fact.prompt, owner=owner) for owner, fact in enumerate(facts)]
    rows = [Tokens(row.ids[:1], 1, (0, 0), row.owner) for row in encoded]
    return keys(model, rows, layer)[0].double().cpu()


def surviving(facts: tuple[Fact, ...], values: Values) -> tuple[tuple[Fact, ...], Values]:
    """The facts whose search did not fail, and their values; all of them if every search failed."""
    kept = [i for i in range(len(facts)) if i not in values.failed] or list(range(len(facts)))
    some = Values(values.start[kept], values.delta[kept], values.loss[kept])
    return tuple(facts[i] for i in kept), some


def search_rows(facts: Sequence[Fact], layer: int, values: Values) -> list[Row]:
    """Per fact, the final loss and ‖v* − v₀‖."""
    norms = values.delta.norm(dim=1)
    return [
        _row(fact, layer, metric, protocol, float(value), NOT_FINITE)
        for i, fact in enumerate(facts)
        for metric, protocol, value in (
            ("value_loss", "last_step", values.loss[i]),
            ("value_norm", "l2", norms[i] if values.loss[i].isfinite() else torch.nan),
        )
    ]


def tuning_rows(groups: Sequence[Sequence[Fact]], layer: int, losses: Sequence[float]) -> list[Row]:
    """The final loss of each fact, or of the only group if it holds several."""
    rows = [
        _row(group[0], layer, "tuning_loss", "last_step", loss, NOT_FINITE)
        for group, loss in zip(groups, losses, strict=True)
    ]
    shared = any(len(group) > 1 for group in groups)
    return [replace(row, fact_id=None, relation=None) for row in rows] if shared else rows


def diverged(groups: Sequence[Sequence[Fact]], losses: Sequence[float]) -> dict[str, str]:
    """By fact id, why it could not be changed: its group came to no finite loss."""
    return {
        fact.id: NOT_FINITE
        for group, loss in zip(groups, losses, strict=True)
        if not math.isfinite(loss)
        for fact in group
    }


def sink_rows(model: ModelHandle, facts: Sequence[Fact], layer: int, left: Tensor) -> list[Row]:
    """Per fact, the multiplier that its row of `left` `[F, d_mlp]` has at position 0."""
    products = (left * first_keys(model, facts, layer)).sum(1).tolist()
    return [
        _row(fact, layer, "sink_multiplier", "position_0", product)
        for fact, product in zip(facts, products, strict=True)
    ]


def _row(
    fact: Fact, layer: int, metric: str, protocol: str, value: float, cause: str | None = None
) -> Row:
    finite = math.isfinite(value)
    return Row(
        axis="cost", scope="fact", split="target", metric=metric, protocol=protocol,
        fact_id=fact.id, relation=fact.relation, layer=layer, value=value if finite else None,
        n=int(finite), note=None if finite else cause,
    )  # fmt: skip


# -- second moments --------------------------------------------------------------------------------


class Whitener:
    """Turns keys to directions, U = K C⁻¹; without second moments C is 1."""

    def __init__(self, second: Second | None = None) -> None:
        """Refuse a C that cannot be inverted; it is factored when the first facts are there.

        Raises:
            RequestError: C over all tokens is singular.
        """
        self._second = second
        self._inverse: Inverse | None = None
        if second is not None:
            Inverse.of(second.matrix())

    def solve(self, response: Callable[[Inverse | None], Tensor]) -> tuple[Tensor, Tensor | None]:
        """What an editor makes of C⁻¹, and at the first call what it would make of half the tokens.

        At no time are two matrices of C's size in memory.
        """
        if self._second is None:
            return response(None), None
        half = None
        if self._inverse is None:
            if self._second.half is not None:
                with suppress(RequestError):  # what half of the text leaves open is no fault of all
                    half = response(Inverse.of(self._second.half()))
            self._inverse = Inverse.of(self._second.matrix())
        return response(self._inverse), half


def convergence_rows(
    facts: Sequence[Fact], layer: int, left: Tensor, half: Tensor | None, right: Tensor
) -> list[Row]:
    """How much ΔW changes between half of the tokens of C and all, ‖ΔW_half − ΔW‖ / ‖ΔW‖.

    Args:
        facts: one of each group, or those of the only group.
        layer: whose W_out.
        left: `[G, r, d_mlp]`.
        half: the same with C over half of the tokens.
        right: `[G, r, d_model]`.
    """
    if half is None:
        return []
    shares = (change_norm(half - left, right) / change_norm(left, right)).tolist()
    metric, cause = "moments_convergence", "nothing is changed"
    rows = [
        _row(fact, layer, metric, "half_of_tokens", share, cause)
        for fact, share in zip(facts, shares, strict=False)
    ]
    whole = len(shares) < len(facts)  # one change for many facts is no single fact's
    return [replace(row, fact_id=None, relation=None) for row in rows] if whole else rows
