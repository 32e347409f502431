"""Study: results become what a report is made of: tables, figures, panels and pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from palimpsest.record.results import Results
from palimpsest.study.table import Table

MOST_RUNS = 40
"""Runs that a chart, and a table with a column for each, can show legibly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart.

    Attributes:
        name: distinct within a report.
        chart: plotly's figure as JSON; None where there is only the caption.
        title: its title; empty for one that belongs to what stands before it.
        subtitle: a title of less weight.
        caption: what it shows, in sentences.
        numbers: the file where its numbers are.
        narrow: whether it stands beside other narrow ones.
        key: glyph, colour and label of its lines, for those whose chart has no legend.
    """

    name: str
    chart: Mapping[str, Any] | None
    title: str = ""
    subtitle: str = ""
    caption: str = ""
    numbers: str = "rows.parquet"
    narrow: bool = False
    key: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One fact.

    Attributes:
        fact: as facts.json tells it: `subject`, `true`, `new`, `relation`, `prompt`.
        table: what was found about it.
        figure: its chart.
        note: a sentence.
    """

    fact: Mapping[str, Any]
    table: Table | None = None
    figure: Figure | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panels:
    """Facts one by one, each shown when asked.

    Attributes:
        panels: in order; none where there is only the caption.
        title: their title.
        caption: what they show, in sentences.
        first_open: whether the first is shown without asking.
    """

    panels: tuple[Panel, ...]
    title: str = ""
    caption: str = ""
    first_open: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure for papers.

    Attributes:
        path: its path under `figures/`, without an ending.
        draw: makes the matplotlib figure.
    """

    path: str
    draw: Callable[[], Any]


Block = Table | Figure | Panels | Picture
"""A part of a report; each view renders those that it can."""


class Study(Protocol):
    """A question asked of results."""

    def read(self, results: Results) -> Sequence[Block]:
        """What there is to say, in reading order; nothing if these results say nothing of it.

        Raises:
            RequestError: the study's settings do not fit the results.
        """
        ...


def too_many(runs: int, what: str) -> str:
    """What is said in place of something that is legible for few runs only."""
    return f"{what} of {runs:,} runs would not be legible: at most {MOST_RUNS} are shown."
