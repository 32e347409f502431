"""What a directory of runs found: one self-contained page, tables as CSV and LaTeX, pictures."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from rich.console import Console

from palimpsest.files import write_text
from palimpsest.record.results import Results, Run
from palimpsest.report.csv import to_csv
from palimpsest.report.latex import to_latex
from palimpsest.report.pictures import write_pictures
from palimpsest.report.terminal import print_tables
from palimpsest.study.intervals import Estimate
from palimpsest.study.labels import differences, labels
from palimpsest.study.study import Block, Figure, Panels, Picture, Study
from palimpsest.study.table import Cell, Heading, Line, Table, Words
from palimpsest.study.text import DASH, brief, cell_text, direction_text, interval_text


@dataclass(frozen=True, slots=True)
class Shown:
    """A cell as the page shows it.

    Attributes:
        text: its value.
        interval: its bootstrap interval.
        tip: what a pointer that rests on it is told.
        marks: the numbers of its footnotes.
        kind: classes of style.
    """

    text: str
    interval: str = ""
    tip: str = ""
    marks: tuple[int, ...] = ()
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Laid:
    """A table laid out for the page.

    Attributes:
        table: the table.
        headings: of the columns that the page shows.
        groups: names of groups of columns beside each other, what they mean, and their widths.
        lines: the lines, the footnotes at their names, and their cells.
        footnotes: in the order of their numbers.
    """

    table: Table
    headings: list[Heading]
    groups: list[tuple[str, str, int]]
    lines: list[tuple[Line, tuple[int, ...], list[Shown]]]
    footnotes: list[str]


def write_report(directory: Path, studies: Iterable[Study], console: Console | None = None) -> Path:
    """Ask studies of the results in a directory; write what they say beside the results.

    report.html holds everything. Each table is written as CSV and as LaTeX under its own name, if
    it is meant to be, and pictures as PNG and PDF into `figures/`.

    Args:
        directory: a sweep's directory, or one run's.
        studies: what to ask, in the order of the page.
        console: where to print the tables, and what was passed over; None prints nothing.

    Returns:
        The path of report.html.

    Raises:
        RequestError: there is no finished run that can be read, a study's settings do not fit the
            results, or the directory cannot be written.
    """
    results = Results.open(directory)
    blocks = [block for study in studies for block in study.read(results)]
    if console is not None:
        shown = [b for b in blocks if isinstance(b, Table) and "terminal" in b.views and b.lines]
        print_tables(shown, console)
        for each in results.passed_over:
            console.print(f"passed over: {each.cause}", markup=False, highlight=False)
    _write_tables([block for block in blocks if isinstance(block, Table)], directory)
    pictures = [block for block in blocks if isinstance(block, Picture)]
    write_pictures(pictures, directory / "figures")
    page = directory / "report.html"
    write_text(page, render(results, blocks, directory.resolve().name))
    return page


def _write_tables(tables: Sequence[Table], directory: Path) -> None:
    for table in tables:
        if "csv" in table.views:
            write_text(directory / f"{table.name}.csv", to_csv(table))
        if "latex" in table.views:
            write_text(directory / f"{table.name}.tex", to_latex(table))


def render(results: Results, blocks: Sequence[Block], title: str) -> str:
    """The page as text: every word from a data set or a configuration is escaped."""
    charts = {figure.name: figure.chart for figure in _figures(blocks) if figure.chart}
    runs = [run.run for run in results.runs]
    return _template().render(
        title=title,
        about=_about(runs),
        filters=_distinct(_pairs(_facts(run, "counts")) for run in runs),
        blocks=[(_kind(block), block) for block in blocks if _on_page(block)],
        files=[
            (table.name, [view for view in ("csv", "latex") if view in table.views])
            for table in blocks
            if isinstance(table, Table)
        ],
        listed=_listed(results.runs),
        unfinished=results.unfinished,
        passed_over=results.passed_over,
        charts=charts,
        plotly_js=plotly.offline.get_plotlyjs(),
    )


def _on_page(block: Block) -> bool:
    return not isinstance(block, Picture) and not (
        isinstance(block, Table) and "page" not in block.views
    )


def _kind(block: Block) -> str:
    if isinstance(block, Table):
        return "table"
    return "figure" if isinstance(block, Figure) else "panels"


def _figures(blocks: Sequence[Block]) -> Iterator[Figure]:
    for block in blocks:
        if isinstance(block, Figure):
            yield block
        elif isinstance(block, Panels):
            yield from (panel.figure for panel in block.panels if panel.figure)


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
        "laid": laid,
    }
    return environment.get_template("report.html.j2")


def laid(table: Table) -> Laid:
    """A table laid out for the page."""
    places = [place for place, heading in enumerate(table.headings) if not heading.data]
    headings = [table.headings[place] for place in places]
    footnotes = _footnotes(table, places)
    firsts = {k for k, h in enumerate(headings) if k and h.group != headings[k - 1].group}
    lines = []
    for line in table.lines:
        cells = [
            _shown(line, line.cells[place], headings[k], footnotes, k in firsts or k == 1)
            for k, place in enumerate(places)
        ]
        lines.append((line, _marks(line.note, footnotes), cells))
    return Laid(table, headings, _groups(table, headings), lines, footnotes)


def _groups(table: Table, headings: Sequence[Heading]) -> list[tuple[str, str, int]]:
    meanings = dict(table.groups)
    found: list[tuple[str, str, int]] = []
    for heading in headings[1:]:
        if found and found[-1][0] == heading.group:
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((heading.group, meanings.get(heading.group, ""), 1))
    return found if any(name for name, _, _ in found) else []


def _footnotes(table: Table, places: Sequence[int]) -> list[str]:
    """Cautions of shown columns, and then what lines and their cells have to tell, each once."""
    shown = [table.headings[place] for place in places]
    told = [heading.caution for heading in shown if heading.caution]
    if table.footnotes:
        for line in table.lines:
            cells = [line.cells[place] for place in places]
            told += [note for cell in cells if (note := _footnote(line, cell))]
            told += [line.note] if line.note else []
    return list(dict.fromkeys(told))


def _footnote(line: Line, cell: Cell) -> str:
    """A cell's note, or the line's where its causes are all that is told."""
    note = (cell.note or "") if isinstance(cell, Estimate) else ""
    same = line.note and (note == line.causes or note.endswith(f" values missing: {line.causes}"))
    return line.note if same else note


def _marks(note: str, footnotes: Sequence[str]) -> tuple[int, ...]:
    return (footnotes.index(note) + 1,) if note in footnotes else ()


def _shown(
    line: Line, cell: Cell, heading: Heading, footnotes: Sequence[str], first: bool
) -> Shown:
    style = line.style or heading.style
    text = cell_text(cell, style, heading.signed)
    kind = " ".join(["number"] * (heading.style != "words") + ["first"] * first)
    if isinstance(cell, Words) and cell.tone:
        return Shown(text, kind=f"{kind} {cell.tone}".strip())
    if not isinstance(cell, Estimate):
        return Shown(text, kind=kind)
    interval = interval_text(cell, style, heading.signed)
    count = f"n = {cell.n:,}" if cell.value is not None else None
    tip = "; ".join(part for part in (cell.place, count, cell.note, heading.caution) if part)
    shortened = interval if style in ("plain", "decimals") else brief(interval)
    return Shown(text, shortened, tip, _marks(_footnote(line, cell), footnotes), kind)


def _about(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the runs have in common, or all they differ in: shown under the title."""
    versions = [
        _pairs(run.get("versions"), ("palimpsest-lm", "torch", "transformers")) for run in runs
    ]
    found = {
        "Model": _distinct(_named(run.get("model")) for run in runs),
        "Facts": _distinct(_named(run.get("facts")) for run in runs),
        "Targets": _distinct(
            f"{size} facts" for run in runs if (size := (_facts(run, "sizes") or {}).get("target"))
        ),
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


def _listed(runs: Sequence[Run]) -> list[tuple[Run, str, str]]:
    """Runs, their labels, and the settings that not all of them share."""
    texts = [", ".join(f"{k}={v}" for k, v in settings.items()) for settings in differences(runs)]
    return list(zip(runs, labels(runs), texts, strict=True))


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
