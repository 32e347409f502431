"""Scene: one changed model as all measures see it, and what they share of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial

from torch import Tensor

from palimpsest.evaluate.asking import Answer, Query, ask, candidates, dealt
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.model.difference import Difference
from palimpsest.model.forward import features
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Position, Site
from palimpsest.model.tokens import Tokens
from palimpsest.record.row import Axis, Row

Answers = list[dict[str, Answer]]
"""For each target fact, by prompt id, the answers to its fit prompt, paraphrases and neighbors."""

Shadow = Callable[[Sequence[Fact]], AbstractContextManager[Change]]
"""Puts the same method's change of other facts in place of this change while a context lasts.

The facts are the owners of that change, in their order. Where all subjects feel this change, it
stays as it is. What the model says meanwhile is asked of `model.forward`, never of the scene.
"""

_Asked = tuple[tuple[Tokens, ...], tuple[Site, ...], tuple[Position, ...]]


@dataclass(frozen=True)
class Scene:
    """What a measure may know: the model as it stands, facts, and the change, never the method.

    Attributes:
        model: with the change applied.
        facts: all splits; of a sequence measured along the way, with the targets edited so far.
        change: where it begins and whose it is.
        seed: of owners and orders.
        differences: W' − W of changed W_out, which an attacker may look at.
        step: edits so far in a sequence that is measured along the way; None for the whole change.
        shadow: the method at work on facts that an attacker knows; None where it cannot be had.
    """

    model: ModelHandle
    facts: Splits
    change: Change
    seed: int = 0
    differences: Sequence[Difference] = ()
    step: int | None = None
    shadow: Shadow | None = None
    _features: dict[_Asked, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def row(self, axis: Axis) -> partial[Row]:
        """A row of an axis, with the change's scope and, along a sequence, the step."""
        return partial(Row, axis=axis, scope=self.change.scope, step=self.step)

    @cached_property
    def answers(self) -> Answers:
        """What the model says to every target fact's own prompts; asked once."""
        return ask_targets(self.model, self.facts)

    @cached_property
    def prompts(self) -> list[Tokens]:
        """The target facts' fit prompts, each with its own fact for owner."""
        return [self.model.encode(f.prompt, owner=i) for i, f in enumerate(self.facts.target)]

    def features(
        self, rows: Sequence[Tokens], sites: Sequence[Site], positions: Sequence[Position]
    ) -> Tensor:
        """States of the model as it stands, as of `model.forward.features`; computed once."""
        key = (tuple(rows), tuple(sites), tuple(positions))
        if key not in self._features:
            self._features[key] = features(self.model, rows, sites, positions)
        return self._features[key]

    @property
    def coinciding(self) -> set[str]:
        """Ids of the target facts whose prompt ends with its subject."""
        rows = zip(self.facts.target, self.prompts, strict=True)
        return {fact.id for fact, row in rows if ends_with_subject(row)}

    def dealt(self, facts: Sequence[Fact]) -> list[tuple[int, Fact]]:
        """Facts that are no targets, each with the owner whose change it feels."""
        return dealt(facts, self.facts, self.change, self.seed)


def ask_targets(model: ModelHandle, facts: Splits) -> Answers:
    """Put every target fact's own prompts to the model, each feeling its own fact's change."""
    queries = []
    for owner, fact in enumerate(facts.target):
        objects = candidates(fact, facts.classes[fact.relation])
        for prompt in (fact.prompt, *fact.paraphrases):
            queries.append(Query(prompt, objects, owner))
        for prompt in fact.neighbors:
            queries.append(Query(prompt, [fact.true, fact.new or ""], owner))
    answers: Answers = [{} for _ in facts.target]
    for query, answer in zip(queries, ask(model, queries), strict=True):
        answers[query.owner][query.prompt.id] = answer
    return answers


def ends_with_subject(row: Tokens) -> bool:
    """Whether the subject's last token is the prompt's last token."""
    return row.at("last_subject") == row.at("last_prompt")
