"""Linear probes for the true object at every layer: frozen, retrained and adaptive ones."""

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
    baseline,
    codes,
    informations,
    judge,
    lost,
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
        folds: of the cross-fit of adaptive probes.
    """

    version: ClassVar[int] = 1
    name: ClassVar[str] = "probes"

    strengths: list[float] = field(default_factory=lambda: [0.0001, 0.001, 0.01, 0.1])
    folds: int = 6

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: one is too small, or there is no strength.
        """
        super().__post_init__()
        for strength in self.strengths:
            check_number("evaluate.probes.strengths", strength, above=0)
        check_at_least("the number of evaluate.probes.strengths", len(self.strengths), 1)
        check_at_least("evaluate.probes.folds", self.folds, 2)

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
        guess = [kit.majority] * len(target.facts)
        yield baseline(partial(row, protocol="majority"), target.facts, guess)
        names = kit.embedding.predict(embeddings(target.scene.model, target.rows))
        first = partial(at(row, (EMBEDDING, "last_subject")), protocol="embedding")
        yield baseline(first, target.facts, names)

    def about_kit(
        self,
        row: partial[Row],
        protocol: str,
        kit: Kit,
        asked: Sequence[tuple[partial[Row], Asked]],
    ) -> Iterator[Row]:
        """The chosen strength, and V-information."""
        yield strength_row(row, protocol, kit)
        for of, group in asked:
            yield from informations(of, protocol, kit, group.facts, group.states)

    def about_retrained(self, row: partial[Row], kit: Kit) -> Iterator[Row]:
        """The online codes."""
        yield from codes(row, kit)

    def instead(self, row: partial[Row], kit: Kit, cause: str, target: Asked) -> Iterator[Row]:
        """Of independent edits: no code, and adaptive probes."""
        row_of_null = partial(row, value=None, n=0, note=cause)
        for where in kit.readers:
            place = at(row_of_null, where)
            for metric in ("mdl_bits", "mdl_compression"):
                yield place(metric=metric, protocol="online_code", split="probe")
        yield from self._adaptive(partial(row, split="target"), target, kit.strength)

    def _adaptive(self, row: partial[Row], target: Asked, strength: float) -> Iterator[Row]:
        """Probes trained on *other* edited subjects with their original objects, cross-fitted."""
        model = target.scene.model
        samples = [
            (n, model.encode(prompt, owner=tokens.owner))
            for n, (fact, tokens) in enumerate(zip(target.facts, target.rows, strict=True))
            for prompt in (fact.prompt, *fact.paraphrases)
            if prompt.span is not None
        ]
        extra = self.states(target.scene, [tokens for _, tokens in samples])
        truth = [fact.true for fact in target.facts]
        # Facts come with classes in turn: dealt as they come, a fold could hold a whole class.
        by_class = sorted(range(len(truth)), key=truth.__getitem__)
        fold_of = {n: place % self.folds for place, n in enumerate(by_class)}
        for fold in range(self.folds):
            kept = [s for s, (n, _) in enumerate(samples) if fold_of[n] != fold]
            labels = [truth[samples[s][0]] for s in kept]
            mine = [n for n in range(len(truth)) if fold_of[n] == fold]
            judged = [target.facts[n] for n in mine]
            if len(set(labels)) < 2:
                told = partial(row, metric="probe_accuracy", protocol="adaptive")
                for where in target.states:
                    yield from lost(at(told, where), judged, "fewer than two classes")
                continue
            probes = train_all(torch.stack([x[kept] for x in extra.values()]), labels, strength)
            for probe, (where, found) in zip(probes, target.states.items(), strict=True):
                yield from judge(at(row, where), "adaptive", judged, found[mine], probe)


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
