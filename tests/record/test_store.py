"""The store: what it writes is what is read, all or nothing, in the contract's types."""

import dataclasses
import errno
import json
import math
import random
import resource
from pathlib import Path

import duckdb
import pytest

from palimpsest.errors import RequestError, WriteError
from palimpsest.record.provenance import code
from palimpsest.record.results import load_runs, load_unfinished
from palimpsest.record.row import SCHEMA_VERSION, Row
from palimpsest.record.store import RunStore, check_earlier, is_done

RUN = {"run_id": "0123456789ab", "method": "rome", "config": {"seed": 0}}


def row(**more) -> Row:
    about = {"scope": "fact", "axis": "downstream", "metric": "efficacy", "protocol": "argmax"}
    return Row(**(about | {"value": 1.0} | more))


def described(path: Path) -> dict[str, str]:
    rows = duckdb.execute("DESCRIBE SELECT * FROM read_parquet(?)", [str(path)]).fetchall()
    return {name: kind for name, kind, *_ in rows}


def test_round_trip_keeps_every_column_and_digit(tmp_path):
    numbers = random.Random(0)
    rows = [
        row(
            fact_id=f"f{i:02d}",
            relation="P36",
            split="target",
            prompt_id="2024-01-01",
            layer=i,
            position="last_prompt",
            step=i,
            budget=3,
            value=numbers.random(),
            n=2**40,
            note="snowman ☃ 'quoted' \"twice\"\nand a line",
        )
        for i in range(20)
    ]
    store = RunStore.open(tmp_path / "we[i]rd 'dir*", RUN)
    store.append(reversed(rows))
    store.append([row(value=None, note="none")])
    store.finish()
    [run] = load_runs(tmp_path / "we[i]rd 'dir*")
    assert sorted(run.rows[1:], key=lambda r: r.layer) == rows
    assert run.rows[0].value is None


def test_parquet_has_the_contracts_columns_and_types(tmp_path):
    store = RunStore.open(tmp_path, RUN)
    store.append([row()])
    store.finish()
    text = [
        "measure",
        "measure_key",
        "fact_id",
        "relation",
        "split",
        "scope",
        "axis",
        "metric",
        "protocol",
        "prompt_id",
    ]
    assert described(tmp_path / "rows.parquet") == {
        **dict.fromkeys(text, "VARCHAR"),
        "layer": "INTEGER",
        "position": "VARCHAR",
        "step": "INTEGER",
        "budget": "INTEGER",
        "value": "DOUBLE",
        "n": "BIGINT",
        "note": "VARCHAR",
    }
    query = "SELECT DISTINCT compression FROM parquet_metadata(?)"
    assert duckdb.execute(query, [str(tmp_path / "rows.parquet")]).fetchall() == [("ZSTD",)]


def test_parquet_does_not_depend_on_the_order_of_writing(tmp_path):
    rows = [row(fact_id=str(i), layer=layer) for i in range(5) for layer in (None, 3, 1)]
    for name, order in (("a", rows), ("b", rows[::-1])):
        store = RunStore.open(tmp_path / name, RUN)
        store.append(order)
        store.finish()
    written = [(tmp_path / name / "rows.parquet").read_bytes() for name in "ab"]
    assert written[0] == written[1]


def test_a_run_without_rows_can_finish(tmp_path):
    RunStore.open(tmp_path, RUN).finish()
    assert load_runs(tmp_path)[0].rows == []


def test_rows_are_on_disk_before_the_run_is_done(tmp_path):
    store = RunStore.open(tmp_path, RUN)
    store.append([row()])
    _, line = (tmp_path / "rows.jsonl").read_text().splitlines()  # the attempt comes first
    assert json.loads(line)["metric"] == row().metric
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"
    assert store.snapshot().rows == [row()]


