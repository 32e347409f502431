"""Runs against one of them, fact by fact: the same facts vary less between methods than at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from palimpsest.errors import RequestError, nearest
from palimpsest.record.results import Results, sql_text
from palimpsest.study import comparable
from palimpsest.study.columns import HEADLINE, NOT_MEASURED, Quantity, rows_of
from palimpsest.study.intervals import Estimate, Sample, estimates
from palimpsest.study.recoverable import UNLIKE, left_out, recoverable, recoverable_beyond
from palimpsest.study.study import Block, Study
from palimpsest.study.summary import Summary, summarise
from palimpsest.study.table import SHOWN, Cell, Heading, Line, Table

COLUMNS = tuple(c for c in HEADLINE if c.rows or c.read is recoverable)
"""The headline numbers that can be compared fact by fact: means over facts, and the index."""

_CAPTION = (
    "Each run’s number less that of {0}, over the same facts. Small type: 95% intervals of the "
    "facts’ differences; perplexity and score have none. Of recoverable only layers and positions "
    "count that were read on both sides. An interval that leaves out zero is one of many "
    "here, and some do so by chance. Compare scopes too: a change of a relation is paid for by its "
    "other subjects."
)


@dataclass(frozen=True)
class Against(Study):
    """Each run less one of them.

    Attributes:
        run: that one's label, or its method where no other run is of it; None for no comparison.
    """

    run: str | None = None

    def read(self, results: Results) -> Sequence[Block]:
        """A table of differences; nothing if no run was named.

        Raises:
            RequestError: no run has that name, or several have, or nothing can be compared to it.
        """
        if self.run is None:
            return ()
        found = contrasts(results, self.run)
        return [_shown(found), _listed(found)]


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


def contrasts(results: Results, name: str) -> Contrasts:
    """Each run less the one of that label, or the only one of that method.

    Raises:
        RequestError: there is none, or several of that method, or nothing to compare it with.
    """
    summaries = summarise(results)
    reference = _named(summaries, name)
    others = [each for each in summaries if each is not reference]
    alike = comparable.alike(results, reference.run)
    compared = [each for each in others if each.run.run_id in alike]
    if not compared:
        raise RequestError(
            f"expected other runs that were asked the same as {reference.label} (model, target "
            f"facts, splits, seed), found none among {len(others)}; choose another directory or run"
        )
    values = differences(results, reference, compared)
    lines = tuple(
        Contrast(each, {column.key: values[column.key][each.run.run_id] for column in COLUMNS})
        for each in compared
    )
    unlike = tuple(each.label for each in others if each not in compared)
    return Contrasts(reference, lines, unlike)


def differences(
    results: Results, reference: Summary, others: Sequence[Summary]
) -> dict[str, dict[str, Estimate]]:
    """The runs' numbers less one's, over prompts and facts with a value on both sides.

    Intervals are of the facts' differences, each with its value on both sides. Numbers that are no
    single fact's have no interval.

    Returns:
        by column key and run id.
    """
    ours, means = reference.run.run_id, [column.rows for column in COLUMNS if column.rows]
    pairs = _pairs(results, ours, means)
    made: dict[str, dict[str, Estimate]] = {}
    for column in COLUMNS:
        each = made.setdefault(column.key, {})
        for other in others:
            run = other.run.run_id
            if column.rows is None:
                each[run] = recoverable_beyond(results, run, ours)
            else:
                key = run, means.index(column.rows)
                sides = [s.values.get(column.key, NOT_MEASURED) for s in (other, reference)]
                each[run] = _difference(pairs.get(key), *sides)
    return made


@dataclass(frozen=True)
class _Pair:
    """A number of two runs.

    Attributes:
        difference: over the facts with values on both sides; None if there are none.
        facts: facts with a value on either side.
        single: whether all values are single facts'.
        alike: whether both sides were measured as in most runs.
        sides: on how many of the two there are values.
    """

    difference: Estimate | None
    facts: int
    single: bool
    alike: bool
    sides: int


def _pairs(results: Results, ours: str, means: Sequence[Quantity]) -> dict[tuple[str, int], _Pair]:
    """By run and number, what can be said of it against our run."""
    comparable.compared(results)
    results.query(
        f"""CREATE OR REPLACE TEMP TABLE asked AS
        WITH found AS ({rows_of(means, "prompt_id")}),
        ends AS (
            SELECT run_id, item, CASE WHEN count(*) = count(step) THEN max(step) END AS ending
            FROM found GROUP BY ALL
        )
        SELECT run_id, item, fact_id, relation, prompt_id, last(value) AS value,
            bool_and(alike) AS alike, bool_and(share) AS share
        FROM found JOIN ends USING (run_id, item)
        WHERE counts AND value IS NOT NULL AND step IS NOT DISTINCT FROM ending GROUP BY ALL"""
    )
    results.query(
        "CREATE OR REPLACE TEMP TABLE ours AS SELECT * EXCLUDE (run_id) FROM asked "
        f"WHERE run_id = {sql_text(ours)}"
    )
    drawn = estimates(_differences(results))
    records = results.query(
        """SELECT runs.run_id, runs.item, count(DISTINCT sides.fact_id),
            bool_and(sides.fact_id IS NOT NULL), bool_and(sides.alike),
            count(DISTINCT sides.side)
        FROM (SELECT DISTINCT run_id, item FROM asked) AS runs JOIN (
            SELECT run_id, item, fact_id, alike, 0 AS side FROM asked
            UNION ALL SELECT NULL, item, fact_id, alike, 1 FROM ours
        ) AS sides ON runs.item = sides.item AND coalesce(sides.run_id, runs.run_id) = runs.run_id
        GROUP BY ALL"""
    )
    return {
        (run, item): _Pair(drawn.get((run, item)), facts, single, alike, sides)
        for run, item, facts, single, alike, sides in records
    }


def _differences(results: Results) -> dict[tuple[str, int], Sample]:
    """Fact by fact, the mean over shared prompts of a run less ours, by run and number."""
    records = results.query(
        """WITH means AS (
            SELECT asked.run_id, item, fact_id, max(asked.relation) AS relation,
                avg(asked.value) - avg(ours.value) AS difference, bool_and(asked.share) AS share
            FROM asked JOIN ours USING (item, fact_id)
            WHERE asked.relation IS NOT DISTINCT FROM ours.relation
                AND asked.prompt_id IS NOT DISTINCT FROM ours.prompt_id
            GROUP BY ALL
        )
        SELECT run_id, item, list(difference ORDER BY fact_id), list(fact_id ORDER BY fact_id),
            list(relation ORDER BY fact_id), bool_and(share)
        FROM means GROUP BY ALL"""
    )
    return {
        (run, item): Sample(
            np.array(values),
            tuple(facts),
            tuple(relations),
            kind="difference" if share else "number",
        )
        for run, item, values, facts, relations, share in records
    }


def _difference(pair: _Pair | None, one: Estimate, other: Estimate) -> Estimate:
    if pair is None or pair.sides < 2:
        return Estimate(None, note="one of the two has no value")
    if not pair.alike:
        return Estimate(None, note=UNLIKE)
    if not pair.single:
        return _of_aggregates(one, other)
    if pair.difference is None:
        return Estimate(None, note="no fact has a value on both sides")
    return replace(pair.difference, note=left_out(pair.facts - pair.difference.n))


def _of_aggregates(one: Estimate, other: Estimate) -> Estimate:
    """The difference of numbers over the same things; null where their counts tell otherwise."""
    if one.value is None or other.value is None or one.n != other.n:
        return Estimate(None, note=f"not over the same: n = {one.n:,} and {other.n:,}")
    return Estimate(one.value - other.value, n=one.n, note=one.note or other.note)


def _shown(found: Contrasts) -> Table:
    """A line a run, a column a number."""
    first = Heading(title="method", short=f"less {found.reference.label}", style="words")
    notes: tuple[str, ...] = ()
    if found.unlike:
        asked = "Left out, as they were asked other facts, of another model or with another seed: "
        notes = (f"{asked}{', '.join(found.unlike)}.",)
    return Table(
        name="against",
        title=f"Against {found.reference.label}, fact by fact",
        caption=_CAPTION.format(found.reference.label),
        headings=[first, *(column.heading(signed=True) for column in COLUMNS)],
        lines=[
            line.summary.line(*(line.values[column.key] for column in COLUMNS))
            for line in found.lines
        ],
        notes=notes,
        footnotes=False,
        views=SHOWN,
    )


def _listed(found: Contrasts) -> Table:
    """A line a run and number."""
    parts = ("value", "low", "high", "n")
    names = ("label", "method", "run_id", "against", "number")
    lines = []
    for line in found.lines:
        run, against = line.summary.run, found.reference.run.run_id
        for key, value in line.values.items():
            name: tuple[Cell, ...] = (line.summary.label, run.method, run.run_id, against, key)
            lines.append(Line((*name, value, value.note)))
    return Table(
        name="against",
        headings=[
            *(Heading(title=name, style="words") for name in names),
            Heading(title="value", parts=parts),
            Heading(title="note", style="words"),
        ],
        lines=lines,
        views=("csv",),
    )


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
