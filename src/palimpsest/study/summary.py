"""Headline numbers of runs: one summary each, ordered for reading."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from palimpsest.record.results import Results, Run
from palimpsest.study.columns import NOT_MEASURED, headline
from palimpsest.study.comparable import compared
from palimpsest.study.intervals import Estimate, estimates
from palimpsest.study.labels import labels
from palimpsest.study.recoverable import FAMILIES, ZONES, families, profiles
from palimpsest.study.samples import picked, samples
from palimpsest.study.table import Cell, Line

TRACE = "trace"
"""The method of runs that traced facts instead of changing them."""


@dataclass(frozen=True)
class Summary:
    """One run in numbers.

    Attributes:
        run: the run.
        label: its name among the runs summarised with it; distinct.
        n_facts: facts that the method was to change, those that it failed on included.
        failed: by fact id, why the method could not change that fact; its values are missing.
        imitates: label (or name) of the run that this control imitates; None if it is no control.
        scopes: what the method changed: `fact`, `relation`.
        oracle_gate: whether the method was told where the subject stands or which prompts matter.
        values: the headline numbers, by column key.
    """

    run: Run
    label: str
    n_facts: int
    failed: Mapping[str, str]
    imitates: str | None
    scopes: tuple[str, ...]
    oracle_gate: bool
    values: Mapping[str, Estimate]

    @property
    def method(self) -> str:
        """The method's name."""
        return self.run.method

    @property
    def failure(self) -> str:
        """How many facts the method failed on, and why; empty if on none."""
        if not self.failed:
            return ""
        causes = "; ".join(dict.fromkeys(self.failed.values()))
        count = f"{len(self.failed):,} of {self.n_facts:,} facts failed"
        return f"{count} ({causes}). They are in no value, and n counts the others."

    def line(self, *cells: Cell, note: bool = False) -> Line:
        """A line of a table about the run: its label, and then some cells.

        Args:
            cells: one for each further heading.
            note: whether the label has a footnote on the facts that the method failed on.
        """
        gate = ("oracle gate: it was told where the subject stands or which prompts matter",)
        told = note and bool(self.failed)
        return Line(
            (self.label, *cells),
            control_of=self.imitates,
            unchanged=self.method == "none",
            small=(f"scope: {', '.join(self.scopes)}", *(gate if self.oracle_gate else ())),
            note=f"{self.label}: {self.failure}" if told else "",
            causes="; ".join(sorted(set(self.failed.values()))) if told else "",
        )


@dataclass(frozen=True)
class _About:
    """What all rows of a run say together."""

    n_facts: int = 0
    scopes: tuple[str, ...] = ()
    oracle_gate: bool = False
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Detail:
    """One measured quantity of all runs.

    Attributes:
        axis: its panel.
        metric: its name.
        protocol: its definition's name.
        place: what else tells it apart: split, kind of prompt, layer, budget.
        values: one estimate per summary, in order; None where a run has no such row.
    """

    axis: str
    metric: str
    protocol: str
    place: str
    values: tuple[Estimate | None, ...]


@lru_cache(maxsize=2)
def summarise(results: Results) -> tuple[Summary, ...]:
    """One summary per run that changed a model, in reading order.

    `none` first, then methods by label, each followed by its controls.
    """
    runs = [run for run in results.runs if run.method != TRACE]
    named = list(zip(runs, labels(runs), strict=True))
    numbers, about = headline(results), _about(results)
    summaries = [
        _summary(
            run,
            _imitated(run, named),
            label,
            about.get(run.run_id, _About()),
            {key: found.get(run.run_id, NOT_MEASURED) for key, found in numbers.items()},
        )
        for run, label in named
    ]
    return tuple(sorted(summaries, key=_reading_order))


def details(results: Results) -> list[Detail]:
    """Every measured quantity that is not a curve over layers, averaged over facts.

    What is recoverable, zone by zone and by each family of attacks, leads them.
    """
    order = {axis: place for place, axis in enumerate(_AXES)}
    found = estimates(samples(results, _quantities(results), _QUANTITY))
    keys = sorted({key[1:] for key in found}, key=lambda key: (order[key[0]], key))
    runs = [summary.run.run_id for summary in summarise(results)]
    measured = [
        Detail(
            axis,
            metric,
            protocol,
            place,
            tuple(found.get((run, axis, metric, protocol, place)) for run in runs),
        )
        for axis, metric, protocol, place in keys
    ]
    return [*_profiles(results, runs), *measured]


