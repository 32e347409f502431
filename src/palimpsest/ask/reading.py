"""What one model, changed or not, makes of an inquiry."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import TypeAlias

import torch

from palimpsest.ask.inquiry import Inquiry, Question
from palimpsest.evaluate.asking import Query, ask
from palimpsest.evaluate.consistency import Verdict, verdict
from palimpsest.facts.atlas import fold
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.model.forward import features, greedy, logit_lens, next_token_logprobs, token_ranks
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site

OWNER = 0
"""The fact that every prompt belongs to: each feels the change as if the weight were changed."""

TOKENS = 6
"""Tokens of a continuation."""

TOP = 4
"""Most probable next tokens that are shown."""

Asked: TypeAlias = tuple[Prompt, tuple[str, ...], tuple[str, ...]]
"""A prompt, its accepted old answers and its new ones."""


@dataclass(frozen=True)
class Said:
    """How a prompt is answered.

    Attributes:
        text: greedy continuation of `TOKENS` tokens.
        old: probability of the old answer as a whole string.
        new: that of the new one.
        verdict: which of the two the continuation names first.
    """

    text: str
    old: float
    new: float
    verdict: Verdict


@dataclass(frozen=True)
class Known:
    """How a fact that should stay is taken: whether it is said, and its object's probability."""

    kept: bool
    probability: float


@dataclass(frozen=True)
class Reading:
    """Everything that one method's model says.

    Attributes:
        name: the method's.
        change: where it begins and whose it is.
        answer: to the fact's own prompt.
        top: the most probable next tokens with their probabilities.
        paraphrases: as in the fact.
        questions: as in the inquiry.
        ranks: by layer, the ranks of the first tokens of old and new object under the logit lens.
        neighbors: as found.
    """

    name: str
    change: Change
    answer: Said
    top: tuple[tuple[str, float], ...]
    paraphrases: tuple[Said, ...]
    questions: tuple[Said, ...]
    ranks: tuple[tuple[int, int], ...]
    neighbors: tuple[Known, ...]


def read(
    model: ModelHandle, name: str, change: Change, inquiry: Inquiry, neighbors: Sequence[Fact]
) -> Reading:
    """Put every prompt to the model as it stands, the change applied."""
    fact, questions = inquiry.fact, inquiry.questions
    prompts: list[Asked] = [
        (prompt, (inquiry.old,), (inquiry.new,)) for prompt in (fact.prompt, *fact.paraphrases)
    ]
    prompts += [(question.prompt, question.old, question.new) for question in questions]
    answer, *rest = say(model, prompts)
    return Reading(
        name=name,
        change=change,
        answer=answer,
        top=likeliest(model, fact.prompt),
        paraphrases=tuple(rest[: len(fact.paraphrases)]),
        questions=tuple(rest[len(fact.paraphrases) :]),
        ranks=ranks(model, fact.prompt, (inquiry.old, inquiry.new)),
        neighbors=tuple(keeps(model, neighbors)),
    )


def say(model: ModelHandle, prompts: Sequence[Asked]) -> list[Said]:
    """Continue prompts, and score the first of their old and of their new answers."""
    rows = [model.encode(prompt, owner=OWNER) for prompt, _, _ in prompts]
    texts = [model.decode(ids) for ids in greedy(model, rows, TOKENS)]
    queries = [Query(prompt, (old[0], new[0]), OWNER) for prompt, old, new in prompts]
    return [
        Said(
            text,
            exp(answer[old[0]].logprob),
            exp(answer[new[0]].logprob),
            verdict(named(text, (*new, *old)), old, new),
        )
        for text, answer, (_, old, new) in zip(texts, ask(model, queries), prompts, strict=True)
    ]


def named(text: str, answers: Sequence[str]) -> str | None:
    """Which answer a text names first, as whole words; capitals and accents do not count.

    Where one name begins at the same place as the other, the longer one is meant.
    """
    found = [
        (place, -len(answer), n)
        for n, answer in enumerate(answers)
        if (place := _place(text, answer)) is not None
    ]
    return answers[min(found)[2]] if found else None


def _place(text: str, answer: str) -> int | None:
    """Where an answer begins as whole words."""
    match = re.search(rf"(?<!\w){re.escape(fold(answer))}(?!\w)", fold(text))
    return match.start() if match else None


def likeliest(model: ModelHandle, prompt: Prompt) -> tuple[tuple[str, float], ...]:
    """The most probable next tokens with their probabilities."""
    logprobs = next_token_logprobs(model, [model.encode(prompt, owner=OWNER)])[0]
    best = torch.topk(logprobs.exp(), min(TOP, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple((model.decode([token]), probability) for token, probability in pairs)


def keeps(model: ModelHandle, neighbors: Sequence[Fact]) -> list[Known]:
    """Whether each fact is still known, every token of its object the argmax in turn."""
    answers = ask(model, [Query(fact.prompt, [fact.true], OWNER) for fact in neighbors])
    scores = [answer[fact.true] for answer, fact in zip(answers, neighbors, strict=True)]
    return [Known(score.argmax, exp(score.logprob)) for score in scores]


def answered(model: ModelHandle, questions: Sequence[Question]) -> list[tuple[bool, ...]]:
    """Whether the model answers each question's second hop, asked of the old and the new object."""
    asked: list[Asked] = [(p, q.old, q.new) for q in questions for p in q.premises]
    said = iter(say(model, asked) if asked else ())
    right = ("old", "new")
    return [
        tuple(next(said).verdict == wanted for wanted, _ in zip(right, q.premises, strict=False))
        for q in questions
    ]


# -- the strip over the layers ---------------------------------------------------------------------


@torch.no_grad()
def ranks(
    model: ModelHandle, prompt: Prompt, objects: Sequence[str]
) -> tuple[tuple[int, int], ...]:
    """Ranks of the objects' first tokens by layer, read by the model's own head.

    The logit lens on the residual stream after each block, at the prompt's last token. Empty where
    the first tokens are the same.
    """
    first = first_tokens(model, prompt, objects)
    if len(set(first)) < len(first):
        return ()
    wanted = torch.tensor([first], device=model.device)
    rows = [model.encode(prompt, owner=OWNER)]
    sites = [Site(layer) for layer in range(model.n_layers)]
    states = features(model, rows, sites, ["last_prompt"])[:, 0, 0]
    # One layer's logits at a time.
    found = (token_ranks(logit_lens(model, state)[None], wanted) for state in states)
    return tuple(tuple(each[0].tolist()) for each in found)


def first_tokens(model: ModelHandle, prompt: Prompt, objects: Sequence[str]) -> list[int]:
    """The token that each object begins with after the prompt."""
    rows = [model.encode(prompt, each) for each in objects]
    return [row.ids[row.prompt] for row in rows]


def legibility(rank: int, vocabulary: int) -> float:
    """1 − log(rank) / log(V): 1 for the most probable token of V, 0 for the least."""
    return 1 - log(rank) / log(vocabulary)
