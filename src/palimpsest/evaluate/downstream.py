"""Downstream: what the model now says, about its facts and about everything else."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import ClassVar

from palimpsest.errors import RequestError, check_at_least
from palimpsest.evaluate.asking import (
    Answer,
    Query,
    ask,
    best,
    candidates,
    dealt,
    readable,
    withheld,
)
from palimpsest.evaluate.scene import Answers, Scene, ask_targets
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.facts.splits import Splits
from palimpsest.files import read_text
from palimpsest.model.forward import score
from palimpsest.model.handle import ModelHandle
from palimpsest.model.sample import start_ids
from palimpsest.model.site import Change
from palimpsest.model.tokens import Tokens
from palimpsest.record.row import Row

_OVERFLOW = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Downstream:
    """Efficacy, paraphrase, neighborhood, suppression, accuracy elsewhere, perplexity.

    Attributes:
        text: a held-out text file for the perplexity; None: the one that comes with Palimpsest.
        row_tokens: tokens in each row of that text, the model's prefix included.
    """

    text: str | None = None
    row_tokens: int = 128

    def __post_init__(self) -> None:
        """Check the length of a row, and that the text is there before hours of fitting.

        Raises:
            RequestError: a row too short to predict a token, or no text.
        """
        check_at_least("evaluate.downstream.row_tokens", self.row_tokens, 2)
        held_out(self.text)

    version: ClassVar[int] = 1
    along: ClassVar[bool] = True

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> None:
        """Nothing: what is said is told as it is."""

    def measure(self, scene: Scene, prepared: None) -> Iterator[Row]:
        """The rows of the axis `downstream`; definitions stand in docs/metrics.md.

        After so many edits of a sequence only what the facts so far and the text tell: how the
        first facts fare later on shows what is retained.
        """
        row = scene.row("downstream")
        yield from _asked(row, scene.facts, scene.change, scene.answers)
        if scene.step is None:
            yield from _accuracy(row, scene)
        yield self._perplexity(row, scene)

    def _perplexity(self, row: partial[Row], scene: Scene) -> Row:
        """Exp of the mean negative log-likelihood a token."""
        scores = score(scene.model, self._rows(scene))
        total = sum(s.tokens for s in scores)
        row = partial(row, metric="perplexity", protocol="heldout_text")
        if not total:
            return row(value=None, n=0, note="no fact could be changed")
        loss = -sum(s.logprob for s in scores) / total
        if not loss < _OVERFLOW:
            return row(value=None, n=0, note=f"{loss:.3g} nats a token: no finite perplexity")
        return row(value=math.exp(loss), n=total)

    def _rows(self, scene: Scene) -> list[Tokens]:
        model = scene.model
        start = start_ids(model)
        check_at_least("evaluate.downstream.row_tokens", self.row_tokens, len(start) + 1)
        ids = model.tokenizer(held_out(self.text), add_special_tokens=False)["input_ids"]
        fresh = self.row_tokens - len(start)
        parts = [ids[i : i + fresh] for i in range(0, len(ids), fresh)]
        owned = dealt(parts, scene.facts, scene.change, scene.seed)
        return [Tokens((*start, *part), len(start), None, owner) for owner, part in owned]


def worth(model: ModelHandle, facts: Splits, change: Change) -> float:
    """One number in [0, 1] to choose a layer by, for methods with a new object or without.

    The harmonic mean of `suppression` on unseen wordings and `neighborhood`, each a mean over
    facts; where facts have no neighbors, suppression alone. 0 where nothing has a value.
    """
    row = partial(Row, axis="downstream", scope=change.scope)
    rows = list(_asked(row, facts, change, ask_targets(model, facts)))
    unseen = [r for r in rows if r.metric == "suppression" and r.prompt_id != "fit"]
    gone = _mean_over_facts([r for r in unseen if r.protocol == "vocabulary"])
    near = [r for r in rows if r.metric == "neighborhood" and r.protocol == "probability"]
    means = [mean for mean in (gone, _mean_over_facts(near)) if mean is not None]
    return 0.0 if gone is None or 0.0 in means else harmonic_mean(means)


def held_out(path: str | None) -> str:
    """The held-out text.

    Raises:
        RequestError: the file is missing, empty, too large or not UTF-8.
    """
    if path is None:
        return (resources.files("palimpsest.evaluate") / "heldout.txt").read_text(encoding="utf-8")
    file = Path(path)
    text = read_text(file) if file.is_file() else ""
    if not text.strip():
        raise RequestError(
            f"expected a text file with words in it, found none at {path}; "
            "check evaluate.downstream.text"
        )
    return text


def _asked(row: partial[Row], facts: Splits, change: Change, answers: Answers) -> Iterator[Row]:
    """All values of the target facts' own prompts, and their score."""
    rows = [r for i, fact in enumerate(facts.target) for r in _of_fact(row, fact, answers[i])]
    rows = [withheld(r, change) for r in rows]
    yield from rows
    yield _harmonic_mean(row, rows)


