"""The terminal's table is whole in a hundred columns."""

import pytest

from palimpsest.study.columns import HEADLINE
from tests.study.reading import of, printed


def lines_of(runs, width: int) -> list[str]:
    return printed(of(*runs), width).splitlines()


@pytest.mark.parametrize("width", [100, 120])
def test_the_table_fits(runs, width):
    lines = lines_of(runs, width)
    assert max(map(len, lines)) <= width
    assert lines[0] == "What is left, what was lost"
    heads = lines[1].split()
    assert heads == ["method", *(column.short for column in HEADLINE if not column.closer)]
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("width", [100, 120])
def test_every_run_has_its_numbers_on_one_line(runs, width):
    lines = lines_of(runs, width)
    rome, closer = [line for line in lines if line.startswith("rome [variant=plain]")]
    closer_columns = [column for column in HEADLINE if column.closer]
    numbers = len(HEADLINE) - len(closer_columns)
    assert len(rome.removeprefix("rome [variant=plain]").split()) == numbers
    assert len(closer.removeprefix("rome [variant=plain]").split()) >= len(closer_columns)
    erased, _ = [line for line in lines if line.startswith("leace [gate=null]")]
    assert "–" in erased


def test_the_legend_names_every_column(runs):
    text = " ".join(" ".join(lines_of(runs, 100)).split())
    for column in HEADLINE:
        assert f"{column.short} {column.title}" in text
