"""What a directory of runs found: one self-contained page, and its table as CSV and LaTeX."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import plotly.offline

from palimpsest.files import write_text
from palimpsest.record import figures, tables
from palimpsest.record.columns import HEADLINE, Column
from palimpsest.record.intervals import RESAMPLES, Estimate
from palimpsest.record.labels import differences
from palimpsest.record.sequences import (
    FIRST,
    SHOWN,
    Course,
    Measure,
    Stage,
    columns,
    courses,
    gaps,
    heading,
)
from palimpsest.record.store import load_runs, load_unfinished
from palimpsest.record.style import styles
from palimpsest.record.summary import Detail, Summary, details, summarise
from palimpsest.record.text import DASH, direction_text, interval_text, plain, value_text

MAX_PANELS = 60
"""Facts with a panel of their own; the page stays light, and rows.parquet holds the others."""

AXES = {
    "downstream": ("Downstream", "what the model says, of the facts and of everything else"),
    "recoverability": ("Recoverability", "what can still be read from its states"),
    "consistency": ("Consistency", "whether it agrees with itself"),
}
"""Groups of headline columns: title and one line."""

CAPTIONS = {
    "recoverability": "How well a linear probe reads the old object from the state after each "
    "layer; a method that only changed what the model says stays up. Controls have open "
    "markers and the colour of the run they imitate.",
    "trade_off": "What was kept on untouched subjects against what can still be read of the old "
    "object at the deepest measured layer; bars are 95% intervals.",
    "two_hop": "Answers to questions that the facts entail: a model that agrees with itself about "
    "a new object answers them with the new one.",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table as text.

    Attributes:
        value: the number.
        interval: its bootstrap interval.
        tip: what a pointer that rests on it is told.
        marks: the numbers of its footnotes.
    """

    value: str
    interval: str = ""
    tip: str = ""
    marks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """One fact, and what each method made of it.

    Attributes:
        fact: as the first run tells it.
        unranked: what to say where its ranks are missing.
        answers: each run, what it tells of the fact, and which object the model then says.
    """

    fact: Mapping[str, Any]
    unranked: str
    answers: list[tuple[Summary, Mapping[str, Any], str]]


def write_report(directory: Path) -> Path:
    """Write report.html, report.csv and report.tex into `directory`.

    Where a run was measured along a sequence of edits, sequence.csv too.

    Args:
        directory: a sweep's directory, or one run's.

    Returns:
        The path of report.html.

    Raises:
        RequestError: there is no finished run, a file cannot be read, or the directory cannot be
            written.
    """
    runs = load_runs(directory)
    summaries = summarise(runs)
    write_text(directory / "report.csv", tables.to_csv(summaries))
    write_text(directory / "report.tex", tables.to_latex(summaries))
    if shown := courses(summaries):
        write_text(directory / "sequence.csv", tables.sequences_to_csv(shown))
    page = directory / "report.html"
    write_text(page, render(summaries, load_unfinished(directory), directory.resolve().name))
    return page


