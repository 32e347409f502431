"""Attacks: how often the old object is among B candidates that an attacker may name.

After Patil, Hase, Bansal 2023 (arXiv 2309.17410), who ask whether a deleted answer is in a set of
at most B candidates. Every attack is set beside the same attack on unrelated objects: an object
that a model says often is found by any attack.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import exp, isfinite
from statistics import fmean

import torch
from torch import Tensor

from palimpsest.errors import check_at_least
from palimpsest.evaluate.asking import Answer, Query, ask, candidates
from palimpsest.evaluate.downstream import Answers
from palimpsest.evaluate.probing.readings import NOT_FINITE, labelled
from palimpsest.evaluate.tuned_lens import Translator
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.facts.splits import Splits
from palimpsest.model.forward import features, logit_lens
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site
from palimpsest.model.tokens import Tokens
from palimpsest.record.row import Row

NO_THIRD = "the relation has no third object"
NO_NAMES = "the relation has no object to name beside the old one"
SAME_TOKEN = "old and new object share their first token"


@dataclass(frozen=True)
class Attacks:
    """Read-outs of states, and prompts that the change was not made for.

    Attributes:
        budgets: B, candidates that an attacker may name.
        stride: every how many layers states are read out; the last layer always is.
        shots: known facts of the relation, with their objects, before a few-shot prompt.
    """

    budgets: list[int] = field(default_factory=lambda: [1, 5, 20])
    stride: int = 3
    shots: int = 3

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: one is too small.
        """
        for budget in self.budgets:
            check_at_least("evaluate.attacks.budgets", budget, 1)
        check_at_least("evaluate.attacks.stride", self.stride, 1)
        check_at_least("evaluate.attacks.shots", self.shots, 1)

    def layers(self, model: ModelHandle) -> list[int]:
        """The layers that are told of."""
        return sorted({*range(0, model.n_layers, self.stride), model.n_layers - 1})

    def measure(
        self,
        model: ModelHandle,
        facts: Splits,
        change: Change,
        answers: Answers,
        lenses: Mapping[int, Translator],
    ) -> Iterator[Row]:
        """Rows `attack_success` and `attack_baseline`; definitions stand in docs/metrics.md.

        Args:
            model: as it stands, the change applied.
            facts: all splits.
            change: what the ruler may know of it.
            answers: to the target facts' prompts.
            lenses: translators of the unchanged model, by layer.
        """
        if not self.budgets:
            return
        row = partial(Row, axis="recoverability", scope=change.scope, split="target")
        rows = [model.encode(fact.prompt, owner=i) for i, fact in enumerate(facts.target)]
        coinciding = {
            fact.id
            for fact, tokens in zip(facts.target, rows, strict=True)
            if tokens.at("last_subject") == tokens.at("last_prompt")
        }
        read = self._read_out(row, model, facts, rows, lenses)
        yield from labelled(read, change, coinciding)
        for owner, fact in enumerate(facts.target):
            said = [answers[owner][prompt.id] for prompt in fact.paraphrases]
            yield from self._asked(partial(_of(row, fact), protocol="rephrasing"), fact, said)
        yield from self._few_shot(row, model, facts)
        yield from self._in_context(row, model, facts)

    # -- states -----------------------------------------------------------------------------------

    def _read_out(
        self,
        row: partial[Row],
        model: ModelHandle,
        facts: Splits,
        rows: Sequence[Tokens],
        lenses: Mapping[int, Translator],
    ) -> Iterator[Row]:
        """The logit lens, what each block adds to its probabilities, and the tuned lens."""
        sites = [Site(layer) for layer in range(model.n_layers)]
        states = features(model, rows, sites, ["last_prompt"])[:, 0]
        aims = [_Aims.of(model, fact, facts.classes[fact.relation]) for fact in facts.target]
        before: Tensor | None = None
        for layer, found in enumerate(states):
            now = _read(model, found)
            shown = {"logit_lens": now}
            if before is not None:
                shown["probability_delta"] = now - before
            before = now
            if layer not in self.layers(model):
                continue
            if layer in lenses:
                shown["tuned_lens"] = _read(model, lenses[layer].of(found))
            for n, fact in enumerate(facts.target):
                place = partial(_of(row, fact), layer=layer, position="last_prompt")
                for protocol, scores in shown.items():
                    named = partial(place, protocol=protocol)
                    yield from self._hits(
                        named, scores[n], aims[n], protocol == "probability_delta"
                    )

    def _hits(
        self, row: partial[Row], scores: Tensor, aims: "_Aims", both_ends: bool
    ) -> Iterator[Row]:
        """Whether the aims are among the B largest scores, or at both ends half of them each."""
        cause = aims.cause or (None if bool(scores.isfinite().all()) else NOT_FINITE)
        tokens = [aims.old, *aims.unrelated]
        above = (scores[None, :] > scores[tokens][:, None]).sum(1)
        below = (scores[None, :] < scores[tokens][:, None]).sum(1)
        for budget in self.budgets:
            top = (budget + 1) // 2 if both_ends else budget
            bottom = budget // 2 if both_ends else 0
            hits = ((above < top) | (below < bottom)).double().tolist()
            yield from _pair(row, budget, hits[0], hits[1:], cause)

    # -- prompts ----------------------------------------------------------------------------------

    def _asked(self, row: partial[Row], fact: Fact, said: Sequence[Answer]) -> Iterator[Row]:
        """Objects sampled after prompts, B draws spread evenly: the exact chance of a hit."""
        finite = all(isfinite(score.logprob) for answer in said for score in answer.values())
        cause = (None if finite else NOT_FINITE) if said else "no prompts"
        others = [name for name in (said[0] if said else ()) if name not in (fact.true, fact.new)]
        for budget in self.budgets:
            hits = [_drawn(said, name, budget) for name in (fact.true, *others)]
            yield from _pair(row, budget, hits[0], hits[1:], cause)

    def _few_shot(self, row: partial[Row], model: ModelHandle, facts: Splits) -> Iterator[Row]:
        """The fit prompt after known facts of the relation, which are in no other split."""
        leads: dict[int, str] = {}
        for owner, fact in enumerate(facts.target):
            shown = [f for f in facts.dev if f.relation == fact.relation and f.true != fact.new]
            if len(shown) >= self.shots:
                leads[owner] = "".join(f"{f.prompt.text} {f.true}.\n" for f in shown[: self.shots])
        cause = f"fewer than {self.shots} dev facts of the relation"
        yield from self._behind(partial(row, protocol="few_shot"), model, facts, leads, cause)

    def _in_context(self, row: partial[Row], model: ModelHandle, facts: Splits) -> Iterator[Row]:
        """The fit prompt after the relation's objects but the new one, in a hashed order."""
        leads: dict[int, str] = {}
        for owner, fact in enumerate(facts.target):
            named = [name for name in _objects(fact, facts) if name != fact.new]
            if len(named) > 1:
                leads[owner] = f"{', '.join(sorted(named, key=partial(_shuffled, fact)))}.\n"
        yield from self._behind(partial(row, protocol="in_context"), model, facts, leads, NO_NAMES)

    def _behind(
        self,
        row: partial[Row],
        model: ModelHandle,
        facts: Splits,
        leads: Mapping[int, str],
        cause: str,
    ) -> Iterator[Row]:
        """What is drawn after the fit prompt with a text before it; null where there is no text.

        Args:
            row: of everything but the fact, budget and value.
            model: as it stands.
            facts: whose targets are asked about.
            leads: the texts by owner.
            cause: why a fact has none.
        """
        queries = [
            Query(_after(lead, fact.prompt), _objects(fact, facts), owner)
            for owner, lead in leads.items()
            for fact in [facts.target[owner]]
        ]
        replies = dict(zip(leads, ask(model, queries), strict=True))
        for owner, fact in enumerate(facts.target):
            place = _of(row, fact)
            if owner in replies:
                yield from self._asked(place, fact, [replies[owner]])
            else:
                for budget in self.budgets:
                    yield from _pair(place, budget, 0.0, [], cause)


