"""Any tables in a terminal of a hundred columns."""

from collections.abc import Iterator, Sequence

from rich import box
from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from palimpsest.study.intervals import Estimate
from palimpsest.study.table import Cell, Heading, Line, Table
from palimpsest.study.text import brief, cell_text, direction_text, interval_text

_ROOMY = 118
"""Columns of a terminal from which on a wide table is set wider."""

_NAME = 14
"""The least width of the lines' names."""

Shown = Sequence[tuple[int, Heading]]
"""The columns that are shown, and their places in a line."""


def print_tables(tables: Sequence[Table], console: Console) -> None:
    """Print tables one after another, then what their columns are called in full.

    Intervals are shown where all of a table fits with them. What the columns mean is in
    report.html; a terminal has no room for it.
    """
    told: set[tuple[str, str]] = set()
    for place, table in enumerate(tables):
        if place:
            console.print()
        console.print(Text(table.title, style="bold"))
        console.print(_rich(table, console.width))
        for line in (*_legend(table, told), *_marks(table)):
            console.print(line)
        for note in (*table.notes, *dict.fromkeys(line.note for line in table.lines if line.note)):
            console.print(Text(note))


def _rich(table: Table, width: int) -> rich_table.Table:
    """The table with intervals if there is room, else without them, else without gaps."""
    shown = [(k, h) for k, h in enumerate(table.headings) if not h.data]
    lines, gap = _texts(table, shown, True), 2
    if _width(shown, lines, gap) > width:
        lines = _texts(table, shown, False)
    if _width(shown, lines, gap) > width:
        gap = int(width >= _ROOMY)
    made = rich_table.Table(
        box=box.SIMPLE_HEAD, padding=(0, 0, 0, gap), pad_edge=False, show_edge=False
    )
    for place, (_, heading) in enumerate(shown):
        words = heading.style == "words"
        made.add_column(
            Text(heading.short or heading.title),
            justify="left" if words else "right",
            no_wrap=not words,
            overflow="fold",
            min_width=None if place else _NAME,
        )
    for line, cells in zip(table.lines, lines, strict=True):
        made.add_row(*map(Text, cells), style="dim" if line.control_of else None)
    return made


def _texts(table: Table, shown: Shown, ends: bool) -> list[list[str]]:
    return [[_text(line, line.cells[k], h, ends) for k, h in shown] for line in table.lines]


def _text(line: Line, cell: Cell, heading: Heading, ends: bool) -> str:
    """A cell in as few letters as can be; with its interval, or a star where that tells enough."""
    style = line.style or heading.style
    text = cell_text(cell, style, heading.signed)
    if not isinstance(cell, Estimate):
        return text
    short = "1.0" if text == "1.00" else brief(text)
    interval = brief(interval_text(cell, style, heading.signed))
    if ends and interval:
        return f"{short} ({interval})"
    return short + _star(cell) if heading.signed else short


def _star(value: Estimate) -> str:
    """A star behind what differs from zero, a space behind the rest."""
    clear = value.low is not None and value.high is not None and not value.low <= 0 <= value.high
    return "*" if clear else " "


def _width(shown: Shown, lines: Sequence[Sequence[str]], gap: int) -> int:
    """The letters of the widest line."""
    heads = [cell_len(heading.short or heading.title) for _, heading in shown]
    columns = list(zip(*lines, strict=True)) or [()] * len(shown)
    widest = [max([head, *map(cell_len, c)]) for head, c in zip(heads, columns, strict=True)]
    return sum(widest) + (gap + 1) * (len(shown) - 1)


def _legend(table: Table, told: set[tuple[str, str]]) -> Iterator[Text]:
    """Columns that have a short heading, by their full names, a line for each group; once each."""
    for group in dict.fromkeys(heading.group for heading in table.headings):
        line = Text(f"{group}: " if group else "", style="bold")
        own = [h for h in table.headings if h.group == group and h.short and h.meaning]
        new = [h for h in own if (h.short, h.title) not in told]
        for heading in new:
            better = direction_text(heading)
            line.append(f"{heading.short} ", style="not bold")
            line.append(f"{heading.title}{' ' + better if better else ''}  ", style="not bold dim")
            told.add((heading.short, heading.title))
        if new:
            yield line


def _marks(table: Table) -> Iterator[Text]:
    """What dimmed lines and stars say."""
    if any(line.control_of for line in table.lines):
        yield Text("Dimmed: controls.", style="dim")
    if any(heading.signed for heading in table.headings):
        yield Text("*: the paired 95% interval leaves out zero", style="dim")
