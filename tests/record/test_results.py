"""Reading results: what cannot be trusted is passed over and told, and refused when alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from palimpsest.errors import RequestError
from palimpsest.record.results import Results, load_runs
from palimpsest.record.row import Row
from palimpsest.record.store import RunStore

GOOD, BAD = "aa0000000001", "bb0000000002"
ABOUT = {"scope": "fact", "axis": "downstream", "metric": "efficacy", "protocol": "argmax"}


def written(directory: Path, run_id: str) -> Path:
    store = RunStore.open(directory / run_id, {"run_id": run_id, "method": "rome"})
    store.append(Row(**ABOUT, fact_id=fact, value=1.0) for fact in ("a", "b"))
    store.write_facts([])
    store.finish()
    return directory / run_id


def changed(path: Path, **fields: object) -> None:
    run = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(run | fields))


def foreign(path: Path) -> None:
    (path / "run.json").write_text('{"scripts": {"test": "jest"}}')


def damaged(path: Path) -> None:
    (path / "rows.parquet").write_bytes(b"PAR1 cut off")


def without_rows(path: Path) -> None:
    (path / "rows.parquet").unlink()


def repeated(path: Path) -> None:
    rows = path / "rows.parquet"
    duckdb.execute(
        f"COPY (FROM '{rows}' UNION ALL FROM '{rows}') TO '{path / 'twice'}' (FORMAT parquet)"
    )
    (path / "twice").replace(rows)


def of_other_columns(path: Path) -> None:
    duckdb.execute(f"COPY (SELECT 1 AS value) TO '{path / 'other'}' (FORMAT parquet)")
    (path / "other").replace(path / "rows.parquet")


def facts_that_are_none(path: Path) -> None:
    (path / "facts.json").write_text('{"a": 1}')


SPOILT = [
    (foreign, "expected the keys run_id, method, status"),
    (damaged, "cannot read .*rows.parquet"),
    (without_rows, "cannot read .*rows.parquet"),
    (repeated, "2 of 4 rows are there twice"),
    (of_other_columns, "cannot read .*rows.parquet"),
    (facts_that_are_none, "expected a list of objects with a fact_id"),
    (lambda path: changed(path, schema=1), "found 1; its rows do not say by which measure"),
    (lambda path: changed(path, schema=None), "found None"),
    (lambda path: changed(path, status="running"), "expected status 'done' beside DONE"),
    (lambda path: changed(path, model=[1]), "expected model to be an object"),
    (lambda path: changed(path, run_id=GOOD), f"expected one run of the id {GOOD}"),
]


@pytest.mark.parametrize(("spoil", "cause"), SPOILT)
def test_what_cannot_be_trusted_hides_no_other_run(
    tmp_path: Path, spoil: Callable[[Path], None], cause: str
) -> None:
    written(tmp_path, GOOD)
    spoil(written(tmp_path, BAD))
    found = Results.open(tmp_path)
    assert [run.run_id for run in found.runs] == [GOOD]
    [passed] = found.passed_over
    assert passed.path == tmp_path / BAD
    with pytest.raises(RequestError, match=cause) as caught:
        raise RequestError(passed.cause)
    assert "\n" not in str(caught.value)
    assert found.query("SELECT run_id, count(*) FROM rows GROUP BY ALL") == [(GOOD, 2)]
    with pytest.warns(UserWarning, match="passed over: "):
        assert [run.run_id for run in load_runs(tmp_path)] == [GOOD]


@pytest.mark.parametrize(("spoil", "cause"), SPOILT[:-1])
def test_alone_it_is_refused(tmp_path: Path, spoil: Callable[[Path], None], cause: str) -> None:
    spoil(written(tmp_path, BAD))
    for directory in (tmp_path, tmp_path / BAD):
        with pytest.raises(RequestError, match=cause):
            Results.open(directory)


def test_of_several_that_cannot_be_read_the_first_is_told(tmp_path: Path) -> None:
    for name in (GOOD, BAD, "cc0000000003"):
        damaged(written(tmp_path, name))
    with pytest.raises(RequestError, match=rf"{GOOD}.*\(2 more cannot be read either\)"):
        Results.open(tmp_path)


def test_the_same_run_in_two_places_is_read_once(tmp_path: Path) -> None:
    shutil.copytree(written(tmp_path, GOOD), tmp_path / "copy")
    found = Results.open(tmp_path)
    assert [run.path.name for run in found.runs] == [GOOD]
    assert [passed.path.name for passed in found.passed_over] == ["copy"]


def test_the_relation_holds_every_row_of_every_run(sweep: Path) -> None:
    found = Results.open(sweep)
    counts = dict(found.query("SELECT run_id, count(*) FROM rows GROUP BY ALL"))
    assert counts == {run.run_id: len(run.rows) for run in found.runs}
    assert [run["status"] for run in found.unfinished] == ["failed"]


def test_a_run_that_is_going_is_read_from_its_lines(tmp_path: Path) -> None:
    store = RunStore.open(tmp_path / GOOD, {"run_id": GOOD, "method": "rome"})
    store.append([Row(**ABOUT, fact_id="a", value=0.5)], "efficacy")
    found = Results.of([store.snapshot()])
    assert found.query("SELECT run_id, fact_id, value FROM rows") == [(GOOD, "a", 0.5)]


def test_odd_names_of_directories_are_no_patterns(tmp_path: Path) -> None:
    place = tmp_path / "it's [a-z] *?"
    written(place, GOOD)
    assert Results.open(place).query("SELECT count(*) FROM rows") == [(2,)]


def test_rows_that_went_away_are_told(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    found = Results.open(tmp_path)
    (path / "rows.parquet").unlink()
    with pytest.raises(RequestError, match="ask for the report again"):
        found.query("SELECT count(*) FROM rows")
