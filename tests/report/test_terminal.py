"""The terminal's table is whole in a hundred columns."""

import io

import pytest
from rich.console import Console

from palimpsest.report.terminal import print_summary
from palimpsest.study.columns import HEADLINE


def printed(runs, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_summary(runs, console)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [100, 120])
def test_the_table_fits(runs, width):
    lines = printed(runs, width)
    assert max(map(len, lines)) <= width
    heads = lines[0].split()
    assert heads == ["method", *(column.short for column in HEADLINE)]
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("width", [100, 120])
def test_every_run_has_its_numbers_on_one_line(runs, width):
    lines = printed(runs, width)
    [rome] = [line for line in lines if line.startswith("rome [variant=plain]")]
    assert len(rome.removeprefix("rome [variant=plain]").split()) == len(HEADLINE)
    [erased] = [line for line in lines if line.startswith("leace [gate=null]")]
    assert "–" in erased


def test_the_legend_names_every_column(runs):
    text = " ".join(" ".join(printed(runs, 100)).split())
    for column in HEADLINE:
        assert f"{column.short} {column.title}" in text