def _of_fact(row: partial[Row], fact: Fact, answers: dict[str, Answer]) -> Iterator[Row]:
    """All values of one fact's own prompts."""
    row = partial(row, fact_id=fact.id, relation=fact.relation, split="target")
    for prompt in (fact.prompt, *fact.paraphrases):
        metric = "efficacy" if prompt is fact.prompt else "paraphrase"
        found = _about_fact(row, metric, prompt, answers[prompt.id], fact)
        yield from map(partial(readable, answers[prompt.id]), found)
    for prompt in fact.neighbors:
        answer = answers[prompt.id]
        found = _wins(row, "neighborhood", prompt, answer, fact.true, fact.new or "")
        yield from map(partial(readable, answer), found)


def _about_fact(
    row: partial[Row], metric: str, prompt: Prompt, answer: Answer, fact: Fact
) -> Iterator[Row]:
    """What one prompt about the fact says of its new object and its old one."""
    yield from _wins(row, metric, prompt, answer, fact.new or "", fact.true)
    chance = partial(row, protocol="string", prompt_id=prompt.id)
    yield chance(metric="old_probability", value=math.exp(answer[fact.true].logprob))
    if fact.new:
        yield chance(metric="new_probability", value=math.exp(answer[fact.new].logprob))
    gone = partial(row, metric="suppression", prompt_id=prompt.id)
    yield gone(protocol="candidates", value=float(best(answer) != fact.true))
    yield gone(protocol="vocabulary", value=float(not answer[fact.true].argmax))


def _wins(
    row: partial[Row], metric: str, prompt: Prompt, answer: Answer, winner: str, loser: str
) -> Iterator[Row]:
    """Whether `winner` beats `loser` by per-token probability, and whether it is the argmax."""
    ahead = answer[winner].mean_logprob > answer[loser].mean_logprob
    row = partial(row, metric=metric, prompt_id=prompt.id)
    yield row(protocol="probability", value=float(ahead))
    yield row(protocol="argmax", value=float(answer[winner].argmax))


def _harmonic_mean(row: partial[Row], rows: Sequence[Row]) -> Row:
    """CounterFact's S: the harmonic mean of the three means over facts."""
    row = partial(row, metric="score", protocol="harmonic_mean", split="target")
    means = []
    for metric in ("efficacy", "paraphrase", "neighborhood"):
        some = [r for r in rows if r.metric == metric and r.protocol == "probability"]
        mean = _mean_over_facts(some)
        if mean is None:
            return row(value=None, n=0, note=f"no {metric} prompts")
        means.append(mean)
    facts = len({r.fact_id for r in rows if r.value is not None})
    return row(value=0.0 if 0.0 in means else harmonic_mean(means), n=facts)


def _mean_over_facts(rows: Sequence[Row]) -> float | None:
    """The mean of the facts' means over their prompts; None where there is no value."""
    by_fact: dict[str | None, list[float]] = {}
    for row in rows:
        if row.value is not None:
            by_fact.setdefault(row.fact_id, []).append(row.value)
    return fmean(fmean(values) for values in by_fact.values()) if by_fact else None


def _accuracy(row: partial[Row], scene: Scene) -> Iterator[Row]:
    """Accuracy on test subjects of the relation and on other relations."""
    model, facts = scene.model, scene.facts
    test = scene.dealt(facts.test)
    queries = [Query(f.prompt, candidates(f, facts.classes[f.relation]), o) for o, f in test]
    for (_, fact), answer in zip(test, ask(model, queries), strict=True):
        one = partial(row, metric="relation_accuracy", split="test", fact_id=fact.id)
        one = partial(one, relation=fact.relation, prompt_id=fact.prompt.id)
        yield readable(answer, one(protocol="vocabulary", value=float(answer[fact.true].argmax)))
        yield readable(answer, one(protocol="candidates", value=float(best(answer) == fact.true)))
    others = scene.dealt(facts.others)
    queries = [Query(fact.prompt, [fact.true], owner) for owner, fact in others]
    for (_, fact), answer in zip(others, ask(model, queries), strict=True):
        one = partial(row, metric="other_accuracy", protocol="vocabulary", split="others")
        one = partial(one, fact_id=fact.id, relation=fact.relation, prompt_id=fact.prompt.id)
        yield readable(answer, one(value=float(answer[fact.true].argmax)))
