"""Probes of an attacker who knows the method: trained on facts that it changed for them.

Membership inference calls the attacker's own copies of a procedure shadow models (Shokri et al.
2017, arXiv 1610.05820, section V); these are shadow edits. Editors and erasers face the same
attacker: the same subjects, each changed by the same method, and the same probe.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, log
from typing import ClassVar

import torch
from torch import Tensor

from palimpsest.errors import RequestError, check_at_least, check_number
from palimpsest.evaluate.probes import embeddings
from palimpsest.evaluate.probing.measuring import Asked, Read, of_relation
from palimpsest.evaluate.probing.probes import Probe, Reduced, fit
from palimpsest.evaluate.probing.readings import (
    NOT_FINITE,
    UNSEEN,
    at,
    judge,
    labelled,
    lost,
    strength_row,
)
from palimpsest.evaluate.probing.training import Where, chosen_strength
from palimpsest.evaluate.scene import Scene, ends_with_subject
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from palimpsest.record.row import Row

NO_SHADOW = "the method cannot be carried out anew here"
FAILED = "the method failed on nearly all probe subjects"
TOO_FEW = "fewer than {} probe subjects a class"


@dataclass(frozen=True)
class Sample:
    """Facts of one relation that the attacker had changed, and what can be read of them.

    Attributes:
        facts: first those that probes are trained on, then dev facts.
        trained: how many of them train.
        states: `[facts, d_model]` by place.
        names: `[facts, d_model]` mean input embeddings of the subjects.
    """

    facts: Sequence[Fact]
    trained: int
    states: Mapping[Where, Tensor]
    names: Tensor

    def fitted(self, states: Tensor, strengths: Sequence[float]) -> tuple[list[Probe], float, int]:
        """Probes of states `[places, facts, d]`, the strength, and how many facts chose it."""
        truth, n = [fact.true for fact in self.facts], self.trained
        reduced = Reduced.of(states[:, :n])
        strength, judges = chosen_strength(reduced, truth[:n], strengths, states[:, n:], truth[n:])
        return fit(reduced, truth[:n], strength), strength, judges


@dataclass(frozen=True)
class ShadowProbes(Read):
    """Linear probes trained on states of probe subjects that the same method has changed.

    An independent or gated edit is carried out anew on the probe subjects and the dev facts, with
    new objects drawn as the targets' are; a change that all subjects feel they feel already.

    Attributes:
        stride: every how many layers states are read; the last layer always is.
        subjects: probe subjects a class, on average, that the attacker has changed.
        strengths: inverse strengths of the probes' L2 penalty; dev facts choose one.
    """

    version: ClassVar[int] = 1
    name: ClassVar[str] = "shadow_probes"

    subjects: int = 20
    strengths: list[float] = field(default_factory=lambda: [0.0001, 0.001, 0.01, 0.1])

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: one is too small, or there is no strength.
        """
        super().__post_init__()
        check_at_least("evaluate.shadow_probes.subjects", self.subjects, 1)
        for strength in self.strengths:
            check_number("evaluate.shadow_probes.strengths", strength, above=0)
        check_at_least("the number of evaluate.shadow_probes.strengths", len(self.strengths), 1)

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> None:
        """Nothing: all that is trained is trained on the changed model."""

    def measure(self, scene: Scene, prepared: None) -> Iterator[Row]:
        """Rows of the axis `recoverability`; definitions stand in docs/metrics.md."""
        chosen = self._chosen(scene.facts)
        samples, causes = self._changed(scene, chosen)
        ends = {f.id for f in scene.facts.target if ends_with_subject(scene.model.encode(f.prompt))}
        for relation in chosen:
            row = partial(scene.row("recoverability"), relation=relation)
            if relation in causes:
                null = partial(row, metric="probe_accuracy", value=None, n=0, split="target")
                yield null(protocol="shadow", note=causes[relation])
                continue
            target = self.asked(scene, relation, list(enumerate(scene.facts.target)))
            rows = self._relation(row, samples[relation], target)
            yield from labelled(rows, scene.change, ends)

    def _chosen(self, facts: Splits) -> dict[str, tuple[Sequence[Fact], Sequence[Fact]]]:
        """By relation the probe subjects, and the dev facts; no subjects where they are too few."""
        chosen: dict[str, tuple[Sequence[Fact], Sequence[Fact]]] = {}
        for relation in sorted({fact.relation for fact in facts.target}):
            pool = of_relation(facts.probe, relation)
            wanted = self.subjects * len({fact.true for fact in pool})
            sample = pool[:wanted] if len(pool) >= wanted else []
            chosen[relation] = sample, of_relation(facts.dev, relation) if sample else []
        return chosen

    def _changed(
        self, scene: Scene, chosen: Mapping[str, tuple[Sequence[Fact], Sequence[Fact]]]
    ) -> tuple[dict[str, Sample], dict[str, str]]:
        """By relation its sample under the method's own change of it, or why there is none."""
        causes = {
            relation: TOO_FEW.format(self.subjects)
            for relation, (sample, _) in chosen.items()
            if len({fact.true for fact in sample}) < 2
        }
        some = {relation: pair for relation, pair in chosen.items() if relation not in causes}
        if scene.shadow is None:
            return {}, dict.fromkeys(some, NO_SHADOW) | causes
        if not some:
            return {}, causes
        facts = [fact for pair in some.values() for part in pair for fact in part]
        try:
            with scene.shadow(facts) as change:
                rows = [scene.model.encode(f.prompt, owner=n) for n, f in enumerate(facts)]
                states = self.features(scene.model, rows)
        except RequestError as error:
            return {}, dict.fromkeys(some, f"{NO_SHADOW}: {error}") | causes
        names = embeddings(scene.model, rows)
        changed = [n for n, fact in enumerate(facts) if fact.id not in change.failed]
        samples = {}
        for relation, (sample, _) in some.items():
            kept = [n for n in changed if facts[n].relation == relation]
            trained = sum(facts[n] in sample for n in kept)
            if len({facts[n].true for n in kept[:trained]}) < 2:
                causes[relation] = FAILED
                continue
            found = {where: state[kept] for where, state in states.items()}
            samples[relation] = Sample([facts[n] for n in kept], trained, found, names[kept])
        return samples, causes

    def _relation(self, row: partial[Row], sample: Sample, target: Asked) -> Iterator[Row]:
        """What the probes of one relation read, with the subject's name and beyond it."""
        of = partial(row, split="target")
        probes, strength, judges = sample.fitted(
            torch.stack(list(sample.states.values())), self.strengths
        )
        yield strength_row(row, "shadow", self.strengths, strength, judges)
        yield row(
            metric="probe_subjects", protocol="shadow", split="probe", value=float(sample.trained)
        )
        for probe, (where, states) in zip(probes, target.states.items(), strict=True):
            yield from judge(at(of, where), "shadow", target.facts, states, probe)
        yield from self._beyond_names(of, sample, target)

    def _beyond_names(self, row: partial[Row], sample: Sample, target: Asked) -> Iterator[Row]:
        """`v_information`: bits of the object in a state beyond those in the subject's name.

        Conditional V-information (Hewitt et al. 2021, arXiv 2109.09234, section 3): a linear probe
        of the name and the state together, against one of the name.
        """
        names = embeddings(target.scene.model, target.rows)
        (alone,), *_ = sample.fitted(sample.names[None], self.strengths)
        both = torch.stack([torch.cat((s, sample.names), 1) for s in sample.states.values()])
        joint, *_ = sample.fitted(both, self.strengths)
        row = partial(row, metric="v_information", protocol="shadow_given_name")
        known = [n for n, fact in enumerate(target.facts) if fact.true in alone.classes]
        truth = [target.facts[n].true for n in known]
        before = alone.logprobs(names[known], truth)
        for probe, (where, states) in zip(joint, target.states.items(), strict=True):
            after = probe.logprobs(torch.cat((states, names), 1)[known], truth)
            bits = dict(zip(known, ((after - before) / log(2)).tolist(), strict=True))
            yield from _gained(at(row, where), target.facts, bits)


def _gained(row: partial[Row], facts: Sequence[Fact], bits: Mapping[int, float]) -> Iterator[Row]:
    """A row a fact; null with the cause where there is no number."""
    for n, fact in enumerate(facts):
        if n not in bits:
            yield from lost(row, [fact], UNSEEN)
        elif not isfinite(bits[n]):
            yield from lost(row, [fact], NOT_FINITE)
        else:
            yield row(fact_id=fact.id, prompt_id=fact.prompt.id, value=bits[n])
