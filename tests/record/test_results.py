"""One damaged directory among results is passed over and told; the others are read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from palimpsest.errors import RequestError
from palimpsest.locks import held
from palimpsest.record.results import Results, load_runs
from palimpsest.record.row import Row
from palimpsest.record.store import RunStore, finished_runs

ABOUT = {"scope": "fact", "axis": "downstream", "metric": "efficacy", "protocol": "argmax"}


def finished(directory: Path, run_id: str = "0123456789ab") -> Path:
    store = RunStore.open(directory / run_id, {"run_id": run_id, "method": "rome"})
    store.append([Row(**ABOUT, fact_id=fact, value=1.0) for fact in ("a", "b")])
    store.finish()
    return directory / run_id


def rewritten(run: Path, **changes: object) -> None:
    file = run / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def text(content: str) -> Callable[[Path], None]:
    return lambda run: (run / "run.json").write_text(content) and None


def rows_twice(run: Path) -> None:
    file = run / "rows.parquet"
    with duckdb.connect() as connection:
        connection.execute(f"CREATE TABLE found AS SELECT * FROM '{file}'")
        connection.execute("INSERT INTO found SELECT * FROM found LIMIT 1")
        connection.execute(f"COPY found TO '{file}' (FORMAT parquet)")


def other_columns(run: Path) -> None:
    duckdb.execute(f"COPY (SELECT 1 AS value) TO '{run / 'rows.parquet'}' (FORMAT parquet)")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "not an object": (text("[]"), "expected the keys"),
    "other keys": (text('{"name": "x"}'), "expected the keys"),
    "other kinds": (text('{"run_id": 5, "method": [], "status": {}}'), "expected the keys"),
    "a million brackets": (text("[" * 1_000_000), "cannot read"),
    "no text": (lambda run: (run / "run.json").write_bytes(b"\xff\xfe\x00"), "cannot read"),
    "a list for a model": (lambda run: rewritten(run, model=["m"]), "expected model"),
    "a seed of another kind": (lambda run: rewritten(run, seed={"a": 1}), "kind of value in seed"),
    "a site without a layer": (lambda run: rewritten(run, site={"layer": "x"}), "value in site"),
    "a number for sizes": (lambda run: rewritten(run, facts={"sizes": 3}), "in facts.sizes"),
    "a number for requests": (lambda run: rewritten(run, requests=5), "value in requests"),
    "numbers for measures": (lambda run: rewritten(run, measures={"a": 5}), "value in measures"),
    "lists for measures": (lambda run: rewritten(run, measures={"a": [[1]]}), "in measures"),
    "schema 1": (lambda run: rewritten(run, schema=1), "run the sweep again"),
    "a newer schema": (lambda run: rewritten(run, schema=99), "a newer version"),
    "not done": (lambda run: rewritten(run, status="running"), "expected status 'done'"),
    "rows twice": (rows_twice, "1 of 3 rows are there twice"),
    "rows cut off": (lambda run: (run / "rows.parquet").write_bytes(b"PAR1 cut"), "rows.parquet"),
    "no rows": (lambda run: (run / "rows.parquet").unlink(), "rows.parquet"),
    "other columns": (other_columns, "rows.parquet"),
    "facts of another kind": (lambda run: (run / "facts.json").write_text("[1]"), "facts.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_it_is_passed_over_beside_others_and_refused_alone(name: str, tmp_path: Path) -> None:
    damage, cause = DAMAGE[name]
    bad = finished(tmp_path / "alone")
    damage(bad)
    with pytest.raises(RequestError, match=cause) as caught:
        Results.open(tmp_path / "alone")
    assert "\n" not in str(caught.value)
    shutil.move(bad, tmp_path / "beside" / "bad")
    good = finished(tmp_path / "beside", "aaaaaaaaaaaa")
    found = Results.open(tmp_path / "beside")
    assert [run.path for run in found.runs] == [good]
    [passed] = found.passed_over
    assert passed.path == tmp_path / "beside" / "bad"
    assert cause in passed.cause
    with pytest.warns(UserWarning, match="passed over: "):
        assert len(load_runs(tmp_path / "beside")) == 1


def test_a_run_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    shutil.copytree(finished(tmp_path), tmp_path / "copy")
    found = Results.open(tmp_path)
    assert len(found.runs) == 1
    assert "expected one run of the id" in found.passed_over[0].cause


def test_the_rows_of_many_runs_are_one_relation(tmp_path: Path) -> None:
    place = tmp_path / "we[i]rd 'dir*"
    for run_id in ("a" * 12, "b" * 12):
        finished(place, run_id)
    found = Results.open(place).query(
        "SELECT run_id, count(*), sum(value) FROM rows GROUP BY ALL ORDER BY ALL"
    )
    assert found == [("a" * 12, 2, 2.0), ("b" * 12, 2, 2.0)]


def test_a_run_that_is_going_is_read_from_its_log(tmp_path: Path) -> None:
    store = RunStore.open(tmp_path / "run", {"run_id": "c" * 12, "method": "rome"})
    store.append([Row(**ABOUT, fact_id="a", value=1.0)], section="fit")
    done = load_runs(finished(tmp_path))[0]
    results = Results.of([store.snapshot(), done])
    assert results.query("SELECT run_id, count(*) FROM rows GROUP BY ALL ORDER BY ALL") == [
        ("0123456789ab", 2), ("c" * 12, 1),
    ]  # fmt: skip
    assert [run.run_id for run in Results.of([done]).runs] == ["0123456789ab"]


def test_states_are_told_where_nothing_is_finished(tmp_path: Path) -> None:
    RunStore.open(tmp_path / "a", {"run_id": "d" * 12, "method": "rome"}).fail("boom")
    with pytest.raises(RequestError, match="found dddddddddddd failed; run"):
        Results.open(tmp_path)


def test_of_several_that_cannot_be_read_the_first_is_told(tmp_path: Path) -> None:
    for letter in "abc":
        (finished(tmp_path, letter * 12) / "rows.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(RequestError, match=r"a{12}.*\(2 more cannot be read either\)"):
        Results.open(tmp_path)


def test_rows_that_went_away_are_told(tmp_path: Path) -> None:
    path = finished(tmp_path)
    found = Results.open(tmp_path)
    (path / "rows.parquet").unlink()
    with pytest.raises(RequestError, match="ask for the report again"):
        found.query("SELECT count(*) FROM rows")


def test_a_run_that_died_is_told_from_one_that_lives(tmp_path):
    """Both say that they are running; only one of them is locked."""
    for name in ("aa0000000001", "bb0000000002", "cc0000000003"):
        store = RunStore.open(tmp_path / name, {"run_id": name, "method": "rome"})
    store.finish()
    with held(tmp_path / "bb0000000002" / ".lock"):
        found = Results.open(tmp_path).unfinished
    assert [(run["run_id"], run["status"]) for run in found] == [
        ("aa0000000001", "died"), ("bb0000000002", "running"),
    ]  # fmt: skip


def test_a_pipe_in_a_files_place_is_passed_over(tmp_path: Path) -> None:
    """To read it would never end."""
    finished(tmp_path)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "run.json")
    found = Results.open(tmp_path)
    assert len(found.runs) == 1
    assert "no file" in found.passed_over[0].cause


def test_what_says_that_it_is_not_done_answers_no_request(tmp_path: Path) -> None:
    run = finished(tmp_path)
    rewritten(run, requests=["r"])
    assert list(finished_runs(tmp_path)) == ["r"]
    rewritten(run, requests=["r"], status="failed")
    assert finished_runs(tmp_path) == {}
