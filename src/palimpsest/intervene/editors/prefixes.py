"""Contexts put before a prompt, so that an edit holds wherever the prompt stands."""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from palimpsest.errors import check_at_least, check_seed
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.model.handle import ModelHandle
from palimpsest.model.sample import sample, start_ids


class Prefixes(Protocol):
    """Where context prefixes come from."""

    def texts(self, model: ModelHandle) -> tuple[str, ...]:
        """The contexts, without the empty one."""
        ...


@dataclass(frozen=True)
class SampledPrefixes:
    """Contexts sampled from the model itself by a seed.

    ROME's public code takes ten of 5 and ten of 10 tokens, top-k 5; with the bare prompt that makes
    21.

    Attributes:
        lengths: tokens in each group of contexts.
        count: contexts in each group; 0 for the bare prompt alone.
        top_k: sample among the k likeliest tokens.
        seed: of the generator.
    """

    lengths: list[int] = field(default_factory=lambda: [5, 10])
    count: int = 10
    top_k: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            RequestError: one is too small, or the seed out of range.
        """
        check_seed("intervene.prefixes.seed", self.seed)
        check_at_least("intervene.prefixes.count", self.count, 0)
        check_at_least("intervene.prefixes.top_k", self.top_k, 1)
        for length in self.lengths:
            check_at_least("intervene.prefixes.lengths", length, 1)

    def texts(self, model: ModelHandle) -> tuple[str, ...]:
        """Sample `count` contexts of each length; white space at their ends is dropped."""
        generator = torch.Generator().manual_seed(self.seed)
        skip = len(start_ids(model))
        rows = [
            row[skip:]
            for length in (self.lengths if self.count else ())
            for row in sample(model, self.count, length, generator, self.top_k).tolist()
        ]
        return tuple(model.decode(row).strip() for row in rows)


@dataclass(frozen=True)
class GivenPrefixes:
    """Contexts given as they are.

    Attributes:
        given: the contexts.
    """

    given: list[str] = field(default_factory=list)

    def texts(self, model: ModelHandle) -> tuple[str, ...]:
        """The given contexts."""
        return tuple(self.given)


def in_contexts(fact: Fact, contexts: tuple[str, ...]) -> list[Prompt]:
    """The fact's fit prompt bare, then after each context and a full stop.

    Raises:
        ValueError: the fit prompt's subject has no span.
    """
    if fact.prompt.span is None:
        raise ValueError(f"fact {fact.id} has a fit prompt without its subject")
    first, end = fact.prompt.span
    prompts = [fact.prompt]
    for index, context in enumerate(contexts):
        lead = f"{context}. "
        span = (first + len(lead), end + len(lead))
        prompts.append(Prompt(f"context/{index}", lead + fact.prompt.text, span))
    return prompts
