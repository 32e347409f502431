"""Runs that are killed, or find their directory damaged, end as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pytest

import palimpsest
from palimpsest.evaluate.probes import Probes
from palimpsest.record.results import Run, load_runs, load_unfinished
from palimpsest.record.row import SCHEMA_VERSION

KILLS = 5
"""Of each directory."""

HOST = """
import glob, json, os, signal, sys, time
import palimpsest.cli.jobs, palimpsest.experiment, transformers.models.llama.modeling_llama
from palimpsest.cli import main

# Ignored under nohup, or in a shell's background; children inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

def written():
    return [os.stat(path).st_mtime_ns for path in glob.glob(place + "/*/run.json")]

def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

for line in sys.stdin:
    cache, words, place, begun, delay, number = json.loads(line)
    os.environ["PALIMPSEST_CACHE"] = cache
    before = written()
    child = os.fork()
    if not child:
        code = 1
        try:
            code = main([*words, "record.dir=" + place])
        finally:
            os._exit(code)
    if delay is not None:
        while begun and written() == before and not ended(child):
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(child, number)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Imports everything once, then runs `palimpsest` in a process of its own for every line."""


@dataclass(frozen=True)
class Host:
    """A process that starts others.

    Attributes:
        process: runs `HOST`.
    """

    process: subprocess.Popen[str]

    def run(self, cache: Path, words: Sequence[str], place: Path) -> int:
        """The exit code of one command."""
        return self._ask(cache, words, place, False, None, 0)

    def kill(
        self,
        cache: Path,
        words: Sequence[str],
        place: Path,
        begun: bool,
        delay: float,
        number: int = signal.SIGKILL,
    ) -> bool:
        """Whether one command was killed: False if it had ended.

        Args:
            cache: where the command keeps what it computes.
            words: the command.
            place: where its results go.
            begun: count from the moment at which the run's directory is opened.
            delay: in seconds.
            number: of the signal; one that the command can hear ends it with exit code 1.
        """
        code = self._ask(cache, words, place, begun, delay, number)
        assert code in (0, -number if number == signal.SIGKILL else 1)
        return code != 0

    def _ask(self, cache, words, place, begun, delay, number) -> int:
        asked = json.dumps([str(cache), words, str(place), begun, delay, number])
        print(asked, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def host(cache: Path) -> Iterator[Host]:
    """Takes a few seconds to import; from then on a command starts at once."""
    with subprocess.Popen(
        [sys.executable, "-c", HOST], env=environment(cache), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            yield Host(process)
        finally:
            process.stdin.close()


def environment(cache: Path) -> dict[str, str]:
    """One thread: a process that forks may have no more."""
    source = str(Path(palimpsest.__file__).parents[1])
    return os.environ | {
        "PALIMPSEST_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": source,
    }  # fmt: skip


def only(directory: Path) -> Run:
    [run] = load_runs(directory)
    return run


def rounded(facts: list[dict]) -> list[dict]:
    """Facts with their probabilities as far as two processes agree on them."""
    return [
        {**fact, "top": [[token, round(chance, 5)] for token, chance in fact["top"]]}
        for fact in facts
    ]


def check_like(run: Run, expected: Run) -> None:
    """The same rows, nothing half written, and nothing beside the contract's names."""
    assert run.rows == expected.rows
    assert rounded(run.facts) == rounded(expected.facts)
    names = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*")}
    # A process that is killed between DONE and the release of its lock leaves the lock's file.
    assert names - {".lock"} == {
        "DONE", "run.json", "rows.parquet", "facts.json", "intervention",
        "intervention/intervention.json", "intervention/intervention.safetensors",
    }  # fmt: skip


