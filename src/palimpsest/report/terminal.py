"""The headline numbers in a terminal of a hundred columns."""

import re
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from palimpsest.record.store import Run
from palimpsest.report.text import (
    DASH,
    decimals,
    difference_text,
    direction_text,
    interval_text,
    plain,
    value_text,
)
from palimpsest.study.against import COLUMNS, Contrasts, contrasts
from palimpsest.study.columns import HEADLINE
from palimpsest.study.erasing import Agreement, agreements
from palimpsest.study.intervals import Estimate
from palimpsest.study.localization import R2, Finding, findings
from palimpsest.study.sequences import SHOWN, Course, columns, courses, heading
from palimpsest.study.summary import Summary, summarise
from palimpsest.study.traces import (
    EFFECTS,
    TraceView,
    corruption_text,
    is_trace,
    kind_text,
    peak,
    split,
    views,
)

_ROOMY = 118
"""Columns of a terminal from which on the table is set wider."""


def print_summary(runs: Sequence[Run], console: Console, reference: str | None = None) -> None:
    """Print one line of numbers per run, then what the columns are called in full.

    Intervals and definitions are in report.html; a terminal has no room for them. Runs of causal
    tracing follow in a table of their own, and so do differences from a run that is named.

    Raises:
        RequestError: no run has that name.
    """
    summaries = summarise([run for run in runs if not is_trace(run)])
    opposed = contrasts(summaries, reference) if reference is not None else None
    if summaries:
        _print_methods(summaries, console)
    if opposed:
        console.print()
        console.print(_against(opposed))
        console.print(Text("*: the paired 95% interval leaves out zero", style="dim"))
        if opposed.unlike:
            asked = "Left out, asked other facts, of another model, by another ruler or seed: "
            console.print(Text(asked + ", ".join(opposed.unlike)))
    traced = views(runs)
    if summaries and traced:
        console.print()
    for view in traced:
        _print_trace(view, console)
    if found := findings(runs):
        console.print()
        console.print(_informed(found))
    if agreed := agreements(runs):
        console.print()
        console.print(_agreed(agreed))


