"""What the erasers share: the concept, the sites, the gate, and what a fit reports.

The concept is the one-hot true object of a relation; the states are those of the fit subjects at
one token of the relation's prompt. Every eraser is an affine map r(x) = x − L R (x − b), fitted in
float64.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from palimpsest.cache import cached_tensors
from palimpsest.errors import RequestError, check_at_least, check_seed
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.intervene.changes.composition import Composition, joined
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.intervention import Intervention
from palimpsest.intervene.method import MethodBase
from palimpsest.model.forward import features
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Part, Policy, Position, Site, check_choice
from palimpsest.model.tokens import NOBODY, subject_key
from palimpsest.record.row import Row

FitOn = Literal["target+fit", "fit"]
Gate = Literal["always", "subjects"]
Rare = Literal["keep", "drop", "merge"]

REST = "(rare objects)"
"""The class that rare objects are merged into."""

SAME = "the states of all fitted facts are the same here"
"""Why nothing is erased: in front of the first attention, where all prompts end in one token."""

GONE = "the states of the fitted facts do not covary with their objects here"
"""Why nothing is erased: an eraser before has done so."""


@dataclass(frozen=True)
class Affine:
    """r(x) = x − L R (x − b), in float64.

    Attributes:
        left: L `[d_model, rank]`.
        right: R `[rank, d_model]`.
        bias: b `[d_model]`, the mean of the states.
    """

    left: Tensor
    right: Tensor
    bias: Tensor

    def of(self, states: Tensor) -> Tensor:
        """R of states `[n, d_model]`."""
        return states - ((states - self.bias) @ self.right.T) @ self.left.T


@dataclass(frozen=True)
class Concept:
    """Facts of one relation and their objects.

    Attributes:
        facts: to be fitted on.
        classes: the objects that are told apart, sorted.
        labels: `[facts, classes]` float64 zeros and ones.
        dropped: facts left out, their object being rare.
        merged: facts whose object is rare and counts as one with the other rare ones.
    """

    facts: tuple[Fact, ...]
    classes: tuple[str, ...]
    labels: Tensor
    dropped: int = 0
    merged: int = 0


@dataclass(frozen=True)
class Eraser(MethodBase, ABC):
    """*Which object* of a relation, made harder to read at one site or at several.

    Attributes:
        part: `residual` (a block's output), `mlp` or `attention` (what they add), `mlp_norm` or
            `attention_norm` (what they read).
        position: the token whose states are fitted on.
        policy: the tokens that are erased.
        fit_on: `fit`; or `target+fit`, after which nothing is told of what can be read of the
            target facts.
        layers: several; None for the located one.
        all_layers: every layer.
        gate: `always`, or only in prompts that hold one of the target `subjects`, which no deployed
            eraser would know.
        rare: objects of fewer than `least` fit subjects are kept, dropped or merged into one.
        least: fit subjects that an object needs not to be rare.
        shuffled: permute the labels: a control.
        seed: of all that is drawn.
    """

    part: str = "residual"
    position: str = "last_prompt"
    policy: str = "all_but_sink"
    fit_on: str = "fit"
    layers: list[int] | None = None
    all_layers: bool = False
    gate: str = "always"
    rare: str = "keep"
    least: int = 2
    shuffled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the choices and the numbers.

        Raises:
            RequestError: unknown part, position, policy, fit sample, gate or treatment of rare
                objects; no layer; a seed out of range.
        """
        check_seed("intervene.seed", self.seed)
        check_at_least("intervene.least", self.least, 1)
        for name, choices in (
            ("part", Part),
            ("position", Position),
            ("policy", Policy),
            ("fit_on", FitOn),
            ("gate", Gate),
            ("rare", Rare),
        ):
            check_choice(f"intervene.{name}", getattr(self, name), choices)
        if self.layers is not None and (self.all_layers or not self.layers):
            raise RequestError(
                f"expected layers in intervene.layers or intervene.all_layers=true, found "
                f"{self.layers} and {str(self.all_layers).lower()}; set intervene.layers=null for "
                "the located layer"
            )

    @property
    def scope(self) -> str:
        """It is fitted on the facts of a relation, not on single ones."""
        return "relation"

    @property
    def in_turn(self) -> bool:
        """Whether each layer is fitted on states that the layers below have already erased."""
        return False

    @abstractmethod
    def map(self, states: Tensor, labels: Tensor, around: "Around") -> Affine:
        """The map of one site.

        Args:
            states: `[n, d_model]` float64, of the unchanged model, or of one erased below.
            labels: `[n, k]` float64, one-hot.
            around: the model and the site, for what else the map needs.
        """

    def beside(self, affine: Affine, around: "Around") -> Iterable[Row]:
        """What an eraser reports of a site besides what all do."""
        return ()

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Intervention:
        """Fit an erasure at every layer.

        Raises:
            RequestError: several relations, fewer than two classes, too many for the width or the
                subjects, no such layer, none at which the facts' states differ, states that are not
                finite, or tokens that the prompts do not have.
        """
        concept = self.concept(facts, model.width)
        self.check_tokens(concept.facts, facts.target)
        sites = self.sites(model, site)
        groups = [[each] for each in sites] if self.in_turn else [sites]
        owners = {fact.id: owner for owner, fact in enumerate(facts.target)}
        parts: list[Erasure] = []
        with ExitStack() as stack:
            for group in groups:
                sample = states_of(model, concept.facts, group, self.position, owners)
                fresh = states_of(model, facts.test, group, self.position)
                for each, states, held_out in zip(group, sample, fresh, strict=True):
                    around = Around(model, each, facts)
                    parts.append(self.at(around, concept, states, held_out))
                if self.in_turn:
                    stack.enter_context(parts[-1].applied(model))
        _check_something(parts)
        if len(parts) == 1:
            return parts[0]
        return Composition(
            change=joined(parts),
            model=model.fingerprint,
            parts=tuple(parts),
            diagnostics=tuple(row for part in parts for row in part.diagnostics),
        )

    def check_tokens(self, sample: Sequence[Fact], target: Sequence[Fact]) -> None:
        """Refuse a position or a policy that names no token of the prompts.

        Raises:
            RequestError: a fit prompt without its subject, or no target prompt with one.
        """
        bare = [fact.id for fact in sample if fact.prompt.span is None]
        if self.position == "last_subject" and bare:
            raise RequestError(
                "expected a subject in the prompt of every fact that an eraser is fitted on at "
                f"last_subject, found {len(bare)} without (first: {bare[0]}); set "
                "intervene.position=last_prompt or mend the facts"
            )
        if self.policy == "last_subject" and all(fact.prompt.span is None for fact in target):
            raise RequestError(
                "expected target facts with a subject in their prompt for intervene.policy="
                "last_subject, found none: it would erase nothing; choose another policy"
            )

    def at(self, around: "Around", concept: Concept, states: Tensor, held_out: Tensor) -> Erasure:
        """The erasure of one site; of states that are all the same, or tell nothing, none.

        Args:
            around: the site.
            concept: the fitted facts.
            states: theirs, `[n, d_model]` float64.
            held_out: the test facts', `[m, d_model]` float64.

        Raises:
            RequestError: some of the states are not finite.
        """
        finite = states.isfinite().all(1)
        if not finite.all():
            raise RequestError(
                f"expected finite states at layer {around.site.layer}, {around.site.part}, found "
                f"{int((~finite).sum())} of {len(states)} facts with others; set "
                "model.dtype=float32 or choose another layer"
            )
        labels, dtype = self.shown(concept.labels), around.model.model.dtype
        if nothing_to_erase(states, labels, dtype) is None:
            affine = self.map(states, labels, around)
        else:
            nothing = states.new_empty(states.shape[1], 0)
            affine = Affine(nothing, nothing.T, states.mean(0))
        why = nothing_to_erase(states, concept.labels, dtype)
        rows = list(self.rows(concept, around, states, affine, held_out, why))
        rows += self.beside(affine, around)
        return self.erasure(around.model, around.facts, around.site, affine, rows)

    def concept(self, facts: Splits, width: int) -> Concept:
        """The facts to fit on, with their labels."""
        sample = (*facts.target, *facts.fit) if self.fit_on == "target+fit" else facts.fit
        return concept(sample, width, self.rare, self.least)

    def shown(self, labels: Tensor) -> Tensor:
        """The labels that are fitted on: permuted for the control."""
        if not self.shuffled:
            return labels
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        return labels[order]

    def sites(self, model: ModelHandle, site: Site) -> list[Site]:
        """Where it is fitted, from below.

        Raises:
            RequestError: the model has no such layer.
        """
        everywhere = self.all_layers or (self.in_turn and self.layers is None)
        named = range(model.n_layers) if everywhere else self.layers or [site.layer]
        layers = sorted({model.check_layer(layer, "intervene.layers") for layer in named})
        return [Site(layer, self.part) for layer in layers]  # type: ignore[arg-type]

    def erasure(
        self, model: ModelHandle, facts: Splits, site: Site, affine: Affine, rows: Sequence[Row]
    ) -> Erasure:
        """The map as an intervention.

        Raises:
            RequestError: a gate, and no target fact to open it.
        """
        gated = self.gate == "subjects"
        if gated and not facts.target:
            raise RequestError(
                "expected target facts whose subjects open the gate, found none; set "
                "intervene.gate=always"
            )
        change = Change("relation", False, site.layer, site.part, self.policy, gated=gated)  # type: ignore[arg-type]
        return Erasure(
            change=replace(change, fitted_on=tuple(self.fit_on.split("+"))),
            model=model.fingerprint,
            proj_left=affine.left,
            proj_right=affine.right,
            bias=affine.bias,
            subjects=subject_keys(model, facts.target) if gated else None,
            diagnostics=tuple(rows),
        )

    def rows(
        self,
        concept: Concept,
        around: "Around",
        states: Tensor,
        affine: Affine,
        held_out: Tensor,
        why: str | None,
    ) -> Iterator[Row]:
        """What the fit reports of one site; `why` there is nothing to erase there, if so."""
        n, width = states.shape
        fresh = around.facts.test
        rank = torch.linalg.matrix_rank(affine.left @ affine.right)
        known = [n for n, fact in enumerate(fresh) if fact.true in concept.classes]
        residual, removed, leaked = None, None, None
        note = why or "fewer than two held-out subjects with these objects"
        erased = affine.of(states)
        if why != SAME:
            scatter = (states - states.mean(0)).square().sum()
            removed = float((erased - states).square().sum() / scatter)
        if why is None:
            residual = relative_cross_covariance(states, erased, concept.labels)
        if residual is not None and len({fresh[n].true for n in known}) > 1:
            index = torch.tensor([concept.classes.index(fresh[n].true) for n in known])
            labels = torch.nn.functional.one_hot(index, len(concept.classes)).double()
            leaked = relative_cross_covariance(held_out[known], affine.of(held_out[known]), labels)
        for metric, protocol, value, count in (
            ("residual_cross_covariance", "fit_sample", residual, n),
            ("residual_cross_covariance", "held_out", leaked, len(known)),
            ("variance_removed", "fit_sample", removed, n),
            ("rank", "projection", float(rank), n),
            ("n_over_d", "fit_sample", n / width, n),
            ("classes", "fit_sample", float(len(concept.classes)), n),
            ("rare_facts", "dropped", float(concept.dropped), n),
            ("rare_facts", "merged", float(concept.merged), n),
        ):
            yield Row(
                axis="cost", scope="relation", relation=concept.facts[0].relation,
                split="test" if protocol == "held_out" else "fit", layer=around.site.layer,
                metric=metric,
                protocol=protocol, value=value, n=count if value is not None else 0,
                note=note if value is None else None,
            )  # fmt: skip


@dataclass(frozen=True)
class Around:
    """What a map may need besides states and labels.

    Attributes:
        model: as it stands when the site is fitted.
        site: the site.
        facts: all splits.
    """

    model: ModelHandle
    site: Site
    facts: Splits


def states_of(
    model: ModelHandle,
    facts: Sequence[Fact],
    sites: Sequence[Site],
    position: str,
    owners: Mapping[str, int] | None = None,
) -> Tensor:
    """States `[sites, facts, d_model]` float64 of the facts' prompts, from the cache or one pass.

    Owners are those of target facts, by id: in a model that carries a change for each of them, its
    prompt feels its own.
    """
    owned = [(owners or {}).get(fact.id, NOBODY) for fact in facts]
    if not facts:
        return torch.empty(len(sites), 0, model.width, dtype=torch.float64)

    def make() -> dict[str, Tensor]:
        rows = [model.encode(f.prompt, owner=o) for f, o in zip(facts, owned, strict=True)]
        return {"states": features(model, rows, sites, [position])[:, 0]}  # type: ignore[list-item]

    key = {
        "version": 2,
        "model": model.state,
        "prefix": model.prefix,
        "sites": [[site.layer, site.part] for site in sites],
        "position": position,
        "facts": [[f.prompt.text, f.prompt.span, o] for f, o in zip(facts, owned, strict=True)],
    }
    return cached_tensors("states", key, make)["states"].double()


def concept(sample: Sequence[Fact], width: int, rare: str = "keep", least: int = 1) -> Concept:
    """Facts of one relation with their one-hot true objects.

    Raises:
        RequestError: several relations, fewer than two classes, as many classes as dimensions, or
            as subjects.
    """
    relations = sorted({fact.relation for fact in sample})
    if len(relations) > 1:
        raise RequestError(
            f"expected the facts of one relation for an eraser, found {len(relations)} "
            f"({', '.join(relations[:5])}, ...); choose one with facts.relations=[...]"
        )
    sizes = Counter(fact.true for fact in sample)
    few = {name for name, size in sizes.items() if size < least} if rare != "keep" else set()
    facts = tuple(fact for fact in sample if rare != "drop" or fact.true not in few)
    names = [REST if fact.true in few else fact.true for fact in facts]
    classes = tuple(sorted(set(names)))
    if len(classes) < 2:
        raise RequestError(
            f"expected at least two classes (true objects) for an eraser, found {len(classes)} "
            f"over {len(facts)} facts; raise facts.fit or choose a relation with more objects"
        )
    if len(classes) >= width:
        raise RequestError(
            f"expected fewer classes than the model's {width} dimensions for an eraser, found "
            f"{len(classes)}; set intervene.rare=merge and intervene.least, or choose a relation "
            "with fewer objects"
        )
    if len(facts) <= len(classes):
        raise RequestError(
            f"expected more subjects than classes (true objects) for an eraser, found {len(facts)} "
            f"subjects of {len(classes)} objects: whatever tells two subjects apart would be the "
            "concept; raise facts.fit, or set intervene.rare=merge and intervene.least"
        )
    index = torch.tensor([classes.index(name) for name in names])
    return Concept(
        facts=facts,
        classes=classes,
        labels=torch.nn.functional.one_hot(index, len(classes)).double(),
        dropped=len(sample) - len(facts),
        merged=sum(name == REST for name in names),
    )


def nothing_to_erase(states: Tensor, labels: Tensor, dtype: torch.dtype) -> str | None:
    """Why states have nothing to be erased; None if they have.

    A cross-covariance counts as none where it is as small as what rounding leaves: independent
    errors of half a unit in the last place, averaged over the sample, make one of about
    ε ‖X‖ ‖Z‖ / n^1.5.

    Args:
        states: `[n, d]`.
        labels: `[n, k]`.
        dtype: the model's, which the states were rounded to.
    """
    n = len(states)
    if (states - states.mean(0)).norm() <= _ROUNDING * states.norm():
        return SAME
    error = max(_ROUNDING, 4 * torch.finfo(dtype).eps / n**0.5)
    spread = states.norm() * (labels - labels.mean(0)).norm() / n
    return GONE if cross_covariance(states, labels).norm() <= error * spread else None


_ROUNDING = 1e-6
"""Spread of states that is none, in multiples of their norm: about what float32 sums round."""


def _check_something(parts: Sequence[Erasure]) -> None:
    """Refuse an erasure of nothing at all.

    Raises:
        RequestError: there is no site at which the facts' states differ.
    """
    if all(any(row.note == SAME for row in part.diagnostics) for part in parts):
        raise RequestError(
            "expected states that differ between facts, found the same for all at layer "
            f"{', '.join(str(part.change.layer) for part in parts)}, {parts[0].change.part}; "
            "choose a higher layer, or another intervene.position or intervene.part"
        )


def relative_cross_covariance(before: Tensor, after: Tensor, labels: Tensor) -> float:
    """‖Cov(after, labels)‖ / ‖Cov(before, labels)‖ in Frobenius norm, over one sample."""
    norms = [cross_covariance(x, labels).norm() for x in (after, before)]
    return float(norms[0] / norms[1])


def cross_covariance(states: Tensor, labels: Tensor) -> Tensor:
    """Cov(x, z) `[d, k]` of states `[n, d]` and labels `[n, k]`."""
    return (states - states.mean(0)).T @ (labels - labels.mean(0)) / len(states)


def orthonormal(columns: Tensor, tolerance: float) -> Tensor:
    """An orthonormal basis `[d, r]` of the columns' span; relative singular values below are none.

    Args:
        columns: `[d, k]`.
        tolerance: of a singular value, in multiples of the largest.
    """
    left, values, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = left[:, values > tolerance * values.max()]
    return basis


def subject_keys(model: ModelHandle, facts: Sequence[Fact]) -> Tensor:
    """What stands for the target subjects wherever they stand in their facts' prompts, `[m]`."""
    prompts = [
        prompt
        for fact in facts
        for prompt in (
            fact.prompt,
            *fact.paraphrases,
            *(question.prompt for question in fact.entailed),
        )
        if prompt.span is not None
    ]
    return torch.tensor(sorted({subject_key(model.encode(prompt)) for prompt in prompts}))