# -- killed ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rome", "leace"])
def test_a_run_killed_at_any_moment_ends_as_one_never_killed(host, few, tmp_path, method):
    words = ["run", *few, f"intervene={method}"]
    for name in ("whole", "again"):
        assert host.run(tmp_path / "fresh", words, tmp_path / name) == 0
    expected, again = only(tmp_path / "whole"), only(tmp_path / "again")
    check_like(again, expected)
    seconds = again.run["seconds"]  # with a full cache: the shortest that a run can be
    before = seconds["load"] + seconds["split"]
    work = seconds["prepare"] + seconds["fit"] + seconds["measure"]
    moments = random.Random(method)
    for place in (tmp_path / "one", tmp_path / "two"):
        kills = 0
        while kills < KILLS:
            begun = kills > 0  # the first kill of each directory may fall before there is one
            moment = moments.uniform(0, work if begun else before + work)
            if host.kill(tmp_path / "cache", words, place, begun, moment):
                kills += 1
            else:  # what earlier attempts left made it quicker
                check_like(only(place), expected)
                shutil.rmtree(place)
        assert host.run(tmp_path / "cache", words, place) == 0
        check_like(only(place), expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_run_that_is_asked_to_end_says_so_and_is_taken_up(host, few, done, tmp_path, number):
    words = ["run", *few, "intervene=leace"]
    for name in ("cold", "warm"):
        assert host.run(tmp_path / "cache", words, tmp_path / name) == 0
    seconds = only(tmp_path / "warm").run["seconds"]  # as long as each of the runs below
    work = seconds["prepare"] + seconds["fit"] + seconds["measure"]
    moments, stops = random.Random(number), 0
    while stops < KILLS:
        delay = moments.uniform(0, work)
        if host.kill(tmp_path / "cache", words, tmp_path / "one", True, delay, number):
            stops += 1
            [run] = load_unfinished(tmp_path / "one")
            name = signal.Signals(number).name
            error = "KeyboardInterrupt" if number == signal.SIGINT else f"stopped by {name}"
            assert (run["status"], run["error"]) == ("failed", error)
        else:
            shutil.rmtree(tmp_path / "one")
    assert host.run(tmp_path / "cache", words, tmp_path / "one") == 0
    check_like(only(tmp_path / "one"), done["leace"])


@pytest.mark.slow
def test_a_process_killed_while_it_measures_is_taken_up_by_another(few, done, tmp_path):
    command = [sys.executable, "-m", "palimpsest", "run", *few, "intervene=leace"]
    around = environment(tmp_path / "cache")
    process = subprocess.Popen(command, env=around, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("results/runs/*/rows.jsonl")):
        assert process.poll() is None, "ended before its first row"
        time.sleep(0.01)
    time.sleep(random.Random(0).uniform(0, 0.1))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    second = subprocess.run(command, env=around, capture_output=True, text=True)
    run = only(tmp_path / "results" / "runs")
    assert (second.returncode, second.stderr) == (0, f"leace: done: results/runs/{run.run_id}\n")
    check_like(run, done["leace"])


def test_a_finished_run_is_skipped_with_one_line(call, few, tmp_path):
    assert call("run", *few, "intervene=none").code == 0
    path = only(tmp_path / "results" / "runs").path
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    outcome = call("run", *few, "intervene=none")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == f"none: done before, left as it is: results/runs/{path.name}\n"
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


# -- damaged ---------------------------------------------------------------------------------------


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture
def unfinished(call, few, done, tmp_path, monkeypatch) -> Path:
    """The directory of a run of LEACE that has some of its sections."""
    with monkeypatch.context() as patch:
        patch.setattr(Probes, "measure", interrupt)
        assert call("run", *few, "intervene=leace").code == 1
    path = tmp_path / "results" / "runs" / done["leace"].run_id
    assert '"section"' in (path / "rows.jsonl").read_text()
    return path


def spoil(path: Path) -> None:
    """Change the value of every row: whatever is kept of them shows."""
    lines = [json.loads(line) for line in (path / "rows.jsonl").read_text().splitlines()]
    changed = [line | {"value": 123.0} if "metric" in line else line for line in lines]
    (path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))


