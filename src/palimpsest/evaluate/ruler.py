"""The ruler that every method faces. It sees a model and facts, never a method."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from typing import Any

import torch

from palimpsest.evaluate.asking import withheld
from palimpsest.evaluate.attacks.candidates import Attacks
from palimpsest.evaluate.attacks.compression import Compression
from palimpsest.evaluate.attacks.inversion import Inversion
from palimpsest.evaluate.attacks.relearning import Relearning
from palimpsest.evaluate.consistency import Consistency, Premises
from palimpsest.evaluate.downstream import Downstream, ask_targets
from palimpsest.evaluate.recoverability import Recoverability, Trained
from palimpsest.evaluate.tuned_lens import Translator, TunedLens, lens_rows
from palimpsest.evaluate.undertext import Readers, Undertext
from palimpsest.facts.splits import Splits
from palimpsest.model.difference import Difference
from palimpsest.model.forward import greedy, next_token_logprobs
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.record.row import Row


@dataclass(frozen=True)
class Baseline:
    """What the ruler learned from the unchanged model.

    Attributes:
        trained: frozen probes and their baselines, by relation.
        premises: which second hops the model answers.
        lenses: translators of its states, by layer.
        readers: probes of every layer and token group, by relation.
    """

    trained: Mapping[str, Trained]
    premises: Premises
    lenses: Mapping[int, Translator]
    readers: Mapping[str, Readers]


@dataclass(frozen=True)
class Ruler:
    """Downstream accuracy, recoverability and consistency.

    Attributes:
        downstream: what the model says.
        recoverability: what can be read off its states.
        consistency: whether it agrees with itself.
        attacks: what an attacker finds among so many candidates.
        lens: how the tuned lens is trained; None for none.
        undertext: at which tokens and layers the objects are legible.
        relearning: whether a little training on other facts brings the old objects back.
        compression: whether rounding or pruning the weights does.
        inversion: whether the changed weights alone tell the objects.
    """

    downstream: Downstream = field(default_factory=Downstream)
    recoverability: Recoverability = field(default_factory=Recoverability)
    consistency: Consistency = field(default_factory=Consistency)
    attacks: Attacks = field(default_factory=Attacks)
    lens: TunedLens | None = field(default_factory=TunedLens)
    undertext: Undertext = field(default_factory=Undertext)
    relearning: Relearning = field(default_factory=Relearning)
    compression: Compression = field(default_factory=Compression)
    inversion: Inversion = field(default_factory=Inversion)

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> Baseline:
        """Ask the unchanged model what the measurements are relative to."""
        return Baseline(
            self.recoverability.prepare(model, facts, seed),
            self.consistency.prepare(model, facts),
            {} if self.lens is None else self.lens.train(model, self.attacks.layers(model)),
            self.undertext.prepare(model, facts),
        )

    def measure(
        self,
        model: ModelHandle,
        facts: Splits,
        change: Change,
        baseline: Baseline,
        seed: int,
        differences: Sequence[Difference] = (),
    ) -> Iterator[Row]:
        """Measure the model as it stands, the change applied.

        Rows of a change that knows where the subject or the prompt ends are marked `oracle_gate`.
        """
        sections = self.sections(model, facts, change, baseline, seed, differences)
        return chain.from_iterable(rows for _, rows in sections)

    def sections(
        self,
        model: ModelHandle,
        facts: Splits,
        change: Change,
        baseline: Baseline,
        seed: int,
        differences: Sequence[Difference] = (),
    ) -> Iterator[tuple[str, Iterator[Row]]]:
        """The rows of `measure` by section; an iterator that is not advanced computes nothing.

        Args:
            model: with the change applied.
            facts: that are asked about.
            change: what may be known of it.
            baseline: of the unchanged model.
            seed: of owners and orders.
            differences: what the change left in weights, which an attacker may look at.
        """
        answers = cache(lambda: ask_targets(model, facts))
        premises, trained, lenses = baseline.premises, baseline.trained, baseline.lenses

        def downstream() -> Iterator[Row]:
            yield from self.downstream.measure(model, facts, change, answers(), seed)

        def consistency() -> Iterator[Row]:
            yield from self.consistency.measure(model, facts, change, answers(), premises)

        def recoverability() -> Iterator[Row]:
            yield from self.recoverability.measure(model, facts, change, trained, seed)

        def attacks() -> Iterator[Row]:
            yield from lens_rows(partial(Row, axis="recoverability", scope=change.scope), lenses)
            yield from self.attacks.measure(model, facts, change, answers(), lenses)

        def relearning() -> Iterator[Row]:
            yield from self.relearning.measure(model, facts, change, answers(), seed)

        def compression() -> Iterator[Row]:
            yield from self.compression.measure(model, facts, change, seed, differences)

        def inversion() -> Iterator[Row]:
            yield from self.inversion.measure(model, facts, change, differences)

        def undertext() -> Iterator[Row]:
            yield from self.undertext.measure(model, facts, change, baseline.readers)

        told = (downstream, consistency, recoverability, attacks, undertext)
        for section in (*told, relearning, compression, inversion):
            yield section.__name__, (_marked(row, change) for row in section())

    def along(
        self, model: ModelHandle, facts: Splits, change: Change, step: int, seed: int
    ) -> Iterator[Row]:
        """What the model says after `step` edits of a sequence, of those facts and elsewhere."""
        rows = self.downstream.along(model, facts, change, step, seed)
        return (_marked(row, change) for row in rows)


def _marked(row: Row, change: Change) -> Row:
    """Null if the method could not change the fact; the mark of an oracle where it had one."""
    row = withheld(row, change)
    if not change.oracle:
        return row
    return replace(row, note="oracle_gate" if row.note is None else f"{row.note}; oracle_gate")


def portraits(model: ModelHandle, facts: Splits, tokens: int = 5) -> list[dict[str, Any]]:
    """Each target fact in words: prompt, continuation, likeliest next tokens."""
    rows = [model.encode(fact.prompt, owner=i) for i, fact in enumerate(facts.target)]
    said = greedy(model, rows, tokens)
    top = torch.topk(next_token_logprobs(model, rows).exp(), 5)
    return [
        {
            "fact_id": fact.id,
            "relation": fact.relation,
            "subject": fact.subject,
            "prompt": fact.prompt.text,
            "true": fact.true,
            "new": fact.new,
            "answer": model.decode(said[i]),
            "top": [
                [model.decode([token]), probability]
                for token, probability in zip(
                    top.indices[i].tolist(), top.values[i].tolist(), strict=True
                )
                if math.isfinite(probability)
            ],
        }
        for i, fact in enumerate(facts.target)
    ]