def render(
    summaries: Sequence[Summary], unfinished: Sequence[Mapping[str, Any]], title: str
) -> str:
    """The page as text: every word from a data set or a configuration is escaped."""
    cells, footnotes = _headline(summaries)
    panels = _panels(summaries)
    shown = courses(summaries)
    charts = _charts(summaries, panels, shown)
    return _template().render(
        title=title,
        about=_about(summaries),
        filters=_distinct(_pairs(_facts(summary.run.run, "counts")) for summary in summaries),
        groups=_groups(),
        headline=list(zip(summaries, cells, strict=True)),
        failures=[_marks(_failure(summary), footnotes) for summary in summaries],
        columns=HEADLINE,
        footnotes=footnotes,
        along=_along(shown, summaries),
        captions={name: text for name, text in CAPTIONS.items() if name in charts},
        panels=panels[:MAX_PANELS],
        hidden_panels=max(len(panels) - MAX_PANELS, 0),
        details=_details(details(summaries)),
        summaries=summaries,
        settings=_settings(summaries),
        unfinished=unfinished,
        resamples=RESAMPLES,
        charts=charts,
        plotly_js=plotly.offline.get_plotlyjs(),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("palimpsest.record"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "direction": direction_text,
        "duration": _duration,
        "memory": _memory,
        "hyphenate": _hyphenate,
    }
    return environment.get_template("report.html.j2")


def _groups() -> list[tuple[str, str, list[Column]]]:
    return [
        (title, meaning, [column for column in HEADLINE if column.axis == axis])
        for axis, (title, meaning) in AXES.items()
    ]


def _headline(summaries: Sequence[Summary]) -> tuple[list[list[Cell]], list[str]]:
    """Cells by run and column, and the footnotes that they refer to by number."""
    footnotes = list(dict.fromkeys(column.caution for column in HEADLINE if column.caution))
    for summary in summaries:
        notes = [_footnote(summary, summary.values[column.key]) for column in HEADLINE]
        notes.append(_failure(summary))
        footnotes += [note for note in dict.fromkeys(notes) if note and note not in footnotes]
    cells = [[_cell(summary, column, footnotes) for column in HEADLINE] for summary in summaries]
    return cells, footnotes


def _failure(summary: Summary) -> str:
    return f"{summary.label}: {summary.failure}" if summary.failed else ""


def _footnote(summary: Summary, estimate: Estimate) -> str:
    """An estimate's note, or the run's one on failed facts where these are all that is missing."""
    causes = "; ".join(sorted(set(summary.failed.values())))
    note = estimate.note or ""
    failed = summary.failed and (note == causes or note.endswith(f" values missing: {causes}"))
    return _failure(summary) if failed else note


def _marks(note: str, footnotes: Sequence[str]) -> tuple[int, ...]:
    return (footnotes.index(note) + 1,) if note else ()


def _cell(summary: Summary, column: Column, footnotes: Sequence[str]) -> Cell:
    estimate = summary.values[column.key]
    return Cell(
        value_text(estimate, column.style),
        _interval(estimate, column.style),
        _tip(estimate.place, _count(estimate), estimate.note, column.caution),
        _marks(_footnote(summary, estimate), footnotes),
    )


def _interval(estimate: Estimate, style: Literal["share", "number", "rank"]) -> str:
    return re.sub(r"\b0(?=\.)", "", interval_text(estimate, style))


def _count(estimate: Estimate) -> str:
    return f"n = {estimate.n:,}" if estimate.value is not None else ""


def _tip(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)


def _along(shown: Sequence[Course], summaries: Sequence[Summary]) -> dict[str, Any] | None:
    """What the page says of sequences of edits; None if there are none."""
    if not shown:
        return None
    steps = columns(shown)
    return {
        "keys": [(course, styles(summaries)[course.summary.label]) for course in shown],
        "measures": SHOWN,
        "first": FIRST,
        "headings": [heading(step, shown) for step in steps],
        "cells": [_course_cells(course, steps) for course in shown],
        "notes": [*gaps(shown), *(_failure(c.summary) for c in shown if c.summary.failed)],
    }


def _course_cells(course: Course, steps: Sequence[int | None]) -> list[Cell]:
    """Cells by measure, then by step; empty where the run has no such step."""
    stages = [course.at(step) for step in steps]
    return [
        _stage_cell(stage, measure) if stage else Cell("") for measure in SHOWN for stage in stages
    ]


def _stage_cell(stage: Stage, measure: Measure) -> Cell:
    estimate = stage.values[measure.key]
    tip = _tip(f"after {stage.step:,} edits", _count(estimate), estimate.note)
    text = value_text(estimate, measure.style)
    return Cell(text, _interval(estimate, measure.style), tip)


def _details(found: Sequence[Detail]) -> list[tuple[Detail, list[Cell]]]:
    return [(detail, [_detail_cell(value) for value in detail.values]) for detail in found]


def _detail_cell(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell("")
    ends = (estimate.low, estimate.high)
    interval = "" if None in ends else f"{plain(ends[0])}{DASH}{plain(ends[1])}"
    return Cell(plain(estimate.value), interval, _tip(f"n = {estimate.n:,}", estimate.note))


def _charts(
    summaries: Sequence[Summary], panels: Sequence[Panel], shown: Sequence[Course]
) -> dict[str, Any]:
    """Figures by name as plain JSON values.

    A fact's is named `fact-` and its place, one along the edits `along-` and its metric.
    """
    made = {
        "recoverability": figures.recoverability(summaries),
        "trade_off": figures.trade_off(summaries),
        "two_hop": figures.two_hop(summaries),
    }
    made |= {f"along-{name}": fig for name, fig in figures.along(shown, summaries).items()}
    for place, panel in enumerate(panels[:MAX_PANELS]):
        made[f"fact-{place}"] = figures.ranks(summaries, str(panel.fact["fact_id"]))
    return {name: fig.to_plotly_json() for name, fig in made.items() if fig is not None}


def _panels(summaries: Sequence[Summary]) -> list[Panel]:
    """One panel per fact; `none` leads the summaries, so what it says comes first in each."""
    answers: dict[str, list[tuple[Summary, Mapping[str, Any], str]]] = {}
    for summary in summaries:
        for fact in summary.run.facts:
            entry = (summary, fact, _matches(fact))
            answers.setdefault(str(fact["fact_id"]), []).append(entry)
    return [Panel(said[0][1], _unranked(summaries, name), said) for name, said in answers.items()]


def _unranked(summaries: Sequence[Summary], fact_id: str) -> str:
    """The causes that the rows name for missing ranks of a fact's objects."""
    rows = (r for s in summaries for r in s.run.select("lens_rank_old", "logit_lens"))
    missing = (r.note for r in rows if r.fact_id == fact_id and r.value is None and r.note)
    return "; ".join(dict.fromkeys(missing)) or "not measured"


def _matches(fact: Mapping[str, Any]) -> str:
    """Which object the answer starts with: `old`, `new` or neither (empty)."""
    answer = str(fact.get("answer") or "").strip().casefold()
    for name, key in (("old", "true"), ("new", "new")):
        wanted = str(fact.get(key) or "").strip().casefold()
        if wanted and answer.startswith(wanted):
            return name
    return ""


def _about(summaries: Sequence[Summary]) -> dict[str, str]:
    """What the runs have in common, or all they differ in: shown under the title."""
    runs = [summary.run.run for summary in summaries]
    versions = [
        _pairs(run.get("versions"), ("palimpsest-lm", "torch", "transformers")) for run in runs
    ]
    found = {
        "Model": _distinct(_named(run.get("model")) for run in runs),
        "Facts": _distinct(_named(run.get("facts")) for run in runs),
        "Targets": _distinct(f"{summary.n_facts} facts" for summary in summaries),
        "Seed": _distinct(run.get("seed") for run in runs),
        "Date": _distinct(str(run.get("started") or "")[:10] for run in runs),
        "Device": _distinct(run.get("device") for run in runs),
        "Versions": _distinct(versions),
        "Commit": _distinct(str(run.get("git_commit") or "")[:12] for run in runs),
        "Splits": _distinct(_pairs(_facts(run, "sizes")) for run in runs),
    }
    return {name: text for name, text in found.items() if text}


def _facts(run: Mapping[str, Any], key: str) -> Any:
    facts = run.get("facts")
    return facts.get(key) if isinstance(facts, Mapping) else None


def _named(thing: Any) -> str:
    """`name (fingerprint)`, the fingerprint cut to eight digits."""
    if not isinstance(thing, Mapping):
        return str(thing or "")
    mark = str(thing.get("fingerprint") or "")[:8]
    return f"{thing.get('name', '')} ({mark})" if mark else str(thing.get("name", ""))


def _pairs(mapping: Any, keys: Sequence[str] | None = None) -> str:
    if not isinstance(mapping, Mapping):
        return ""
    return ", ".join(
        f"{k} {mapping[k]}" for k in keys or list(mapping) if mapping.get(k) is not None
    )


def _distinct(values: Iterable[Any]) -> str:
    texts = dict.fromkeys(str(value) for value in values if value not in (None, ""))
    return " · ".join(texts)


def _settings(summaries: Sequence[Summary]) -> list[str]:
    found = differences([summary.run for summary in summaries])
    return [", ".join(f"{k}={v}" for k, v in setting.items()) for setting in found]


def _hyphenate(heading: str) -> str:
    """Break a narrow column's heading inside its long words, and not inside `re-fit`."""
    for parts in (
        ("neighbor", "hood"),
        ("suppres", "sion"),
        ("para", "phrase"),
        ("perplex", "ity"),
    ):
        heading = heading.replace("".join(parts), "\u00ad".join(parts))
    return heading.replace("re-fit", "re\u2011fit")


def _duration(seconds: Any) -> str:
    """Seconds as `3.2 s`, or `4 min 10 s` from two minutes on."""
    if not isinstance(seconds, int | float):
        return DASH
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _memory(size: Any) -> str:
    """MiB as MiB or GiB."""
    if not isinstance(size, int | float):
        return DASH
    return f"{size:,.0f} MiB" if size < 1024 else f"{size / 1024:.1f} GiB"
