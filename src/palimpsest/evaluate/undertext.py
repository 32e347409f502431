"""The undertext: at which tokens and layers the old and the new object are legible.

A palimpsest's map: a linear probe of its own reads every layer at every group of tokens from the
subject on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from palimpsest.cache import cached_tensors
from palimpsest.errors import check_at_least, check_number
from palimpsest.evaluate.probing.probes import Probe, train_all
from palimpsest.evaluate.probing.readings import NOT_FINITE
from palimpsest.evaluate.scene import Scene
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.model.forward import states_at
from palimpsest.model.handle import ModelHandle
from palimpsest.model.positions import GROUPS, Group, places
from palimpsest.model.site import Change, Site
from palimpsest.model.tokens import NOBODY
from palimpsest.record.row import UPSTREAM, Row

Readers = Mapping[Group, Sequence[Probe]]
"""Probes by token group, one a layer."""

NO_GROUP = "too few prompts have such a token"


@dataclass(frozen=True)
class Undertext:
    """Probes of every layer and token group, trained on the probe subjects.

    Those of the unchanged model are laid on every change; on one that is felt by all, they are
    trained anew as well. Independent edits change no probe subject.

    Attributes:
        stride: every how many layers; the last always is.
        strength: inverse strength of the probes' L2 penalty.
        least: probe subjects a class that a relation needs, on average, and of a token group too.
    """

    stride: int = 3
    strength: float = 0.01
    least: int = 5

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: one is out of its range.
        """
        check_at_least("evaluate.undertext.stride", self.stride, 1)
        check_at_least("evaluate.undertext.least", self.least, 1)
        check_number("evaluate.undertext.strength", self.strength, above=0)

    def layers(self, model: ModelHandle) -> list[int]:
        """The layers of the map."""
        return sorted({*range(0, model.n_layers, self.stride), model.n_layers - 1})

    # -- on the unchanged model -------------------------------------------------------------------

    version: ClassVar[int] = 1
    along: ClassVar[bool] = False

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> dict[str, Readers]:
        """Probes of each relation that has enough subjects, from the cache or trained."""
        found = {}
        for relation in sorted({fact.relation for fact in facts.target}):
            sample = [fact for fact in facts.probe if fact.relation == relation]
            classes = len({fact.true for fact in sample})
            if classes >= 2 and len(sample) >= self.least * classes:
                found[relation] = self._cached(model, sample)
        return found

    def _cached(self, model: ModelHandle, sample: Sequence[Fact]) -> Readers:
        key = {
            "version": 1,
            "model": model.state,
            "prefix": model.prefix,
            "layers": self.layers(model),
            "strength": self.strength,
            "least": self.least,
            "facts": [[f.prompt.text, f.prompt.span, f.true] for f in sample],
        }

        def make() -> dict[str, Tensor]:
            trained = self._trained(model, sample)
            return {
                f"{group}/{part}": torch.stack([getattr(probe, part) for probe in probes])
                for group, probes in trained.items()
                for part in ("weight", "bias")
            }

        tensors, names = cached_tensors("undertext", key, make), _objects(sample)
        return {
            group: [
                Probe(weight, bias, names)
                for weight, bias in zip(
                    tensors[f"{group}/weight"], tensors[f"{group}/bias"], strict=True
                )
            ]
            for group in GROUPS
            if f"{group}/weight" in tensors
        }

    def _trained(self, model: ModelHandle, sample: Sequence[Fact]) -> Readers:
        """Probes of the token groups that enough subjects of every class have."""
        names, found = _objects(sample), {}
        for group, each in self._states(model, sample).items():
            labels = [sample[n].true for n in each.members]
            if set(labels) == set(names) and len(labels) >= self.least * len(names):
                found[group] = train_all(each.states, labels, self.strength)
        return found

    def _states(
        self, model: ModelHandle, facts: Sequence[Fact], owners: Sequence[int] | None = None
    ) -> "dict[Group, _Found]":
        """The states of the facts' prompts, by token group."""
        owned = owners or [NOBODY] * len(facts)
        rows = [model.encode(f.prompt, owner=o) for f, o in zip(facts, owned, strict=True)]
        spots = [places(row) for row in rows]
        sites = [Site(layer) for layer in self.layers(model)]
        taken = [[spot.get(group, 0) for spot in spots] for group in GROUPS]
        states = states_at(model, rows, sites, taken)
        found = {}
        for i, group in enumerate(GROUPS):
            members = [n for n, spot in enumerate(spots) if group in spot]
            ends = any(spots[n][group] == rows[n].prompt - 1 for n in members)
            found[group] = _Found(states[:, i][:, members], members, ends)
        return found

    # -- on the changed model ---------------------------------------------------------------------

    def measure(self, scene: Scene, prepared: Mapping[str, Readers]) -> Iterator[Row]:
        """Rows `legibility_old` and `legibility_new`: one a layer, token group and relation.

        Args:
            scene: the changed model.
            prepared: probes of the unchanged model, by relation.
        """
        model, facts, change = scene.model, scene.facts, scene.change
        row = partial(scene.row("recoverability"), split="target")
        for relation, frozen in prepared.items():
            owned = {n: f for n, f in enumerate(facts.target) if f.relation == relation}
            sample = [fact for fact in facts.probe if fact.relation == relation]
            laid = {"frozen": frozen}
            if not change.independent:
                laid["retrained"] = frozen
            if not change.independent and change.layer is not None:
                laid["retrained"] = self._trained(model, sample)
            states = self._states(model, list(owned.values()), list(owned))
            for protocol, probes in laid.items():
                named = partial(row, relation=relation, protocol=protocol)
                yield from self._told(named, model, list(owned.values()), change, states, probes)

    def _told(
        self,
        row: partial[Row],
        model: ModelHandle,
        target: Sequence[Fact],
        change: Change,
        states: "Mapping[Group, _Found]",
        probes: Readers,
    ) -> Iterator[Row]:
        for group, found in states.items():
            kept = [i for i, n in enumerate(found.members) if target[n].id not in change.failed]
            asked = [target[found.members[i]] for i in kept]
            for number, layer in enumerate(self.layers(model)):
                at = partial(row, layer=layer, position=group)
                if group not in probes or not asked:
                    yield from _nothing(at, NO_GROUP)
                    continue
                guesses = probes[group][number].predict(found.states[number][kept])
                upstream = not _reached(change, layer, group, found.ends)
                for each in _shares(at, guesses, asked):
                    noted = upstream and each.value is not None
                    yield replace(each, note=UPSTREAM) if noted else each


