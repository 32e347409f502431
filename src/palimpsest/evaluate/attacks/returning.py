"""Helpers shared by attacks on weights: does the original object win again?"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

from palimpsest.errors import RequestError
from palimpsest.evaluate.asking import Answer, Query, ask, best, candidates, readable
from palimpsest.evaluate.scene import Answers
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from palimpsest.record.row import Row

INDEPENDENT = "undefined for independent edits: no weight holds them all; use protocol=batch"
"""Why weights cannot be trained: each fact's change is felt by its own prompts alone."""


def ask_unseen(model: ModelHandle, facts: Splits, fitted: bool) -> Answers:
    """Put every target fact's paraphrases to the model.

    Args:
        model: as it stands.
        facts: whose targets are asked about.
        fitted: ask the fit prompts too.
    """
    queries = [
        query
        for owner, fact in enumerate(facts.target)
        for query in unseen(fact, facts, owner, fitted)
    ]
    answers: Answers = [{} for _ in facts.target]
    for query, answer in zip(queries, ask(model, queries), strict=True):
        answers[query.owner][query.prompt.id] = answer
    return answers


def unseen(fact: Fact, facts: Splits, owner: int, fitted: bool = False) -> list[Query]:
    """A target fact's paraphrases over the relation's candidates, for `fitted` its fit prompt too.

    Args:
        fact: asked about.
        facts: with the relation's objects.
        owner: whose change the prompts feel.
        fitted: ask the fit prompt too.
    """
    names = candidates(fact, facts.classes[fact.relation])
    prompts = (*([fact.prompt] if fitted else []), *fact.paraphrases)
    return [Query(prompt, names, owner) for prompt in prompts]


def old_wins(row: partial[Row], fact: Fact, said: Sequence[Answer]) -> Row:
    """Share of the answers in which the true object beats all other candidates as a whole string.

    Args:
        row: of everything but the fact and the value.
        fact: asked about.
        said: answers over the relation's candidates; null if there are none.
    """
    row = partial(row, fact_id=fact.id, relation=fact.relation)
    if not said:
        return row(value=None, n=0, note="no prompts")
    found = row(value=fmean(best(answer) == fact.true for answer in said), n=len(said))
    for answer in said:
        found = readable(answer, found)
    return found


def undefined(row: Row, cause: str | None) -> Row:
    """The row; null if there is a cause."""
    return row if cause is None else replace(row, value=None, n=0, note=cause)


def check_distinct(name: str, values: Sequence[int]) -> None:
    """Refuse a setting that names a value twice: their rows could not be told apart.

    Raises:
        RequestError: names the setting and what was found.
    """
    if len(set(values)) < len(values):
        raise RequestError(
            f"expected {name} to name each value once, found {list(values)}; drop the second one"
        )
