"""Results, reports and terminals for tests of studies."""

import io
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from palimpsest.record.results import Results, Run
from palimpsest.report import page
from palimpsest.report.csv import to_csv
from palimpsest.report.terminal import print_tables
from palimpsest.study.against import Against
from palimpsest.study.along import Along
from palimpsest.study.erasing import Erasing
from palimpsest.study.fact_by_fact import FactByFact
from palimpsest.study.headline import Headline
from palimpsest.study.localization import Localization
from palimpsest.study.study import Block, Study
from palimpsest.study.table import Table
from palimpsest.study.tracing import Tracing
from palimpsest.study.undertext import Undertext


def studies(against: str | None = None) -> list[Study]:
    """Those of conf/report.yaml."""
    return [
        Headline(), Against(against), Along(), Undertext(), FactByFact(), Localization(), Erasing(),
        Tracing(),
    ]  # fmt: skip


def of(*runs: Run) -> Results:
    """The results of some runs."""
    return Results.of(list(dict.fromkeys(runs)))


def sweep_of(run: Run) -> Results:
    """The results in the directory where a run's stands."""
    return Results.open(run.path.parent)


def write_report(directory: Path, against: str | None = None) -> Path:
    """The report of a directory."""
    return page.write_report(directory, studies(against))


def tables(results: Results, against: str | None = None) -> list[Table]:
    """What all studies say in tables."""
    blocks = (block for study in studies(against) for block in study.read(results))
    return [block for block in blocks if isinstance(block, Table)]


def csv_of(blocks: Iterable[Block]) -> str:
    """The table among them that is for CSV alone."""
    [table] = [b for b in blocks if isinstance(b, Table) and b.views == ("csv",)]
    return to_csv(table)


def printed(results: Results, width: int = 110, against: str | None = None) -> str:
    """What a terminal shows."""
    console = Console(file=io.StringIO(), width=width)
    found = tables(results, against)
    print_tables([t for t in found if "terminal" in t.views and t.lines], console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text
