"""Putting prompts to a model: how likely each of several completions is."""

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from palimpsest.cache import cached_tensors
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.facts.splits import Splits
from palimpsest.model.forward import Score, score
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.model.tokens import NOBODY
from palimpsest.record.row import Row

MOST_CANDIDATES = 32
"""Where a relation has more objects, true, new and others picked by hash make up this many."""


@dataclass(frozen=True)
class Query:
    """A prompt and what may follow it.

    Attributes:
        prompt: what is asked.
        completions: to be scored.
        owner: index of the fact that the prompt belongs to, or `NOBODY`.
    """

    prompt: Prompt
    completions: Sequence[str]
    owner: int = NOBODY


Answer = Mapping[str, Score]
"""By completion, how the model takes it."""


def ask(model: ModelHandle, queries: Sequence[Query]) -> list[Answer]:
    """Score every completion of every query."""
    rows = [
        model.encode(query.prompt, completion, query.owner)
        for query in queries
        for completion in query.completions
    ]
    scores = iter(score(model, rows))
    return [{completion: next(scores) for completion in query.completions} for query in queries]


def best(answer: Answer) -> str:
    """The completion with the highest probability as a whole string."""
    return max(answer, key=lambda completion: answer[completion].logprob)


def candidates(fact: Fact, classes: Sequence[str]) -> list[str]:
    """The objects that compete for a fact's prompt: its relation's, or a fixed pick of many."""
    wanted = [fact.true, *([fact.new] if fact.new else [])]
    rest = [name for name in classes if name not in wanted]
    rest.sort(key=lambda name: hashlib.sha256(f"{fact.relation}/{name}".encode()).digest())
    return wanted + rest[: MOST_CANDIDATES - len(wanted)]


def knows(model: ModelHandle, facts: Sequence[Fact]) -> list[bool]:
    """Whether every token of the true object is the argmax in turn, after the fact's fit prompt.

    Kept in the cache: every run of a sweep asks the same of the unchanged model.
    """

    def make() -> dict[str, Tensor]:
        answers = ask(model, [Query(fact.prompt, [fact.true]) for fact in facts])
        hits = [answer[fact.true].argmax for fact, answer in zip(facts, answers, strict=True)]
        return {"known": torch.tensor(hits)}

    key = {
        "model": model.state,
        "prefix": model.prefix,
        "facts": [[fact.prompt.text, fact.prompt.span, fact.true] for fact in facts],
    }
    return [bool(hit) for hit in cached_tensors("known", key, make)["known"].tolist()]


def rotation(prompts: int, facts: int, seed: int) -> list[int]:
    """Owners for prompts that belong to no fact: every fact equally often, in a seeded order.

    The same for every method, so that the same text feels the same fact's change.
    """
    if not facts:
        return [NOBODY] * prompts
    order = list(range(facts))
    random.Random(f"owners/{seed}").shuffle(order)
    return [order[index % facts] for index in range(prompts)]


T = TypeVar("T")


def dealt(things: Sequence[T], facts: Splits, change: Change, seed: int) -> list[tuple[int, T]]:
    """Things that belong to no fact, each with the owner whose change it feels.

    Of independent changes, those of facts that could not be changed are none: what would feel them
    says nothing of the method, and is left out.
    """
    owners = rotation(len(things), len(facts.target), seed)
    lost = change.failed if change.independent else {}
    idle = {owner for owner, fact in enumerate(facts.target) if fact.id in lost}
    return [(o, thing) for o, thing in zip(owners, things, strict=True) if o not in idle]


NOT_FINITE = "the model gives no finite probabilities"
"""Why nothing can be read off a ruined model: of NaNs none is the largest."""


def readable(answer: Answer, row: Row) -> Row:
    """The row; null if the answer that it was made from is not finite."""
    if all(math.isfinite(score.logprob) for score in answer.values()):
        return row
    return replace(row, value=None, n=0, note=NOT_FINITE)


def withheld(row: Row, change: Change) -> Row:
    """The row; null with the cause if it is of a target fact that could not be changed."""
    cause = change.failed.get(row.fact_id or "") if row.split == "target" else None
    return row if cause is None else replace(row, value=None, n=0, note=cause)
