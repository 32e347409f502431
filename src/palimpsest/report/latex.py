"""Any table as LaTeX."""

from collections.abc import Sequence

from palimpsest.study.table import Cell, Heading, Table
from palimpsest.study.text import cell_text, direction_text, interval_text

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


def to_latex(table: Table) -> str:
    """One booktabs tabular for each group of columns, with 95% intervals in small type."""
    first, *others = [k for k, heading in enumerate(table.headings) if not heading.data]
    groups: dict[str, list[int]] = {}
    for place in others:
        groups.setdefault(table.headings[place].group, []).append(place)
    return "% needs \\usepackage{booktabs}\n" + "\n".join(
        _tabular(table, group, [first, *places]) for group, places in groups.items()
    )


def latex_escape(text: str) -> str:
    """Text that LaTeX sets as it is, on one line."""
    return " ".join("".join(_TEX.get(letter, letter) for letter in text).split())


def _tabular(table: Table, group: str, places: Sequence[int]) -> str:
    headings = [table.headings[place] for place in places]
    lines = [
        _line([_cell(line.cells[k], h) for k, h in zip(places, headings, strict=True)])
        for line in table.lines
    ]
    aligned = "".join("l" if heading.style == "words" else "r" for heading in headings)
    return "\n".join(
        [
            f"% {latex_escape(group or table.name)}",
            rf"\begin{{tabular}}{{{aligned}}}",
            r"\toprule",
            _line([_head(heading) for heading in headings]),
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _head(heading: Heading) -> str:
    title = heading.title.capitalize() if heading.style == "words" else heading.title
    return latex_escape(f"{title} {direction_text(heading)}".strip())


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(cell: Cell, heading: Heading) -> str:
    value = latex_escape(cell_text(cell, heading.style, heading.signed))
    ends = latex_escape(interval_text(cell, heading.style, heading.signed))
    return rf"{value} {{\scriptsize {ends}}}" if ends else value
