"""Consistency: does the model agree with itself about a changed fact?"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal, get_args

from palimpsest.evaluate.asking import Query, ask, best, readable
from palimpsest.evaluate.downstream import Answers
from palimpsest.facts.fact import Fact, Question
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.record.row import Row

Verdict = Literal["new", "old", "neither"]

Premises = Mapping[tuple[str, str], bool]
"""By (premise text, answer), whether the unchanged model answers it."""


@dataclass(frozen=True)
class Consistency:
    """Agreement across paraphrases, and entailed two-hop questions."""

    def prepare(self, model: ModelHandle, facts: Splits) -> Premises:
        """Ask the unchanged model every second hop of the target facts' questions."""
        wanted = {
            (question.premises[name].text, question.answers[name]): question.premises[name]
            for fact in facts.target
            for question in fact.entailed
            for name in (fact.true, fact.new or "")
            if name in question.answers
        }
        queries = [Query(prompt, [answer]) for (_, answer), prompt in wanted.items()]
        replies = ask(model, queries)
        return {key: reply[key[1]].argmax for key, reply in zip(wanted, replies, strict=True)}

    def measure(
        self,
        model: ModelHandle,
        facts: Splits,
        change: Change,
        answers: Answers,
        premises: Premises,
    ) -> Iterator[Row]:
        """The rows of the axis `consistency`; definitions stand in docs/metrics.md."""
        row = partial(Row, axis="consistency", scope=change.scope, split="target")
        for owner, fact in enumerate(facts.target):
            mine = partial(row, fact_id=fact.id, relation=fact.relation)
            said = [answers[owner][prompt.id] for prompt in fact.paraphrases]
            rows = _agreement(mine, fact, [best(answer) for answer in said])
            for answer in said:
                rows = map(partial(readable, answer), rows)
            yield from rows
        yield from _two_hop(row, model, facts, premises)


def _agreement(row: partial[Row], fact: Fact, tops: list[str]) -> Iterator[Row]:
    """Shares of pairs of paraphrases whose top candidates agree, and agree on the object."""
    pairs = list(combinations(tops, 2))
    for metric, protocol, wanted in (
        ("agreement", "paraphrase_pairs", None),
        ("agreement_correct", "true", fact.true),
        ("agreement_correct", "new", fact.new),
    ):
        hits = [a == b and wanted in (None, a) for a, b in pairs]
        value = sum(hits) / len(pairs) if pairs else None
        note = None if pairs else "fewer than two paraphrases"
        yield row(metric=metric, protocol=protocol, value=value, n=len(pairs), note=note)


def _two_hop(
    row: partial[Row], model: ModelHandle, facts: Splits, premises: Premises
) -> Iterator[Row]:
    """Whether each entailed question is answered by the new fact, the old one, or neither."""
    asked = []
    for owner, fact in enumerate(facts.target):
        for question in fact.entailed:
            cause = _unanswerable(fact, question, premises)
            place = partial(row, fact_id=fact.id, relation=fact.relation, prompt_id=question.id)
            if cause is not None:
                yield from _verdicts(place, None, cause)
                continue
            options = sorted(set(question.answers.values()))
            asked.append((place, fact, question, Query(question.prompt, options, owner)))
    replies = ask(model, [query for *_, query in asked])
    for (place, fact, question, _), reply in zip(asked, replies, strict=True):
        old, new = question.answers[fact.true], question.answers[fact.new or ""]
        by_vocabulary = next((name for name in (new, old) if reply[name].argmax), None)
        for protocol, said in (("vocabulary", by_vocabulary), ("candidates", best(reply))):
            verdicts = _verdicts(partial(place, protocol=protocol), verdict(said, [old], [new]))
            yield from map(partial(readable, reply), verdicts)


def verdict(said: str | None, old: Collection[str], new: Collection[str]) -> Verdict:
    """Which fact an answer follows: `old`, `new` or `neither`.

    Args:
        said: the answer; None if there is none.
        old: answers that follow from the old fact.
        new: answers that follow from the new one.
    """
    if said in new:
        return "new"
    return "old" if said in old else "neither"


def _unanswerable(fact: Fact, question: Question, premises: Premises) -> str | None:
    """Why a question cannot tell the new fact from the old; None if it can."""
    names = (fact.true, fact.new or "")
    if not all(name in question.answers for name in names):
        return "no answer is known for one of the objects"
    if len({question.answers[name] for name in names}) < 2:
        return "old and new fact entail the same answer"
    if not all(premises[question.premises[n].text, question.answers[n]] for n in names):
        return "the unchanged model does not answer the second hop"
    return None


def _verdicts(row: partial[Row], found: Verdict | None, note: str | None = None) -> Iterator[Row]:
    protocols = [row] if "protocol" in row.keywords else [
        partial(row, protocol=protocol) for protocol in ("vocabulary", "candidates")
    ]  # fmt: skip
    for each in protocols:
        for kind in get_args(Verdict):
            value = None if found is None else float(found == kind)
            yield each(metric=f"twohop_{kind}", value=value, n=int(found is not None), note=note)
