"""Linear probes for the true object at every layer: frozen and retrained ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from palimpsest.errors import check_at_least, check_number
from palimpsest.evaluate.probing.measuring import Asked, ProbeMeasure
from palimpsest.evaluate.probing.probes import train_all
from palimpsest.evaluate.probing.readings import (
    at,
    barred,
    baseline,
    codes,
    informations,
    judge,
    strength_row,
)
from palimpsest.evaluate.probing.training import Kit, Recipe, Where, train_kit
from palimpsest.facts.fact import Fact
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import EMBEDDING
from palimpsest.model.tokens import Tokens
from palimpsest.record.row import Row


@dataclass(frozen=True)
class Probes(ProbeMeasure):
    """Held-out linear probes for the true object, their baselines, and what they tell in bits.

    Attributes:
        stride: every how many layers states are read; the last layer always is.
        least: subjects a class that a relation needs for its probes, on average.
        strengths: inverse strengths of the probes' L2 penalty; dev facts choose one.
    """

    version: ClassVar[int] = 2
    name: ClassVar[str] = "probes"

    strengths: list[float] = field(default_factory=lambda: [0.0001, 0.001, 0.01, 0.1])

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: one is too small, or there is no strength.
        """
        super().__post_init__()
        for strength in self.strengths:
            check_number("evaluate.probes.strengths", strength, above=0)
        check_at_least("the number of evaluate.probes.strengths", len(self.strengths), 1)

    def settings(self) -> dict[str, Any]:
        """What frozen probes depend on."""
        return {"strengths": list(self.strengths)}

    def train(
        self,
        states: Mapping[Where, Tensor],
        labels: Sequence[str],
        dev: Mapping[Where, Tensor],
        truth: Sequence[str],
        seed: int,
    ) -> Kit:
        """Probes, controls and online codes."""
        return train_kit(states, labels, dev, truth, Recipe(self.strengths, seed))

    def complete(self, kit: Kit, model: ModelHandle, sample: Sequence[Fact]) -> Kit:
        """With the probe on the mean of the subject's input embeddings alone: what names leak."""
        names = embeddings(model, [model.encode(fact.prompt) for fact in sample])
        return replace(kit, embedding=train_all(names[None], kit.labels, kit.strength)[0])

    def about_frozen(self, row: partial[Row], kit: Kit, target: Asked) -> Iterator[Row]:
        """Baselines: the most common object, permuted labels, the embeddings."""
        assert kit.embedding is not None
        yield from super().about_frozen(row, kit, target)
        common = [kit.majority(barred=fact.new) for fact in target.facts]
        yield baseline(partial(row, protocol="majority"), target.facts, common)
        names = embeddings(target.scene.model, target.rows)
        first = at(row, (EMBEDDING, "last_subject"))
        named = kit.embedding.predict(names, barred(target.facts))
        yield baseline(partial(first, protocol="embedding"), target.facts, named)
        yield from judge(first, "embedding", target.facts, names, kit.embedding)

    def about_kit(
        self,
        row: partial[Row],
        protocol: str,
        kit: Kit,
        asked: Sequence[tuple[partial[Row], Asked]],
    ) -> Iterator[Row]:
        """The chosen strength, and V-information."""
        yield strength_row(row, protocol, self.strengths, kit.strength, kit.chosen_on)
        for of, group in asked:
            yield from informations(of, protocol, kit, group.facts, group.states)

    def about_retrained(self, row: partial[Row], kit: Kit) -> Iterator[Row]:
        """The online codes."""
        yield from codes(row, kit)

    def instead(self, row: partial[Row], kit: Kit, cause: str, target: Asked) -> Iterator[Row]:
        """Of independent edits: no code."""
        row_of_null = partial(row, value=None, n=0, note=cause)
        for where in kit.readers:
            place = at(row_of_null, where)
            for metric in ("mdl_bits", "mdl_compression"):
                yield place(metric=metric, protocol="online_code", split="probe")


@torch.no_grad()
def embeddings(model: ModelHandle, rows: Sequence[Tokens]) -> Tensor:
    """Mean input embedding of each subject's tokens, `[n, d_model]`: what names leak."""
    table = model.model.get_input_embeddings()
    means = []
    for row in rows:
        first, last = row.subject or (0, len(row.ids) - 1)
        ids = torch.tensor(row.ids[first : last + 1], device=model.device)
        means.append(table(ids).float().mean(0).cpu())
    return torch.stack(means)
