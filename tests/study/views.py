"""What studies say, as the views show it."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from palimpsest.record.results import Results
from palimpsest.report.csv import to_csv
from palimpsest.report.page import write_report
from palimpsest.study.study import Study
from palimpsest.study.table import Table


def listed(study: Study, results: Results) -> list[dict[str, str]]:
    """The lines of a study's table for CSV."""
    tables = [block for block in study.read(results) if isinstance(block, Table)]
    [table] = [table for table in tables if table.views == ("csv",)]
    return list(csv.DictReader(io.StringIO(to_csv(table))))


def page_of(directory: Path, *studies: Study) -> str:
    """The page that is written beside the results."""
    return write_report(directory, studies).read_text(encoding="utf-8")


def lines_of(directory: Path, *studies: Study, width: int = 110) -> Sequence[str]:
    """What the terminal shows."""
    console = Console(file=io.StringIO(), width=width)
    write_report(directory, studies, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]
