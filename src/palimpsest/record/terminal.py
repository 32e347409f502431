"""The headline numbers in a terminal of a hundred columns."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from palimpsest.record.columns import HEADLINE
from palimpsest.record.store import Run
from palimpsest.record.summary import Summary, summarise
from palimpsest.record.text import direction_text, value_text

_ROOMY = 118
"""Columns of a terminal from which on the table is set wider."""


def print_summary(runs: Sequence[Run], console: Console) -> None:
    """Print one line of numbers per run, then what the columns are called in full.

    Intervals and definitions are in report.html; a terminal has no room for them.
    """
    summaries = summarise(runs)
    console.print(_table(summaries, 1 if console.width >= _ROOMY else 0))
    for axis in dict.fromkeys(column.axis for column in HEADLINE):
        console.print(_legend(axis))
    if any(summary.imitates for summary in summaries):
        console.print(Text("Dimmed: controls.", style="dim"))


def _table(summaries: Sequence[Summary], gap: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, gap), pad_edge=False, show_edge=False)
    table.add_column("method", min_width=14, overflow="fold")
    for column in HEADLINE:
        table.add_column(column.short, justify="right", no_wrap=True)
    for summary in summaries:
        numbers = [_brief(value_text(summary.values[c.key], c.style)) for c in HEADLINE]
        table.add_row(Text(summary.label), *numbers, style="dim" if summary.imitates else None)
    return table


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
