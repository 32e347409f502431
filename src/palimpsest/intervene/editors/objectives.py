"""What an edit pursues: which object is to become likely or unlikely, and under which noise.

All but `inject` come from Hase et al. 2023, arXiv 2301.04213, section 5.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.model.corruption import corrupted, draw, spread
from palimpsest.model.forward import greedy
from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import Tokens

Objective = Literal["inject", "erase", "amplify", "force", "trace_reversal"]
"""`inject` raises the new object's probability; `erase` lowers the true object's; `amplify` raises
the true object's, `force` does so while the subject's embeddings are noised; `trace_reversal`
raises that of what the model says of a noised subject."""


@dataclass(frozen=True)
class Aim:
    """An objective with its noise.

    Attributes:
        objective: one of `Objective`.
        noise: standard deviation of the noise, in those of the input embeddings.
        seed: of the noise.
    """

    objective: str
    noise: float
    seed: int

    @property
    def lowered(self) -> bool:
        """Whether the object is to become unlikely."""
        return self.objective == "erase"

    def check(self, fact: Fact) -> None:
        """Refuse a fact that the objective cannot be pursued on.

        Raises:
            RequestError: no new object though one is to be written, or noise without a subject in
                the fit prompt to put it on.
        """
        if self.objective == "inject" and not fact.new:
            raise RequestError(
                f"expected a new object for every target fact, found fact {fact.id} without a "
                "new object; mend the facts file"
            )
        if self.objective in ("force", "trace_reversal") and fact.prompt.span is None:
            raise RequestError(
                f"expected a subject in the prompt of every target fact for {self.objective}, "
                f"found fact {fact.id} without a subject in its prompt; mend the facts file"
            )

    def wanted(
        self, model: ModelHandle, facts: Sequence[Fact]
    ) -> "Sequence[str | tuple[int, ...]]":
        """The object of each fact that the loss is made of, as text or as tokens."""
        if self.objective == "trace_reversal":
            with self.noised(model, facts):
                return _said(model, facts)
        return [(fact.new or "") if self.objective == "inject" else fact.true for fact in facts]

    def forced(self, model: ModelHandle, facts: Sequence[Fact]) -> AbstractContextManager[None]:
        """The noise under which the loss is taken: none but for `force`."""
        return self.noised(model, facts) if self.objective == "force" else nullcontext()

    def noised(self, model: ModelHandle, facts: Sequence[Fact]) -> AbstractContextManager[None]:
        """Noise on the subjects of rows that belong to the facts, by their number."""
        scale = self.noise * spread(model)
        return corrupted(model, draw(model, _bare(model, facts), scale, self.seed))


def _bare(model: ModelHandle, facts: Sequence[Fact]) -> list[Tokens]:
    return [model.encode(fact.prompt, owner=owner) for owner, fact in enumerate(facts)]


def _said(model: ModelHandle, facts: Sequence[Fact]) -> list[tuple[int, ...]]:
    """What the model says of each fact, in as many tokens as its true object has."""
    objects = [model.encode(fact.prompt, fact.true) for fact in facts]
    lengths = [len(row.ids) - row.prompt for row in objects]
    said = greedy(model, _bare(model, facts), max(lengths))
    return [ids[:n] for ids, n in zip(said, lengths, strict=True)]


def followed(
    model: ModelHandle, prompt: Prompt, wanted: str | tuple[int, ...], owner: int
) -> Tokens:
    """A prompt and an object, given as text or as the very tokens that the model said."""
    if isinstance(wanted, str):
        return model.encode(prompt, wanted, owner)
    row = model.encode(prompt, owner=owner)
    return replace(row, ids=(*row.ids, *wanted))