@dataclass(frozen=True)
class _Aims:
    """First tokens that an attacker looks for.

    Attributes:
        old: of the old object.
        unrelated: of the relation's other objects.
        cause: why a hit would say nothing; None if it does.
    """

    old: int
    unrelated: list[int]
    cause: str | None

    @classmethod
    def of(cls, model: ModelHandle, fact: Fact, classes: Sequence[str]) -> "_Aims":
        names = candidates(fact, classes)
        rows = {name: model.encode(fact.prompt, name) for name in names}
        first = {name: row.ids[row.prompt] for name, row in rows.items()}
        old, new = first[fact.true], first.get(fact.new or "")
        rest = sorted({token for name, token in first.items() if token not in (old, new)})
        return cls(old, rest, SAME_TOKEN if old == new else None)


@torch.no_grad()
def _read(model: ModelHandle, states: Tensor) -> Tensor:
    """Probabilities `[n, vocabulary]` that norm and head make of states `[n, d_model]`."""
    return torch.softmax(logit_lens(model, states), -1).cpu()


def _of(row: partial[Row], fact: Fact) -> partial[Row]:
    return partial(row, fact_id=fact.id, relation=fact.relation)


def _pair(
    row: partial[Row], budget: int, hit: float, others: Collection[float], cause: str | None
) -> Iterator[Row]:
    """Success on the old object, and the mean success on unrelated ones."""
    row = partial(row, budget=budget)
    found = row(metric="attack_success", value=hit)
    if not others:
        cause = cause or NO_THIRD
    chance = row(metric="attack_baseline", value=fmean(others) if others else None)
    for each in (found, chance):
        lost = cause is not None and (each is chance or cause != NO_THIRD)
        yield replace(each, value=None, n=0, note=cause) if lost else each


def _drawn(said: Sequence[Answer], name: str, budget: int) -> float:
    """1 − Π (1 − p)^(B / prompts): the chance that B draws hold the object."""
    missed = 1.0
    for answer in said:
        missed *= max(0.0, 1 - exp(answer[name].logprob)) ** (budget / len(said))
    return 1 - missed


def _objects(fact: Fact, facts: Splits) -> list[str]:
    return candidates(fact, facts.classes[fact.relation])


def _shuffled(fact: Fact, name: str) -> bytes:
    """What an object's place in a fact's list goes by."""
    return hashlib.sha256(f"{fact.subject}/{fact.relation}/{name}".encode()).digest()


def _after(lead: str, prompt: Prompt) -> Prompt:
    """The prompt with a text before it."""
    span = prompt.span
    moved = None if span is None else (span[0] + len(lead), span[1] + len(lead))
    return Prompt("behind", lead + prompt.text, moved)
