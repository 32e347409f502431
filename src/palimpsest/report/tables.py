"""The headline table as CSV and as LaTeX, and what holds along sequences of edits as CSV."""

import csv
import io
from collections.abc import Sequence

from palimpsest.record.row import Axis
from palimpsest.report.text import direction_text, interval_text, value_text
from palimpsest.study.columns import HEADLINE, Column
from palimpsest.study.sequences import MEASURES, Course
from palimpsest.study.summary import Summary

_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\N{EN DASH}": "--",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}


def to_csv(summaries: Sequence[Summary]) -> str:
    """One line per run: identity, then value, low, high and n of each headline number.

    At the end the number of facts that the method failed on.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = [f"{c.key}{end}" for c in HEADLINE for end in ("", "/low", "/high", "/n")]
    writer.writerow(["label", "method", "run_id", "imitates", "n_facts", *parts, "n_failed"])
    for summary in summaries:
        identity = [summary.label, summary.method, summary.run.run_id, summary.imitates]
        values = [summary.values[column.key] for column in HEADLINE]
        numbers = [part for e in values for part in (e.value, e.low, e.high, e.n)]
        writer.writerow([*identity, summary.n_facts, *numbers, len(summary.failed)])
    return text.getvalue()


def sequences_to_csv(courses: Sequence[Course]) -> str:
    """One line per run, number of edits and measure; of `none`, its values on the same facts."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["label", "method", "run_id", "step", "metric", "protocol"]
    writer.writerow([*names, "value", "low", "high", "n", "note"])
    for course in courses:
        summary = course.summary
        for stage in course.stages:
            for measure in MEASURES:
                found = stage.values[measure.key]
                place = [stage.step, measure.metric, measure.protocol]
                numbers = [found.value, found.low, found.high, found.n, found.note]
                identity = [summary.label, summary.method, summary.run.run_id]
                writer.writerow([*identity, *place, *numbers])
    return text.getvalue()


def to_latex(summaries: Sequence[Summary]) -> str:
    """One booktabs tabular per axis, with 95% intervals in small type."""
    axes = list(dict.fromkeys(column.axis for column in HEADLINE))
    return "% needs \\usepackage{booktabs}\n" + "\n".join(
        _tabular(summaries, axis, [c for c in HEADLINE if c.axis == axis]) for axis in axes
    )


def latex_escape(text: str) -> str:
    """Text that LaTeX sets as it is, on one line."""
    return " ".join("".join(_TEX.get(letter, letter) for letter in text).split())


def _tabular(summaries: Sequence[Summary], axis: Axis, columns: Sequence[Column]) -> str:
    heads = [latex_escape(f"{c.title} {direction_text(c)}".strip()) for c in columns]
    lines = [_line([latex_escape(s.label), *(_cell(s, c) for c in columns)]) for s in summaries]
    return "\n".join(
        [
            f"% {axis}",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            _line(["Method", *heads]),
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(summary: Summary, column: Column) -> str:
    estimate = summary.values[column.key]
    value = latex_escape(value_text(estimate, column.style))
    ends = latex_escape(interval_text(estimate, column.style))
    return rf"{value} {{\scriptsize {ends}}}" if ends else value
