"""Any table as CSV."""

import csv
import io
from collections.abc import Iterator

from palimpsest.study.intervals import Estimate
from palimpsest.study.table import Cell, Heading, Table, Words

_PARTS = ("value", "low", "high", "n")


def to_csv(table: Table) -> str:
    """One line a line. A column of estimates becomes several: value, low, high and n."""
    columns = [
        (place, _parts(heading, [line.cells[place] for line in table.lines]))
        for place, heading in enumerate(table.headings)
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([name for _, names in columns for name in names])
    for line in table.lines:
        writer.writerow([v for place, names in columns for v in _values(line.cells[place], names)])
    return text.getvalue()


def _parts(heading: Heading, cells: list[Cell]) -> tuple[str, ...]:
    """The names of a heading's columns."""
    if heading.parts:
        return heading.parts
    key = heading.key or heading.title
    if not any(isinstance(cell, Estimate) for cell in cells):
        return (key,)
    return (key, *(f"{key}/{part}" for part in _PARTS[1:]))


def _values(cell: Cell, names: tuple[str, ...]) -> Iterator[object]:
    """A cell's parts under as many names; of what is no estimate, the value alone."""
    for part, _ in zip(_PARTS, names, strict=False):
        if isinstance(cell, Estimate):
            yield getattr(cell, part)
        elif part == "value":
            yield cell.text if isinstance(cell, Words) else cell
        else:
            yield None