def test_a_repeated_key_names_itself_and_writes_nothing(tmp_path):
    store = RunStore.open(tmp_path, RUN)
    store.append([row(fact_id="f1")])
    with pytest.raises(ValueError, match=r"metric='efficacy'.*layer=2") as caught:
        store.append([row(layer=2), row(fact_id="f3"), row(layer=2, value=0.0, n=9, note="x")])
    assert "fact_id" not in str(caught.value)
    with pytest.raises(ValueError, match="fact_id='f1'"):
        store.append([row(fact_id="f1")])
    assert store.snapshot().rows == [row(fact_id="f1")]
    store.append([row(fact_id="f3")])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_become_missing_with_a_cause(tmp_path, value):
    store = RunStore.open(tmp_path, RUN)
    store.append([row(value=value), row(layer=1, value=value, note="seen")])
    store.finish()
    first, second = load_runs(tmp_path)[0].rows
    assert first.value is None
    assert first.note == f"value was {value}"
    assert second.note == f"seen; value was {value}"


def test_finish_leaves_the_files_of_the_contract(tmp_path):
    store = RunStore.open(tmp_path, RUN)
    store.write_facts([{"fact_id": "f"}])
    store.update(device="cpu")
    store.finish()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["DONE", "facts.json", "rows.parquet", "run.json"]
    [run] = load_runs(tmp_path)
    assert run.facts == [{"fact_id": "f"}]
    assert run.run.items() >= {"status": "done", "device": "cpu", "schema": SCHEMA_VERSION}.items()


def test_a_failing_finish_leaves_rows_and_no_done(tmp_path, monkeypatch):
    store = RunStore.open(tmp_path, RUN)
    store.append([row()])
    monkeypatch.setattr("palimpsest.record.results.COLUMNS", {"value": "NO_SUCH_TYPE"})
    with pytest.raises(duckdb.Error):
        store.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "run.json"]
    assert not is_done(tmp_path)


def test_failing_records_one_line_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "s3cret-value-of-mine")
    store = RunStore.open(tmp_path, RUN)
    store.append([row()])
    store.fail(RuntimeError("bad\nthing s3cret-value-of-mine at https://me:pw@host/"))
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "failed"
    assert run["error"] == "RuntimeError: bad thing [redacted] at https://[redacted]@host/"
    assert (tmp_path / "rows.jsonl").exists()
    assert [failed["run_id"] for failed in load_unfinished(tmp_path)] == [RUN["run_id"]]


def test_failing_after_finish_changes_nothing(tmp_path):
    store = RunStore.open(tmp_path, RUN)
    store.finish()
    store.fail(RuntimeError("late"))
    assert load_runs(tmp_path)[0].run["status"] == "done"


def test_opening_clears_an_unfinished_attempt_but_not_other_files(tmp_path):
    store = RunStore.open(tmp_path, RUN)
    store.append([row()])
    (tmp_path / "intervention").mkdir()
    (tmp_path / "intervention" / "delta.safetensors").touch()
    (tmp_path / ".hydra").mkdir()
    store.fail("stopped")
    again = RunStore.open(tmp_path, RUN)
    again.append([row()])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hydra", "rows.jsonl", "run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["error"] is None


def test_an_interrupted_run_keeps_its_complete_sections(tmp_path):
    store = RunStore.open(tmp_path, RUN)
    store.append([row()], section="fit")
    store.append([row(metric="paraphrase")])  # of a section that was not finished
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"metric": "torn')
    again = RunStore.open(tmp_path, RUN)
    assert again.has("fit")
    assert not again.has("downstream")
    again.append([row(metric="paraphrase")], section="downstream")
    with pytest.raises(ValueError, match="two rows with the same key"):
        again.append([row()])
    again.finish()
    assert sorted(r.metric for r in load_runs(tmp_path)[0].rows) == ["efficacy", "paraphrase"]


@pytest.mark.parametrize("name", ["versions", "code", "device", "run_id"])
def test_sections_made_by_something_else_are_not_kept(tmp_path, name):
    RunStore.open(tmp_path, {**RUN, name: "one"}).append([row()], section="fit")
    assert not RunStore.open(tmp_path, {**RUN, name: "other"}).has("fit")


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_rows_that_do_not_fit_leave_no_trace_and_can_be_added_later(tmp_path, size):
    store = RunStore.open(tmp_path, RUN)
    store.append([row()], section="fit")
    before = (tmp_path / "rows.jsonl").read_bytes()
    many = [row(layer=layer) for layer in range(100)]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + size, limit[1]))
    try:
        with pytest.raises(WriteError, match=r"cannot write .*rows\.jsonl: File too large; free"):
            store.append(many, section="downstream")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert not store.has("downstream")
    store.append(many, section="downstream")
    store.finish()
    assert len(load_runs(tmp_path)[0].rows) == 101