def _profiles(results: Results, runs: Sequence[str]) -> Iterator[Detail]:
    """What is recoverable in each zone of a run's change, and by each family of attacks."""
    parts = ((ZONES, profiles(results), "{}"), (FAMILIES, families(results), "by {} alone"))
    for names, found, place in parts:
        for name in names:
            values = tuple(found.get(run, {}).get(name) for run in runs)
            if any(values):
                told = place.format(name)
                yield Detail("recoverability", "recoverable_old", "index", told, values)


_AXES = ("downstream", "recoverability", "consistency", "localization", "cost")
_QUANTITY = ("axis", "metric", "protocol", "place")


def _quantities(results: Results) -> str:
    """Rows that are no curves, by what they measure; several layers of a metric stay apart."""
    compared(results)
    return f"""WITH flat AS (
        SELECT *, split_part(coalesce(prompt_id, ''), '/', 1) AS kind FROM compared
        WHERE axis = 'cost' OR (layer IS NULL AND position IS NULL)
    ), layers AS (
        SELECT run_id, metric, count(DISTINCT coalesce(layer, -9)) > 1 AS several FROM flat
        GROUP BY ALL
    ), placed AS (
        SELECT flat.*, concat_ws(', ', nullif(split, ''),
            nullif(if(kind = 'fit', 'fit prompt, in-sample', kind), ''),
            if(several AND layer IS NOT NULL, 'layer ' || layer, NULL),
            'budget ' || budget) AS place
        FROM flat JOIN layers USING (run_id, metric)
    )
    {picked("true", *_QUANTITY).replace("compared", "placed")}"""


def _about(results: Results) -> dict[str, _About]:
    """By run what its rows say of its facts, its scopes, its gate and what it failed on."""
    failed = _failed(results)
    records = results.query(
        "SELECT run_id, list(DISTINCT scope), bool_or(contains(coalesce(note, ''), 'oracle_gate')),"
        " count(DISTINCT fact_id) FILTER (split = 'target') FROM rows GROUP BY run_id"
    )
    return {
        run_id: _About(n_facts, tuple(sorted(scopes)), gate, failed.get(run_id, {}))
        for run_id, scopes, gate, n_facts in records
    }


def _failed(results: Results) -> dict[str, dict[str, str]]:
    """By run the target facts of which nothing downstream has a value, with the cause."""
    compared(results)
    condition = "axis = 'downstream' AND split = 'target'"
    causes: dict[str, dict[str, str]] = {}
    for run_id, fact, cause in results.query(
        f"""WITH found AS (SELECT * FROM compared WHERE {condition}),
        ends AS (
            SELECT run_id, CASE WHEN count(*) = count(step) THEN max(step) END AS ending
            FROM found GROUP BY ALL
        )
        SELECT run_id, fact_id, last(note ORDER BY metric, protocol, prompt_id NULLS FIRST)
        FROM found JOIN ends USING (run_id)
        WHERE fact_id IS NOT NULL AND step IS NOT DISTINCT FROM ending
        GROUP BY ALL HAVING count(value) = 0 ORDER BY ALL"""
    ):
        causes.setdefault(run_id, {})[fact] = cause or "no cause given"
    return causes


def _summary(
    run: Run,
    imitates: str | None,
    label: str,
    about: _About,
    values: Mapping[str, Estimate],
) -> Summary:
    return Summary(
        run=run,
        label=label,
        n_facts=about.n_facts or len(run.facts),
        failed=about.failed,
        imitates=imitates,
        scopes=about.scopes,
        oracle_gate=about.oracle_gate,
        values=values,
    )


def _imitated(run: Run, named: Sequence[tuple[Run, str]]) -> str | None:
    """The label of the run named by `imitates` (its run_id, or its method if there is only one)."""
    wanted = run.run.get("imitates")
    if not wanted:
        return None
    by_id = [label for other, label in named if other.run_id == wanted]
    by_method = [label for other, label in named if other.method == wanted]
    found = by_id or by_method
    return found[0] if len(found) == 1 else str(wanted)


def _reading_order(summary: Summary) -> tuple[Any, ...]:
    control = summary.imitates is not None
    leader = _natural(summary.imitates or summary.label)
    return (summary.method != "none", leader, control, _natural(summary.label))


def _natural(label: str) -> list[tuple[bool, float, str]]:
    """A key that sorts the numbers in a label by size."""
    parts = re.split(r"(\d+(?:\.\d+)?)", label)
    return [(bool(i % 2), float(p) if i % 2 else 0.0, p) for i, p in enumerate(parts)]
