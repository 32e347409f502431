"""What a directory of runs found: one self-contained page, tables as CSV and LaTeX, pictures."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import plotly.offline

from palimpsest.files import write_text
from palimpsest.record.store import Run, load_runs, load_unfinished
from palimpsest.report import figures, tables, trace_figures, undertext
from palimpsest.report.style import styles
from palimpsest.report.text import (
    DASH,
    decimals,
    difference_interval,
    difference_text,
    direction_text,
    interval_text,
    plain,
    value_text,
)
from palimpsest.report.trace_pictures import write_view
from palimpsest.study import against, erasing, localization, traces
from palimpsest.study.against import Contrasts
from palimpsest.study.columns import HEADLINE, Column
from palimpsest.study.erasing import Agreement
from palimpsest.study.intervals import RESAMPLES, Estimate
from palimpsest.study.labels import differences
from palimpsest.study.localization import Finding
from palimpsest.study.sequences import (
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
from palimpsest.study.summary import Detail, Summary, details, summarise
from palimpsest.study.traces import Peak, TracedFact, TraceView

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
    "undertext": "The share of the changed facts whose old, or new, object a linear probe of that "
    "layer and token names. Probes are trained on other subjects of the relation, "
    "anew on models that are changed for all, on the unchanged model for edits of single facts. "
    "The line stands at the first layer that the change reaches.",
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


@dataclass(frozen=True, slots=True)
class TraceBlock:
    """What tracing under one corruption found.

    Attributes:
        corruption: in words.
        effects: clean and corrupted probability and total effect.
        peaks: what was restored; its largest AIE, the position group and the layer of that; the
            largest AIE at the subject's last token, and its layer.
    """

    corruption: str
    effects: list[Cell]
    peaks: list[tuple[str, Cell, str, Cell, Cell, Cell]]


@dataclass(frozen=True, slots=True)
class TraceSection:
    """One run of causal tracing on the page.

    Attributes:
        view: the run.
        blocks: its summary table, a block of lines for each corruption.
        notes: what has no value, and why.
        facts: those with a heat map.
        hidden: how many more facts have values for their tokens.
    """

    view: TraceView
    blocks: list[TraceBlock]
    notes: list[str]
    facts: list[TracedFact]
    hidden: int


@dataclass(frozen=True)
class Studies:
    """What runs tell when they are set beside each other.

    Attributes:
        informed: what the effect tells of each edit's success.
        agreed: what it tells of the layers of erasers.
        against: the runs' differences from one of them; None if none was named.
    """

    informed: Sequence[Finding] = ()
    agreed: Sequence[Agreement] = ()
    against: Contrasts | None = None


def write_report(directory: Path, reference: str | None = None) -> Path:
    """Write report.html, report.csv and report.tex into `directory`.

    Where a run was measured along a sequence of edits, sequence.csv too. Runs of causal tracing
    have a section of the page, trace.csv and pictures in `figures/` (of several such runs in
    `figures/<run_id>/`); without other runs there is no report.csv nor report.tex. Where traces and
    edits at several layers stand together, localization.csv; where traces and erasers do,
    erasing.csv; where runs are set against one of them, against.csv.

    Args:
        directory: a sweep's directory, or one run's.
        reference: the label or method of the run that the others are set against.

    Returns:
        The path of report.html.

    Raises:
        RequestError: there is no finished run, a file cannot be read, the directory cannot be
            written, or the reference is no run's name.
    """
    runs = load_runs(directory)
    summaries = summarise([run for run in runs if not traces.is_trace(run)])
    opposed = against.contrasts(summaries, reference) if reference is not None else None
    traced = traces.views(runs)
    if summaries:
        write_text(directory / "report.csv", tables.to_csv(summaries))
        write_text(directory / "report.tex", tables.to_latex(summaries))
    if shown := courses(summaries):
        write_text(directory / "sequence.csv", tables.sequences_to_csv(shown))
    if traced:
        _write_traces(traced, directory)
    if informed := localization.findings(runs):
        write_text(directory / "localization.csv", localization.to_csv(informed))
    if agreed := erasing.agreements(runs):
        write_text(directory / "erasing.csv", erasing.to_csv(agreed))
    if opposed:
        write_text(directory / "against.csv", against.to_csv(opposed))
    page = directory / "report.html"
    title = directory.resolve().name
    shown_besides = Studies(informed, agreed, opposed)
    write_text(page, render(summaries, traced, shown_besides, load_unfinished(directory), title))
    return page


def render(
    summaries: Sequence[Summary],
    traced: Sequence[TraceView],
    studies: "Studies",
    unfinished: Sequence[Mapping[str, Any]],
    title: str,
) -> str:
    """The page as text: every word from a data set or a configuration is escaped."""
    cells, footnotes = _headline(summaries)
    runs = [*(summary.run for summary in summaries), *(view.run for view in traced)]
    panels = _panels(summaries)
    shown = courses(summaries)
    charts = _charts(summaries, panels, shown) | _trace_charts(traced)
    return _template().render(
        title=title,
        about=_about(runs, summaries),
        filters=_distinct(_pairs(_facts(run.run, "counts")) for run in runs),
        groups=_groups(),
        headline=list(zip(summaries, cells, strict=True)),
        failures=[_marks(_failure(summary), footnotes) for summary in summaries],
        columns=HEADLINE,
        footnotes=footnotes,
        against=_against(studies.against),
        along=_along(shown, summaries),
        captions={name: text for name, text in CAPTIONS.items() if name in charts},
        panels=panels[:MAX_PANELS],
        hidden_panels=max(len(panels) - MAX_PANELS, 0),
        traced=[_trace_section(view) for view in traced],
        informed=[(finding, _regressions(finding)) for finding in studies.informed],
        agreed=[(each, _agreement(each)) for each in studies.agreed],
        details=_details(details(summaries)),
        summaries=summaries,
        listed=_listed(summaries) + _listed(traced),
        unfinished=unfinished,
        resamples=RESAMPLES,
        charts=charts,
        plotly_js=plotly.offline.get_plotlyjs(),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("palimpsest.report"),
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


def _against(found: Contrasts | None) -> dict[str, Any] | None:
    """What the page says of runs against one of them; None if none was named."""
    if found is None:
        return None
    cells = [
        [_difference(line.values[column.key], column) for column in against.COLUMNS]
        for line in found.lines
    ]
    return {
        "reference": found.reference.label,
        "columns": against.COLUMNS,
        "lines": [(line.summary, row) for line, row in zip(found.lines, cells, strict=True)],
        "unlike": found.unlike,
    }


def _difference(estimate: Estimate, column: Column) -> Cell:
    ends = re.sub(r"\b0(?=\.)", "", difference_interval(estimate, column.style))
    tip = _tip(estimate.place, _count(estimate), estimate.note)
    return Cell(difference_text(estimate, column.style), ends, tip)


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


def _write_traces(traced: Sequence[TraceView], directory: Path) -> None:
    """Write trace.csv, and the pictures in a folder for each run if there are several."""
    write_text(directory / "trace.csv", traces.to_csv(traced))
    for view in traced:
        folder = directory / "figures"
        write_view(view, folder / view.run.path.resolve().name if len(traced) > 1 else folder)


def _trace_section(view: TraceView) -> TraceSection:
    effects = [view.effects[metric, c] for c in view.corruptions for metric in traces.EFFECTS]
    notes = [f"{view.label}: {e.note}." for e in effects if e.note]
    return TraceSection(
        view=view,
        blocks=[_block(view, corruption) for corruption in view.corruptions],
        notes=list(dict.fromkeys(notes)),
        facts=traces.traced_facts(view),
        hidden=traces.hidden_facts(view),
    )


def _block(view: TraceView, corruption: str) -> TraceBlock:
    effects = [view.effects[metric, corruption] for metric in traces.EFFECTS]
    protocols = [p for p in view.protocols if traces.split(p)[0] == corruption]
    return TraceBlock(
        corruption=traces.corruption_text(corruption),
        effects=[_detail_cell(effect) for effect in effects],
        peaks=[_peak_line(view, p, top) for p in protocols if (top := traces.peak(view, p))],
    )


def _peak_line(
    view: TraceView, protocol: str, top: Peak
) -> tuple[str, Cell, str, Cell, Cell, Cell]:
    subject = traces.peak(view, protocol, "last_subject")
    return (
        traces.kind_text(traces.split(protocol)[1]),
        _detail_cell(top.estimate),
        traces.GROUPS[top.group],
        Cell(str(top.layer)),
        _detail_cell(subject.estimate) if subject else Cell(""),
        Cell(str(subject.layer)) if subject else Cell(""),
    )


def _regressions(finding: Finding) -> list[Cell]:
    """R² by layer, by effect, by both, and its increase beyond chance."""
    if finding.study is None:
        return [Cell(DASH, "", finding.note or "")] * len(localization.R2)
    values = [getattr(finding.study, name) for name in localization.R2]
    return [Cell(decimals(v.value), _ends(v), _tip(_count(v), v.note)) for v in values]


def _agreement(each: Agreement) -> Cell:
    """The rank correlation over layers."""
    value = each.correlation
    tip = "; ".join(f"layer {n}: {each.outcomes[n]:.2f}" for n in each.outcomes)
    return Cell(decimals(value.value), _ends(value), _tip(tip, value.note))


def _ends(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{decimals(estimate.low)}{DASH}{decimals(estimate.high)}"


def _trace_charts(traced: Sequence[TraceView]) -> dict[str, Any]:
    """Figures by name as plain JSON values: `trace-`, the run's id, and what it shows."""
    made = {}
    for view in traced:
        name = f"trace-{view.run.run_id}"
        made[f"{name}-average"] = trace_figures.average(view)
        made[f"{name}-aie"] = trace_figures.curves(view)
        for place, traced_fact in enumerate(traces.traced_facts(view)):
            made[f"{name}-fact-{place}"] = trace_figures.fact(view, traced_fact)
    return {name: fig.to_plotly_json() for name, fig in made.items() if fig is not None}


def _charts(
    summaries: Sequence[Summary], panels: Sequence[Panel], shown: Sequence[Course]
) -> dict[str, Any]:
    """Figures by name as plain JSON values.

    A fact's is named `fact-` and its place, one along the edits `along-` and its metric.
    """
    made = {
        "recoverability": figures.recoverability(summaries),
        "undertext": undertext.figure(summaries),
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


def _about(shown: Sequence[Run], summaries: Sequence[Summary]) -> dict[str, str]:
    """What the runs have in common, or all they differ in: shown under the title."""
    runs = [run.run for run in shown]
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


def _listed(shown: Sequence[Summary | TraceView]) -> list[tuple[Run, str, str]]:
    """Runs, their labels, and the settings that not all of them share."""
    found = differences([one.run for one in shown])
    texts = [", ".join(f"{k}={v}" for k, v in setting.items()) for setting in found]
    return [(one.run, one.label, text) for one, text in zip(shown, texts, strict=True)]


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