@dataclass(frozen=True)
class _Found:
    """States of one token group.

    Attributes:
        states: `[layers, members, d_model]`.
        members: which facts have such a token.
        ends: whether it is the last token of any of their prompts.
    """

    states: Tensor
    members: list[int]
    ends: bool


def _reached(change: Change, layer: int, group: Group, ends: bool) -> bool:
    """Whether a change can have altered states of a token group after a layer."""
    if change.policy == "last_prompt" and not ends:
        return False
    if change.policy == "last_subject" and group in ("first_subject", "middle_subject"):
        return False
    return change.reaches(layer, "last_prompt")


def _objects(sample: Sequence[Fact]) -> tuple[str, ...]:
    return tuple(sorted({fact.true for fact in sample}))


def _shares(
    at: partial[Row], guesses: Sequence[str | None], facts: Sequence[Fact]
) -> Iterator[Row]:
    """The shares of facts whose old object, and whose new one, the probe names."""
    if None in guesses:
        yield from _nothing(at, NOT_FINITE)
        return
    at = partial(at, n=len(facts))
    pairs = list(zip(guesses, facts, strict=True))
    yield at(metric="legibility_old", value=sum(g == f.true for g, f in pairs) / len(facts))
    yield at(metric="legibility_new", value=sum(g == f.new for g, f in pairs) / len(facts))


def _nothing(at: partial[Row], cause: str) -> Iterator[Row]:
    for metric in ("legibility_old", "legibility_new"):
        yield at(metric=metric, value=None, n=0, note=cause)