def test_a_failure_that_cannot_be_recorded_hides_no_other(tmp_path, monkeypatch):
    store = RunStore.open(tmp_path, RUN)
    before = (tmp_path / "run.json").read_bytes()
    monkeypatch.setattr("tempfile.mkstemp", full)
    store.fail(RuntimeError("first"))
    assert (tmp_path / "run.json").read_bytes() == before


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_code_s_digest_tells_any_change_of_a_source_file(tmp_path, monkeypatch):
    package = tmp_path / "palimpsest"
    (package / "record").mkdir(parents=True)
    seen = []
    for name, text in (
        ("__init__.py", "a"), ("__init__.py", "b"), ("record/row.py", ""), ("record/row.py", "b"),
    ):  # fmt: skip
        (package / name).write_text(text)
        monkeypatch.setattr("palimpsest.__file__", str(package / "__init__.py"))
        seen.append(code.__wrapped__())
        assert seen[-1] == code.__wrapped__()
    (package / "notes.txt").write_text("not code")
    (package / "record/row.py").rename(package / "record/rows.py")
    seen.append(code.__wrapped__())
    assert len(set(seen)) == len(seen)


def test_a_finished_run_is_left_alone(tmp_path):
    RunStore.open(tmp_path, RUN).finish()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(RequestError, match="delete the directory"):
        RunStore.open(tmp_path, RUN)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_an_unwritable_place_is_a_wrong_request(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"record\.dir=") as caught:
        RunStore.open(tmp_path / "file" / "run", RUN)
    assert "\n" not in str(caught.value)


def test_loading_takes_a_sweep_or_a_run(sweep):
    runs = load_runs(sweep)
    assert [run.run_id for run in runs] == sorted(run.run_id for run in runs)
    [one] = load_runs(sweep / runs[3].run_id)
    assert one.rows == runs[3].rows
    assert [run["status"] for run in load_unfinished(sweep)] == ["failed"]


def test_select_finds_rows_by_columns(runs):
    found = runs[1].select("suppression", "candidates", prompt_id="fit")
    assert len(found) == 24
    assert {r.prompt_id for r in found} == {"fit"}
    assert runs[1].select("suppression", "no such") == []


def _without(tmp_path: Path) -> Path:
    return tmp_path / "nowhere"


def _only_failed(tmp_path: Path) -> Path:
    RunStore.open(tmp_path / "a", RUN).fail("boom")
    return tmp_path


def _broken(tmp_path: Path, text: str) -> Path:
    RunStore.open(tmp_path / "a", RUN).finish()
    (tmp_path / "a" / "run.json").write_text(text)
    return tmp_path


def _no_parquet(tmp_path: Path) -> Path:
    RunStore.open(tmp_path / "a", RUN).finish()
    (tmp_path / "a" / "rows.parquet").write_bytes(b"PAR1 cut off")
    return tmp_path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_without, "found nothing at"),
        (_only_failed, "found 0123456789ab failed; run"),
        (lambda path: _broken(path, "{"), "cannot read .*run.json.*run it again"),
        (lambda path: _broken(path, "[]"), "expected the keys run_id, method, status"),
        (
            lambda path: _broken(path, json.dumps(RUN | {"status": "done", "schema": 99})),
            "expected results of schema 2 .* found 99; .*a newer version",
        ),
        (
            lambda path: _broken(path, json.dumps(RUN | {"status": "done", "schema": 0})),
            "another version",
        ),
        (_no_parquet, "cannot read .*rows.parquet"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_what_to_do(tmp_path, make, message):
    with pytest.raises(RequestError, match=message) as caught:
        load_runs(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_rows_stay_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        row().value = 2.0


def test_only_a_finished_trace_may_lack_an_intervention(tmp_path):
    for method in ("trace", "none"):
        RunStore.open(tmp_path / method, RUN | {"method": method}).finish()
    check_earlier(tmp_path / "trace")
    with pytest.raises(RequestError, match=r"intervention\.json: .*; delete the run's directory"):
        check_earlier(tmp_path / "none")
