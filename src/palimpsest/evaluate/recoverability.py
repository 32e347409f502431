"""Recoverability: what can still be read off the states, whatever the model says."""

import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import cast

import torch
from torch import Tensor

from palimpsest.errors import check_at_least, check_number
from palimpsest.evaluate.asking import dealt
from palimpsest.evaluate.probes import Probe, train
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.files import cached_tensors
from palimpsest.model.forward import features, logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import EMBEDDING, Change, Position, Site
from palimpsest.model.tokens import Tokens
from palimpsest.record.row import UPSTREAM, Row

POSITIONS: tuple[Position, ...] = ("last_subject", "last_prompt")

NOT_FINITE = "the model's states are not finite"
"""Why nothing can be read off a ruined model."""

_Where = tuple[int, Position]


@dataclass(frozen=True)
class Trained:
    """Probes of one relation trained on the unchanged model's states of probe subjects.

    Attributes:
        probes: by layer and position.
        shuffled: the same with permuted labels.
        embedding: on the mean of the subject's input embeddings alone.
        majority: the most common object among the probe subjects.
    """

    probes: Mapping[_Where, Probe]
    shuffled: Mapping[_Where, Probe]
    embedding: Probe
    majority: str


@dataclass(frozen=True)
class Recoverability:
    """Held-out linear probes for the true object, and ranks under the logit lens.

    Attributes:
        stride: every how many layers states are read; the last layer always is.
        c: inverse strength of the probes' L2 penalty.
        least: subjects a class that a relation needs for its probes, on average.
        folds: of the cross-fit of adaptive probes.
    """

    stride: int = 3
    c: float = 0.01
    least: int = 5
    folds: int = 6

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: one is too small.
        """
        check_number("evaluate.recoverability.c", self.c, above=0)
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
                trained[relation] = self._train(model, sample, seed)
        return trained

    def _train(self, model: ModelHandle, sample: Sequence[Fact], seed: int) -> Trained:
        key = {
            "version": 1,
            "model": model.state,
            "prefix": model.prefix,
            "batch_size": model.batch_size,
            "layers": self.layers(model),
            "c": self.c,
            "seed": seed,
            "facts": [[fact.prompt.text, fact.prompt.span, fact.true] for fact in sample],
        }
        tensors = cached_tensors("probes", key, lambda: self._probe_tensors(model, sample, seed))
        classes = tuple(sorted({fact.true for fact in sample}))

        def probe(name: str) -> Probe:
            return Probe(tensors[f"{name}/weight"], tensors[f"{name}/bias"], classes)

        places: list[_Where] = list(product(self.layers(model), POSITIONS))
        return Trained(
            {(at, where): probe(f"{at}/{where}") for at, where in places},
            {(at, where): probe(f"{at}/{where}/shuffled") for at, where in places},
            probe("embedding"),
            Counter(sorted(fact.true for fact in sample)).most_common(1)[0][0],
        )

    def _probe_tensors(
        self, model: ModelHandle, sample: Sequence[Fact], seed: int
    ) -> dict[str, Tensor]:
        labels = [fact.true for fact in sample]
        permuted = random.Random(f"shuffled/{seed}").sample(labels, len(labels))
        rows = [model.encode(fact.prompt) for fact in sample]
        found = {"embedding": train(embeddings(model, rows), labels, self.c)}
        for (at, where), states in self._states(model, rows).items():
            found[f"{at}/{where}"] = train(states, labels, self.c)
            found[f"{at}/{where}/shuffled"] = train(states, permuted, self.c)
        return {
            f"{name}/{part}": getattr(probe, part)
            for name, probe in found.items()
            for part in ("weight", "bias")
        }

    def _states(self, model: ModelHandle, rows: Sequence[Tokens]) -> dict[_Where, Tensor]:
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
        groups = [("target", target, states), ("test", test, test_states)]
        yield from _baselines(row, model, trained, target, rows, states)
        refitted, protocol, cause = self._refit(model, facts, change, trained, relation)
        for split, group, found in groups:
            for where, at_place in found.items():
                place = _place(row, where, split)
                truth = [fact for _, fact in group]
                yield from _judge(place, "frozen", truth, at_place, trained.probes[where])
                if refitted is not None:
                    yield from _judge(place, protocol, truth, at_place, refitted[where])
                elif split == "test":
                    yield place(
                        metric="probe_accuracy", protocol="retrained", value=None, n=0, note=cause
                    )
        if refitted is None:
            yield from self._adaptive(row, model, target, states)

    def _refit(
        self,
        model: ModelHandle,
        facts: Splits,
        change: Change,
        trained: Trained,
        relation: str,
    ) -> tuple[Mapping[_Where, Probe] | None, str, str]:
        """Probes trained on the changed model's states of probe subjects, where that is defined."""
        if change.layer is None:
            return trained.probes, "retrained", ""
        if change.independent:
            return None, "retrained", "undefined for independent edits: no probe subject is edited"
        sample = [fact for fact in facts.probe if fact.relation == relation]
        rows = [model.encode(fact.prompt) for fact in sample]
        labels = [fact.true for fact in sample]
        coincide = any(map(_coincide, rows))
        probes = {
            where: train(found, labels, self.c)
            if change.reaches(*where, coincide)
            else trained.probes[where]
            for where, found in self._states(model, rows).items()
        }
        return probes, "retrained", ""

    def _adaptive(
        self,
        row: partial[Row],
        model: ModelHandle,
        target: Sequence[tuple[int, Fact]],
        states: Mapping[_Where, Tensor],
    ) -> Iterator[Row]:
        """Probes trained on *other* edited subjects with their original objects, cross-fitted."""
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
        for where in states:
            place = _place(row, where, "target")
            for fold in range(self.folds):
                kept = [s for s, (n, _) in enumerate(samples) if fold_of[n] != fold]
                labels = [truth[samples[s][0]] for s in kept]
                mine = [n for n in range(len(target)) if fold_of[n] == fold]
                judged = [target[n][1] for n in mine]
                if len(set(labels)) < 2:
                    yield from _undefined(place, "adaptive", judged, "fewer than two classes")
                    continue
                probe = train(extra[where][kept], labels, self.c)
                yield from _judge(place, "adaptive", judged, states[where][mine], probe)

    def _lens(
        self,
        row: partial[Row],
        model: ModelHandle,
        target: Sequence[Fact],
        states: Mapping[_Where, Tensor],
    ) -> Iterator[Row]:
        """Ranks of the objects' first tokens when the model's own head reads a layer."""
        objects = [
            (model.encode(fact.prompt, fact.true), model.encode(fact.prompt, fact.new or "-"))
            for fact in target
        ]
        first = torch.tensor([[old.ids[old.prompt], new.ids[new.prompt]] for old, new in objects])
        for layer in self.layers(model):
            with torch.no_grad():
                state = states[layer, "last_prompt"].to(model.device, model.model.dtype)
                scores = logits(model, model.final_norm(state)).cpu()
            ranks = 1 + (scores[:, None, :] > scores.gather(1, first)[:, :, None]).sum(-1)
            whole = scores.isfinite().all(1).tolist()
            found = zip(target, first.tolist(), ranks.tolist(), whole, strict=True)
            for fact, (old, new), rank, finite in found:
                place = _place(row, (layer, "last_prompt"), "target")
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