def test_rows_of_an_unfinished_run_are_kept(call, few, done, unfinished):
    """The tests below would see a row that leaks: here, where nothing is damaged, rows do."""
    spoil(unfinished)
    assert call("run", *few, "intervene=leace").code == 0
    assert 123.0 in {row.value for row in load_runs(unfinished)[0].rows}


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x00\x00\n", b"\xff\xfe\n", b"17\n", b'{"metric": "torn"}\n',
        b'{"section": ["fit"]}\n',
    ],
)  # fmt: skip
def test_rows_with_garbage_among_them_are_all_measured_again(call, few, done, unfinished, garbage):
    spoil(unfinished)
    lines = (unfinished / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (unfinished / "rows.jsonl").write_bytes(b"".join([*lines[:1], garbage, *lines[1:]]))
    outcome = call("run", *few, "intervene=leace")
    assert (outcome.code, outcome.err.count("\n")) == (0, 1)
    check_like(only(unfinished), done["leace"])


def test_half_written_files_of_a_killed_run_are_removed(call, few, done, unfinished):
    for name in ("run.json", "rows.parquet", "facts.json", "DONE"):
        (unfinished / f".{name}.a1b2c3_4").write_text("half")
    assert call("run", *few, "intervene=leace").code == 0
    check_like(only(unfinished), done["leace"])


def check_refused(call, few, path: Path, expected: str) -> None:
    """One line with a remedy, and every file as it was."""
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    outcome = call("run", *few, "intervene=leace")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.startswith("error: ")
    assert expected in outcome.err
    assert "delete the" in outcome.err or "a newer version" in outcome.err
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} == before


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b"[1]", b'{"run_id": "a"}'])
@pytest.mark.parametrize("mark", [False, True], ids=["unfinished", "finished"])
def test_a_run_json_that_cannot_be_read_is_refused(call, few, unfinished, garbage, mark):
    (unfinished / "run.json").write_bytes(garbage)
    if mark:
        (unfinished / "DONE").touch()
    check_refused(call, few, unfinished, "cannot read results/runs/")


def test_a_finished_run_without_its_run_json_is_refused(call, few, unfinished):
    (unfinished / "run.json").unlink()
    (unfinished / "DONE").touch()
    check_refused(call, few, unfinished, "cannot read results/runs/")


def cut(path: Path) -> None:
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path) -> None:
    """Let another file stand there, of the same size."""
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.fixture
def finished(few, done, tmp_path) -> Path:
    """The directory of a finished run of LEACE."""
    path = tmp_path / "results" / "runs" / done["leace"].run_id
    shutil.copytree(done["leace"].path, path)
    return path


@pytest.mark.parametrize("damage", [Path.unlink, cut, overwrite])
@pytest.mark.parametrize(
    "name",
    ["rows.parquet", "intervention/intervention.json", "intervention/intervention.safetensors"],
)
def test_a_finished_run_with_a_damaged_file_is_refused(call, few, finished, name, damage):
    damage(finished / name)
    check_refused(call, few, finished, f"cannot read results/runs/{finished.name}/{name}: ")


def test_a_finished_run_without_its_intervention_is_refused(call, few, finished):
    shutil.rmtree(finished / "intervention")
    check_refused(call, few, finished, "intervention/intervention.json: ")


@pytest.mark.parametrize("garbage", [b"", b"[1", b"{}", b"\xff\xfe"])
def test_a_finished_run_whose_facts_are_no_list_is_refused(call, few, finished, garbage):
    (finished / "facts.json").write_bytes(garbage)
    check_refused(call, few, finished, "/facts.json: ")


def test_a_parquet_file_of_other_columns_is_refused(call, few, finished):
    place = str(finished / "rows.parquet")
    duckdb.execute(f"COPY (SELECT 1 AS a) TO '{place}' (FORMAT parquet)")
    check_refused(call, few, finished, "/rows.parquet: ")


def test_a_finished_run_that_is_whole_is_skipped(call, few, finished):
    outcome = call("run", *few, "intervene=leace")
    assert (outcome.code, outcome.err[:18]) == (0, "leace: done before")


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, None])
@pytest.mark.parametrize("mark", [False, True], ids=["unfinished", "finished"])
def test_a_run_of_another_schema_is_refused(call, few, unfinished, version, mark):
    run = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps(run | {"schema": version}))
    if mark:
        (unfinished / "DONE").touch()
    check_refused(call, few, unfinished, f"expected results of schema {SCHEMA_VERSION} in")
