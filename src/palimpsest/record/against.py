"""Runs against one of them, fact by fact: the same facts vary less between methods than at all."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.errors import RequestError, nearest
from palimpsest.record.columns import HEADLINE, Column, Mean
from palimpsest.record.intervals import Estimate, facts_of, interval
from palimpsest.record.recoverable import recoverable, recoverable_beyond
from palimpsest.record.store import Run
from palimpsest.record.summary import Summary

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
        left_out: labels of those that were asked something else.
    """

    reference: Summary
    lines: tuple[Contrast, ...]
    left_out: tuple[str, ...]


def contrasts(summaries: Sequence[Summary], name: str) -> Contrasts:
    """Each run less the one of that label, or the only one of that method.

    Raises:
        RequestError: there is none, or several of that method.
    """
    reference = _named(summaries, name)
    others = [each for each in summaries if each is not reference]
    alike = [each for each in others if _asked(each.run) == _asked(reference.run)]
    lines = tuple(
        Contrast(each, {c.key: contrast(c, each.run, reference.run) for c in COLUMNS})
        for each in alike
    )
    left_out = tuple(each.label for each in others if each not in alike)
    return Contrasts(reference, lines, left_out)


def contrast(column: Column, run: Run, reference: Run) -> Estimate:
    """A run's number less another's, over the facts for which both have a value.

    The 95% percentile bootstrap resamples facts, each with its value on both sides. Numbers that
    are no single fact's have no interval.
    """
    if column.read is recoverable:
        return recoverable_beyond(run, reference)
    assert isinstance(column.read, Mean)
    mine, theirs = (
        [row for row in column.read.rows(each) if row.value is not None]
        for each in (run, reference)
    )
    if not mine or not theirs:
        return Estimate(None, note="one of the two has no value")
    if any(row.fact_id is None for row in (*mine, *theirs)):
        one, other = (column.read(each).value for each in (run, reference))
        return Estimate(None if one is None or other is None else one - other, n=len(mine))
    left, right = facts_of(mine), facts_of(theirs)
    common = sorted(left.keys() & right.keys())
    if not common:
        return Estimate(None, note="no fact has a value on both sides")
    each = np.array([left[fact][0] - right[fact][0] for fact in common])
    low, high = interval(each, tuple(left[fact][1] for fact in common))
    lacking = len(left.keys() | right.keys()) - len(common)
    note = f"{lacking} facts with a value on one side only are left out" if lacking else None
    return Estimate(float(each.mean()), low, high, len(common), note)


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
    if found:
        listed = ", ".join(repr(each.label) for each in found)
        raise RequestError(f"expected one run in --against, found {len(found)}; name it: {listed}")
    raise RequestError(
        f"expected --against to name one of the runs, found {name!r}; "
        f"{nearest(name, [each.label for each in summaries])}"
    )


def _asked(run: Run) -> Any:
    """What both must share: model, target facts, ruler, seed."""
    record = run.run
    ruler = (record.get("config") or {}).get("evaluate")
    facts = {row.fact_id for row in run.rows if row.split == "target"}
    return (record.get("model") or {}).get("fingerprint"), facts, ruler, record.get("seed")