def _agreed(found: Sequence[Agreement]) -> Table:
    """What tracing tells of the layers of erasers, a line for each pair that is compared."""
    table = _studied("eraser", "traced", "at", "outcome")
    for name in ("layers", "rank correlation", "95%", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        value = each.correlation
        ends = "" if value.low is None else f"{decimals(value.low)} to {decimals(value.high)}"
        named = (each.method, each.protocol, each.position, each.outcome)
        p = DASH if each.p is None else f"{each.p:.3f}"
        table.add_row(*map(Text, named), str(value.n), decimals(value.value), ends, p)
    return table


def _studied(*names: str) -> Table:
    """A table whose first columns say what was compared."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 2), pad_edge=False, show_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _informed(found: Sequence[Finding]) -> Table:
    """What the effect tells of an edit's success, a line for each kind of edit and of state."""
    table = _studied("edit", "objective", "traced")
    for name in ("R² layer", "effect", "both", "beyond chance"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("the effect", overflow="fold")
    for each in found:
        made = each.study
        numbers = [decimals(getattr(made, name).value) if made else DASH for name in R2]
        verdict = made.verdict if made else each.note or ""
        named = map(Text, (each.method, each.objective, each.protocol))
        table.add_row(*named, *numbers, Text(verdict))
    return table


def _print_methods(summaries: Sequence[Summary], console: Console) -> None:
    console.print(_table(summaries, 1 if console.width >= _ROOMY else 0))
    for axis in dict.fromkeys(column.axis for column in HEADLINE):
        console.print(_legend(axis))
    if any(summary.imitates for summary in summaries):
        console.print(Text("Dimmed: controls.", style="dim"))
    for summary in summaries:
        if summary.failed:
            console.print(Text(f"{summary.label}: {summary.failure}"))
    shown = courses(summaries)
    if shown:
        console.print()
        console.print(_along(shown))


def _table(summaries: Sequence[Summary], gap: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, gap), pad_edge=False, show_edge=False)
    table.add_column("method", min_width=14, overflow="fold")
    for column in HEADLINE:
        table.add_column(column.short, justify="right", no_wrap=True)
    for summary in summaries:
        numbers = [_brief(value_text(summary.values[c.key], c.style)) for c in HEADLINE]
        table.add_row(Text(summary.label), *numbers, style="dim" if summary.imitates else None)
    return table


def _against(found: Contrasts) -> Table:
    """Each run less the reference, fact by fact."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column(Text(f"less {found.reference.label}"), min_width=26, overflow="fold")
    for column in COLUMNS:
        table.add_column(column.short, justify="right", no_wrap=True)
    for line in found.lines:
        values = [(line.values[column.key], column.style) for column in COLUMNS]
        numbers = [
            re.sub(r"\b0(?=\.)", "", difference_text(value, style)) + _star(value)
            for value, style in values
        ]
        style = "dim" if line.summary.imitates else None
        table.add_row(Text(line.summary.label), *numbers, style=style)
    return table


def _star(value: Estimate) -> str:
    """A star behind what differs from zero, a space behind the rest."""
    clear = value.low is not None and value.high is not None and not value.low <= 0 <= value.high
    return "*" if clear else " "


def _along(shown: Sequence[Course]) -> Table:
    """What holds after so many edits, a line for each run and measure."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 2), pad_edge=False, show_edge=False)
    table.add_column("along the edits", min_width=14, overflow="fold")
    table.add_column("after edits")
    for step in columns(shown):
        table.add_column(heading(step, shown), justify="right", no_wrap=True)
    for course in shown:
        style = "dim" if course.summary.imitates else None
        for place, measure in enumerate(SHOWN):
            stages = [course.at(step) for step in columns(shown)]
            values = [value_text(s.values[measure.key], measure.style) if s else "" for s in stages]
            name = Text(course.summary.label if place == 0 else "")
            table.add_row(name, measure.title, *map(_brief, values), style=style)
    return table


def _print_trace(view: TraceView, console: Console) -> None:
    """Mean probabilities and the largest average indirect effects, with 95% intervals."""
    for corruption in view.corruptions:
        found = [(title, view.effects[metric, corruption]) for metric, title in EFFECTS.items()]
        heading = f"{view.label}, corrupted by {corruption_text(corruption)}"
        console.print(Text(heading, style="bold"))
        console.print(Text("  ".join(f"{title} {_share(e)}" for title, e in found)))
        for note in dict.fromkeys(e.note for _, e in found if e.note):
            console.print(Text(f"{note}."))
        console.print(_peaks(view, [p for p in view.protocols if split(p)[0] == corruption]))


def _peaks(view: TraceView, protocols: Sequence[str]) -> Table:
    """Where the average indirect effect (AIE) of each kind of state is largest."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 2), pad_edge=False, show_edge=False)
    for name in ("restored", "largest AIE", "at"):
        table.add_column(name, overflow="fold")
    table.add_column("layer", justify="right")
    table.add_column("at last subject", overflow="fold")
    table.add_column("layer", justify="right")
    for protocol in protocols:
        tops = [peak(view, protocol), peak(view, protocol, "last_subject")]
        values = [_with_ends(top.estimate) if top else "" for top in tops]
        layers = [str(top.layer) if top else "" for top in tops]
        place = tops[0].group.replace("_", " ") if tops[0] else ""
        line = (kind_text(split(protocol)[1]), values[0], place, layers[0], values[1], layers[1])
        table.add_row(*map(Text, line))
    return table


def _share(estimate: Estimate) -> str:
    """A share with its 95% interval, if it has one, in two decimals."""
    ends = interval_text(estimate, "share")
    return value_text(estimate, "share") + (f" ({ends})" if ends else "")


def _with_ends(estimate: Estimate) -> str:
    """A value with its 95% interval, if it has one."""
    if estimate.low is None:
        return plain(estimate.value)
    return f"{plain(estimate.value)} ({plain(estimate.low)}{DASH}{plain(estimate.high)})"


def _brief(number: str) -> str:
    """A share in three characters: `.96`, `1.0`."""
    return "1.0" if number == "1.00" else number.removeprefix("0") if "." in number else number


def _legend(axis: str) -> Text:
    """The columns of one axis by their full names, with the better direction."""
    line = Text(f"{axis}: ", style="bold")
    for column in [c for c in HEADLINE if c.axis == axis]:
        better = direction_text(column)
        line.append(f"{column.short} ", style="not bold")
        line.append(f"{column.title}{' ' + better if better else ''}  ", style="not bold dim")
    return line
