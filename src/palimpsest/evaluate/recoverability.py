"""Recoverability: what can still be read off the states, whatever the model says."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from palimpsest.cache import cached_tensors
from palimpsest.errors import check_at_least, check_number
from palimpsest.evaluate.asking import dealt
from palimpsest.evaluate.probing.probes import Probe, train_all
from palimpsest.evaluate.probing.readings import (
    NOT_FINITE,
    accuracies,
    at,
    baseline,
    baselines,
    codes,
    informations,
    judge,
    labelled,
    lost,
    selectivities,
    strength_row,
    undefined,
)
from palimpsest.evaluate.probing.training import Kit, Recipe, Where, train_kit
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.model.forward import features, logit_lens, token_ranks
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import EMBEDDING, Change, Position, Site
from palimpsest.model.tokens import Tokens
from palimpsest.record.row import Row

POSITIONS: tuple[Position, ...] = ("last_subject", "last_prompt")


@dataclass(frozen=True)
class Trained:
    """Probes of one relation trained on the unchanged model's states of probe subjects.

    Attributes:
        kit: at every place.
        embedding: a linear probe on the mean of the subject's input embeddings alone.
    """

    kit: Kit
    embedding: Probe


@dataclass(frozen=True)
class Recoverability:
    """Held-out probes for the true object, and ranks under the logit lens.

    Attributes:
        stride: every how many layers states are read; the last layer always is.
        strengths: inverse strengths of the linear probes' L2 penalty; dev facts choose one.
        hidden: units of the hidden layer of the MLP probes; 0 for none.
        least: subjects a class that a relation needs for its probes, on average.
        folds: of the cross-fit of adaptive probes.
    """

    stride: int = 3
    strengths: list[float] = field(default_factory=lambda: [0.0001, 0.001, 0.01, 0.1])
    hidden: int = 64
    least: int = 5
    folds: int = 6

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: one is too small, or there is no strength.
        """
        for strength in self.strengths:
            check_number("evaluate.recoverability.strengths", strength, above=0)
        check_at_least("the number of evaluate.recoverability.strengths", len(self.strengths), 1)
        check_at_least("evaluate.recoverability.hidden", self.hidden, 0)
        check_at_least("evaluate.recoverability.stride", self.stride, 1)
        check_at_least("evaluate.recoverability.folds", self.folds, 2)

    def layers(self, model: ModelHandle) -> list[int]:
        """The layers whose outputs are read."""
        return sorted({*range(0, model.n_layers, self.stride), model.n_layers - 1})

    # -- on the unchanged model -------------------------------------------------------------------

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> dict[str, Trained]:
        """Train the frozen probes of each relation that has enough subjects."""
        trained = {}
        for relation in sorted({fact.relation for fact in facts.target}):
            sample = [fact for fact in facts.probe if fact.relation == relation]
            classes = len({fact.true for fact in sample})
            if classes >= 2 and len(sample) >= self.least * classes:
                dev = [fact for fact in facts.dev if fact.relation == relation]
                trained[relation] = self._train(model, sample, dev, seed)
        return trained

    def _train(
        self, model: ModelHandle, sample: Sequence[Fact], dev: Sequence[Fact], seed: int
    ) -> Trained:
        labels = [fact.true for fact in sample]

        def make() -> dict[str, Tensor]:
            places: list[Where] = list(product(self.layers(model), POSITIONS))
            kit = self._kit(model, sample, dev, seed, places)
            names = embeddings(model, [model.encode(fact.prompt) for fact in sample])
            probe = train_all(names[None], labels, kit.strength)[0]
            return kit.tensors() | {"embedding/weight": probe.weight, "embedding/bias": probe.bias}

        tensors = cached_tensors("probes", self._key(model, sample, dev, seed), make)
        kit = Kit.restored(tensors, list(product(self.layers(model), POSITIONS)), labels)
        weight, bias = tensors["embedding/weight"], tensors["embedding/bias"]
        return Trained(kit, Probe(weight, bias, tuple(sorted(set(labels)))))

    def _key(
        self, model: ModelHandle, sample: Sequence[Fact], dev: Sequence[Fact], seed: int
    ) -> dict[str, Any]:
        """All that the frozen probes depend on."""
        return {
            "version": 2,
            "model": model.state,
            "prefix": model.prefix,
            "batch_size": model.batch_size,
            "layers": self.layers(model),
            "strengths": list(self.strengths),
            "hidden": self.hidden,
            "seed": seed,
            "facts": [[f.prompt.text, f.prompt.span, f.true] for f in sample],
            "dev": [[f.prompt.text, f.prompt.span, f.true] for f in dev],
        }

    def _kit(
        self,
        model: ModelHandle,
        sample: Sequence[Fact],
        dev: Sequence[Fact],
        seed: int,
        places: Sequence[Where],
    ) -> Kit:
        """Probes trained at some places on the states of the model as it stands."""
        found = self._states(model, [model.encode(fact.prompt) for fact in (*sample, *dev)])
        n = len(sample)
        return train_kit(
            {where: found[where][:n] for where in places},
            [fact.true for fact in sample],
            {where: found[where][n:] for where in places},
            [fact.true for fact in dev],
            Recipe(self.strengths, self.hidden, seed),
        )

    def _states(self, model: ModelHandle, rows: Sequence[Tokens]) -> dict[Where, Tensor]:
        """States `[n, d_model]` by layer and position."""
        layers = self.layers(model)
        found = features(model, rows, [Site(layer) for layer in layers], POSITIONS)
        return {
            (layer, position): found[i, j]
            for i, layer in enumerate(layers)
            for j, position in enumerate(POSITIONS)
        }

    # -- on the changed model ---------------------------------------------------------------------

    def measure(
        self,
        model: ModelHandle,
        facts: Splits,
        change: Change,
        trained: Mapping[str, Trained],
        seed: int,
    ) -> Iterator[Row]:
        """The rows of the axis `recoverability`; definitions stand in docs/metrics.md."""
        row = partial(Row, axis="recoverability", scope=change.scope)
        asked = (*facts.target, *facts.test)
        coinciding = {fact.id for fact in asked if _coincide(model.encode(fact.prompt))}
        for relation in sorted({fact.relation for fact in facts.target}):
            rows = self._relation(row, model, facts, change, trained.get(relation), relation, seed)
            yield from labelled(rows, change, coinciding)

    def _relation(
        self,
        row: partial[Row],
        model: ModelHandle,
        facts: Splits,
        change: Change,
        trained: Trained | None,
        relation: str,
        seed: int,
    ) -> Iterator[Row]:
        row = partial(row, relation=relation)
        target = [(i, f) for i, f in enumerate(facts.target) if f.relation == relation]
        rows = [model.encode(fact.prompt, owner=i) for i, fact in target]
        states = self._states(model, rows)
        yield from self._lens(row, model, [fact for _, fact in target], states)
        if trained is None:
            cause = f"fewer than {self.least} probe subjects a class"
            yield row(metric="probe_accuracy", protocol="frozen", value=None, n=0, note=cause)
            return
        test = [(o, f) for o, f in dealt(facts.test, facts, change, seed) if f.relation == relation]
        test_states = self._states(model, [model.encode(f.prompt, owner=o) for o, f in test])
        known, fresh = [fact for _, fact in target], [fact for _, fact in test]
        of_target, of_test = partial(row, split="target"), partial(row, split="test")
        groups = [(of_target, known, states), (of_test, fresh, test_states)]
        yield from baselines(of_target, trained.kit, known, states)
        names = trained.embedding.predict(embeddings(model, rows))
        first = partial(at(of_target, (EMBEDDING, "last_subject")), protocol="embedding")
        yield baseline(first, known, names)
        after, cause = self._refit(model, facts, change, trained, relation, seed)
        kits = [("frozen", trained.kit), *([("retrained", after)] if after else [])]
        for protocol, kit in kits:
            yield strength_row(row, protocol, kit)
            for of, asked, found in groups:
                yield from accuracies(of, protocol, kit, asked, found)
                yield from informations(of, protocol, kit, asked, found)
            yield from selectivities(row, protocol, kit, fresh, test_states, seed)
        if after is not None:
            yield from codes(row, after)
            return
        yield from undefined(row, trained.kit, cause)
        yield from self._adaptive(row, model, target, states, trained.kit.strength)

    def _refit(
        self,
        model: ModelHandle,
        facts: Splits,
        change: Change,
        trained: Trained,
        relation: str,
        seed: int,
    ) -> tuple[Kit | None, str]:
        """Probes trained on the changed model's states of probe subjects, where that is defined.

        Where the change cannot reach they are the frozen ones.
        """
        if change.layer is None:
            return trained.kit, ""
        if change.independent:
            return None, "undefined for independent edits: no probe subject is edited"
        sample = [fact for fact in facts.probe if fact.relation == relation]
        dev = [fact for fact in facts.dev if fact.relation == relation]
        coincide = any(_coincide(model.encode(fact.prompt)) for fact in sample)
        places = [where for where in trained.kit.readers if change.reaches(*where, coincide)]
        if not places:
            return trained.kit, ""
        return self._kit(model, sample, dev, seed, places).over(trained.kit), ""

    def _adaptive(
        self,
        row: partial[Row],
        model: ModelHandle,
        target: Sequence[tuple[int, Fact]],
        states: Mapping[Where, Tensor],
        strength: float,
    ) -> Iterator[Row]:
        """Probes trained on *other* edited subjects with their original objects, cross-fitted."""
        row = partial(row, split="target")
        samples = [
            (n, model.encode(prompt, owner=i))
            for n, (i, fact) in enumerate(target)
            for prompt in (fact.prompt, *fact.paraphrases)
            if prompt.span is not None
        ]
        extra = self._states(model, [tokens for _, tokens in samples])
        truth = [fact.true for _, fact in target]
        # Facts come with classes in turn: dealt as they come, a fold could hold a whole class.
        by_class = sorted(range(len(target)), key=truth.__getitem__)
        fold_of = {n: place % self.folds for place, n in enumerate(by_class)}
        for fold in range(self.folds):
            kept = [s for s, (n, _) in enumerate(samples) if fold_of[n] != fold]
            labels = [truth[samples[s][0]] for s in kept]
            mine = [n for n in range(len(target)) if fold_of[n] == fold]
            judged = [target[n][1] for n in mine]
            if len(set(labels)) < 2:
                told = partial(row, metric="probe_accuracy", protocol="adaptive")
                for where in states:
                    yield from lost(at(told, where), judged, "fewer than two classes")
                continue
            probes = train_all(torch.stack([x[kept] for x in extra.values()]), labels, strength)
            for probe, (where, found) in zip(probes, states.items(), strict=True):
                yield from judge(at(row, where), "adaptive", judged, found[mine], probe)

    def _lens(
        self,
        row: partial[Row],
        model: ModelHandle,
        target: Sequence[Fact],
        states: Mapping[Where, Tensor],
    ) -> Iterator[Row]:
        """Ranks of the objects' first tokens when the model's own head reads a layer."""
        objects = [
            (model.encode(fact.prompt, fact.true), model.encode(fact.prompt, fact.new or "-"))
            for fact in target
        ]
        first = torch.tensor([[old.ids[old.prompt], new.ids[new.prompt]] for old, new in objects])
        for layer in self.layers(model):
            with torch.no_grad():
                scores = logit_lens(model, states[layer, "last_prompt"]).cpu()
            whole = scores.isfinite().all(1).tolist()
            ranks = token_ranks(scores, first).tolist()
            found = zip(target, first.tolist(), ranks, whole, strict=True)
            for fact, (old, new), rank, finite in found:
                place = partial(at(row, (layer, "last_prompt")), split="target")
                place = partial(place, fact_id=fact.id, prompt_id=fact.prompt.id)
                cause = None if finite else NOT_FINITE
                cause = "old and new object share their first token" if old == new else cause
                for metric, value in zip(("lens_rank_old", "lens_rank_new"), rank, strict=True):
                    shown = place(metric=metric, protocol="logit_lens", value=float(value))
                    yield replace(shown, value=None, n=0, note=cause) if cause else shown


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


def _coincide(row: Tokens) -> bool:
    """Whether the subject's last token is the prompt's last token."""
    return row.at("last_subject") == row.at("last_prompt")