def _place(row: partial[Row], where: _Where, split: str) -> partial[Row]:
    layer, position = where
    return partial(row, layer=layer, position=position, split=split)


def labelled(rows: Iterable[Row], change: Change, coinciding: Collection[str]) -> Iterator[Row]:
    """The rows, with a note where a value is read that the change cannot have reached.

    Args:
        rows: of this axis.
        change: of the model.
        coinciding: ids of the facts whose prompt ends with its subject.
    """
    for row in rows:
        of_a_fact = None not in (row.value, row.fact_id, row.layer)
        where = cast(_Where, (row.layer, row.position))
        reached = not of_a_fact or change.reaches(*where, row.fact_id in coinciding)
        yield row if reached else replace(row, note=UPSTREAM)


def _judge(
    place: partial[Row], protocol: str, facts: Sequence[Fact], states: Tensor, probe: Probe
) -> Iterator[Row]:
    """One row a fact: whether the probe names its true object, if it knows it at all."""
    for fact, guess in zip(facts, probe.predict(states), strict=True):
        if fact.true not in probe.classes:
            yield from _undefined(place, protocol, [fact], "no training subject has its object")
            continue
        if guess is None:
            yield from _undefined(place, protocol, [fact], NOT_FINITE)
            continue
        yield place(
            metric="probe_accuracy",
            protocol=protocol,
            fact_id=fact.id,
            prompt_id=fact.prompt.id,
            value=float(guess == fact.true),
        )


def _undefined(
    place: partial[Row], protocol: str, facts: Sequence[Fact], cause: str
) -> Iterator[Row]:
    place = partial(place, metric="probe_accuracy", protocol=protocol, note=cause)
    for fact in facts:
        yield place(fact_id=fact.id, prompt_id=fact.prompt.id, value=None, n=0)


def _baselines(
    row: partial[Row],
    model: ModelHandle,
    trained: Trained,
    target: Sequence[tuple[int, Fact]],
    rows: Sequence[Tokens],
    states: Mapping[_Where, Tensor],
) -> Iterator[Row]:
    """What a guess, a probe with permuted labels and the bare names achieve on the target facts."""
    truth = [fact.true for _, fact in target]
    row = partial(row, metric="probe_baseline", split="target", n=len(truth))

    def share(place: partial[Row], guesses: Sequence[str | None]) -> Row:
        if None in guesses:
            return replace(place(value=None, note=NOT_FINITE), n=0)
        hits = sum(g == t for g, t in zip(guesses, truth, strict=True))
        return place(value=hits / len(truth))

    yield share(partial(row, protocol="majority"), [trained.majority] * len(truth))
    names = trained.embedding.predict(embeddings(model, rows))
    first = partial(row, protocol="embedding", layer=EMBEDDING, position="last_subject")
    yield share(first, names)
    for (layer, position), found in states.items():
        guesses = trained.shuffled[layer, position].predict(found)
        yield share(partial(row, protocol="shuffled", layer=layer, position=position), guesses)
