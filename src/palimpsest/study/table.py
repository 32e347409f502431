"""Table: what a study found, for every view to render: the page, the terminal, CSV and LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from palimpsest.study.intervals import Estimate

Direction = Literal["up", "down"] | None
"""Which way is better; None where neither is."""

Style = Literal["share", "number", "rank", "plain", "decimals", "words"]
"""How a column's numbers are set.

`share`: two decimals; `number`: three digits; `rank`: whole; `plain`: three significant digits;
`decimals`: three decimals; `words`: text, or a whole number that is a name.
"""

View = Literal["page", "terminal", "csv", "latex"]
"""Who renders a table."""

EVERYWHERE: tuple[View, ...] = ("page", "terminal", "csv", "latex")
SHOWN: tuple[View, ...] = ("page", "terminal")


@dataclass(frozen=True, slots=True)
class Words:
    """A cell of text with a tone.

    Attributes:
        text: the text, shown as it is.
        tone: `old` or `new` where it is, or begins with, that object; else empty.
    """

    text: str
    tone: Literal["", "old", "new"] = ""


Cell = Estimate | Words | str | float | int | None
"""One value of a table; None is an empty cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """A column of a table.

    Attributes:
        title: its heading.
        key: its name in CSV; the title if empty.
        short: its heading where room is scarce; the title if empty.
        group: the group of columns it stands in; empty if in none.
        meaning: one line.
        editor: the better direction for a method that writes a new object; None if neither.
        eraser: the better direction for a method that removes the old one.
        style: how its numbers are set.
        signed: whether its numbers are differences, shown with their sign.
        caution: a footnote that the column must never be shown without.
        parts: for a column of estimates, the names in CSV of value, low, high and n, or of the
            first of these; if empty, they are the key, and the key with `/low`, `/high` and `/n`.
        data: whether only CSV shows it.
    """

    title: str
    key: str = ""
    short: str = ""
    group: str = ""
    meaning: str = ""
    editor: Direction = None
    eraser: Direction = None
    style: Style = "share"
    signed: bool = False
    caution: str | None = None
    parts: tuple[str, ...] = ()
    data: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a table, most often a run.

    Attributes:
        cells: one for each heading; the first is the line's name.
        control_of: the label of the run that it imitates; None if it is no control.
        unchanged: whether it is the unchanged model.
        small: small print under the name.
        note: a footnote at the name.
        causes: a cell whose note tells of these causes alone refers to the line's footnote.
        style: how its numbers are set, where not as its columns say.
    """

    cells: tuple[Cell, ...]
    control_of: str | None = None
    unchanged: bool = False
    small: tuple[str, ...] = ()
    note: str = ""
    causes: str = ""
    style: Style | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        name: the stem of its files.
        headings: its columns.
        lines: of as many cells as there are headings.
        title: its title.
        caption: what it shows, in sentences.
        notes: further sentences under it, each about one thing.
        groups: a line on each group of columns, by the group's name.
        footnotes: whether the cells' notes are told under it; else only where a pointer rests.
        folded: whether the page shows it only when asked.
        views: who renders it.
    """

    name: str
    headings: Sequence[Heading]
    lines: Sequence[Line]
    title: str = ""
    caption: str = ""
    notes: tuple[str, ...] = ()
    groups: tuple[tuple[str, str], ...] = ()
    footnotes: bool = True
    folded: bool = False
    views: tuple[View, ...] = EVERYWHERE

    def __post_init__(self) -> None:
        """Check that the lines fit the headings.

        Raises:
            ValueError: one does not.
        """
        for line in self.lines:
            if len(line.cells) != len(self.headings):
                raise ValueError(
                    f"expected {len(self.headings)} cells in each line of {self.name}, found "
                    f"{len(line.cells)}: {line.cells[0]}"
                )
