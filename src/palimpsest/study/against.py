"""Runs against one of them, fact by fact: the same facts vary less between methods than at all."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.errors import RequestError, nearest
from palimpsest.record.row import Row
from palimpsest.record.store import Run
from palimpsest.study.columns import HEADLINE, Column, Mean
from palimpsest.study.intervals import Estimate, facts_of, interval
from palimpsest.study.recoverable import left_out, recoverable, recoverable_beyond
from palimpsest.study.summary import Summary

COLUMNS = tuple(c for c in HEADLINE if isinstance(c.read, Mean) or c.read is recoverable)
"""The headline numbers that can be compared fact by fact: means over facts, and the index."""


@dataclass(frozen=True)
class Contrast:
    """One run against another.

    Attributes:
        summary: the run.
        values: by column key, its value less the other's, with a paired interval.
    """

    summary: Summary
    values: Mapping[str, Estimate]


@dataclass(frozen=True)
class Contrasts:
    """All runs that were asked the same as one of them, against it.

    Attributes:
        reference: that one.
        lines: the others, in the order of the table.
        unlike: labels of those that were asked something else, and are left out.
    """

    reference: Summary
    lines: tuple[Contrast, ...]
    unlike: tuple[str, ...]


def contrasts(summaries: Sequence[Summary], name: str) -> Contrasts:
    """Each run less the one of that label, or the only one of that method.

    Raises:
        RequestError: there is none, or several of that method, or nothing to compare it with.
    """
    reference = _named(summaries, name)
    others = [each for each in summaries if each is not reference]
    alike = [each for each in others if _asked(each.run) == _asked(reference.run)]
    lines = tuple(
        Contrast(each, {c.key: contrast(c, each.run, reference.run) for c in COLUMNS})
        for each in alike
    )
    if not lines:
        raise RequestError(
            f"expected other runs that were asked the same as {reference.label} (model, target "
            f"facts, ruler, seed), found none among {len(others)}; choose another directory or run"
        )
    unlike = tuple(each.label for each in others if each not in alike)
    return Contrasts(reference, lines, unlike)


def contrast(column: Column, run: Run, reference: Run) -> Estimate:
    """A run's number less another's, over the prompts and facts that have a value on both sides.

    The 95% percentile bootstrap resamples facts, each with its value on both sides. Numbers that
    are no single fact's have no interval.
    """
    if column.read is recoverable:
        return recoverable_beyond(run, reference)
    assert isinstance(column.read, Mean)
    sides = [
        {_asked_by(row): row for row in column.read.rows(each) if row.value is not None}
        for each in (run, reference)
    ]
    if not all(sides):
        return Estimate(None, note="one of the two has no value")
    if any(row.fact_id is None for side in sides for row in side.values()):
        return _of_aggregates(*(column.read(each) for each in (run, reference)))
    shared = sides[0].keys() & sides[1].keys()
    left, right = (facts_of([side[key] for key in shared]) for side in sides)
    if not left:
        return Estimate(None, note="no fact has a value on both sides")
    each = np.array([left[fact][0] - right[fact][0] for fact in left])
    low, high = interval(each, tuple(relation for _, relation in left.values()))
    facts = {row.fact_id for side in sides for row in side.values()}
    return Estimate(float(each.mean()), low, high, len(left), left_out(len(facts) - len(left)))


def _asked_by(row: Row) -> tuple[str | None, ...]:
    return row.fact_id, row.relation, row.prompt_id


def _of_aggregates(one: Estimate, other: Estimate) -> Estimate:
    """The difference of numbers over the same things; null where their counts tell otherwise."""
    if one.value is None or other.value is None or one.n != other.n:
        return Estimate(None, note=f"not over the same: n = {one.n:,} and {other.n:,}")
    return Estimate(one.value - other.value, n=one.n, note=one.note or other.note)


def to_csv(found: Contrasts) -> str:
    """One line per run and number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["label", "method", "run_id", "against", "number", "value", "low", "high", "n", "note"]
    )
    for line in found.lines:
        identity = [line.summary.label, line.summary.method, line.summary.run.run_id]
        for key, e in line.values.items():
            against = found.reference.run.run_id
            writer.writerow([*identity, against, key, e.value, e.low, e.high, e.n, e.note])
    return text.getvalue()


def _named(summaries: Sequence[Summary], name: str) -> Summary:
    found = [each for each in summaries if each.label == name]
    found = found or [each for each in summaries if each.method == name]
    if len(found) == 1:
        return found[0]
    labels = [each.label for each in (found or summaries)]
    if found:
        listed = ", ".join(map(repr, labels))
        raise RequestError(f"expected one run in --against, found {len(found)}; name it: {listed}")
    hint = nearest(name, labels) if labels else "only traces are here"
    raise RequestError(f"expected --against to name one of the runs, found {name!r}; {hint}")


def _asked(run: Run) -> Any:
    """What both must share: model, data, target facts, ruler, seed."""
    model, config = run.run.get("model") or {}, run.run.get("config") or {}
    data = (run.run.get("facts") or {}).get("fingerprint")
    facts = {row.fact_id for row in run.rows if row.split == "target"}
    prefix = (config.get("model") or {}).get("prefix")
    return (
        model.get("fingerprint"),
        prefix,
        data,
        facts,
        config.get("evaluate"),
        run.run.get("seed"),
    )
