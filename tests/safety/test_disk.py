"""Full disks and places that cannot be written: one line, nothing half written, no row lost."""

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch
import wandb

from palimpsest import cache, files
from palimpsest.errors import RequestError, WriteError
from palimpsest.evaluate.probes import Probes
from palimpsest.record.results import load_runs, load_unfinished
from tests.cli.test_kill import environment

SECTIONED = "intervene=leace"
"""A run of several sections, with tensors in the cache."""

PAGE = 4096
"""Bytes that the smallest file takes."""

FULL = "No space left on device"


def names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


def contents(directory: Path) -> dict[str, bytes]:
    found = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


def check_line(outcome, code: int, message: str) -> None:
    """The exit code, and a single line with file, cause and remedy."""
    assert outcome.code == code, outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert re.match(rf"error: cannot write \S*{message}; .*\b[\w.]+=\n", outcome.err), outcome.err


def check_nothing_half_written(directory: Path) -> None:
    hidden = [path for path in directory.rglob("*") if path.name.startswith(".")]
    assert hidden == []
    for rows in directory.rglob("rows.jsonl"):
        assert re.fullmatch(rb"(\{.*\}\n)*", rows.read_bytes())


def check_same(directory: Path, expected) -> None:
    [run] = load_runs(directory)
    assert run.rows == expected.rows
    assert run.facts == expected.facts
    check_nothing_half_written(directory)


# -- no room, really -------------------------------------------------------------------------------


@contextmanager
def largest(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes; as a full disk does, the write ends in between."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_writes_that_end_in_between_leave_nothing_and_are_taken_up(call, few, done, tmp_path):
    words = ["run", *few, SECTIONED]
    stopped = set()
    for exponent in count(10):  # what is printed must fit, too: it is captured in a file
        with largest(2**exponent):
            outcome = call(*words)
        check_nothing_half_written(tmp_path)
        if outcome.code == 0:
            break
        check_line(outcome, 1, ".*: File too large")
        assert "DONE" not in {Path(name).name for name in names(tmp_path)}
        stopped.add(Path(outcome.err.split(":")[1]).name)
    check_same(tmp_path / "results/runs", done["leace"])
    assert {"run.json", "rows.jsonl"} <= stopped


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a file system can be mounted by root alone")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def leave(place: Path, pages: int) -> None:
    """Fill a file system but for so many pages."""
    filler = place / "filler"
    filler.unlink(missing_ok=True)
    found = os.statvfs(place)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (found.f_bfree - pages) * PAGE)


@pytest.mark.parametrize("tracker", ["record=local", "record=wandb"])
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(
    call, few, done, small, tmp_path, tracker
):
    mode = ["record.tracker.mode=offline"] if tracker == "record=wandb" else []
    words = ["run", *few, SECTIONED, tracker, *mode, f"record.dir={small}/runs"]
    codes = []
    for pages in (0, 1, 2, 4, 6, 9, 12, 20, 40, 80):
        leave(small, pages)
        outcome = call(*words)
        codes.append(outcome.code)
        if outcome.code == 0:
            break
        check_line(outcome, 1, f"small/runs.*: {FULL}")
        assert not [name for name in names(small) if "wandb" not in name and "/." in name]
        assert not list(small.rglob("DONE"))
    assert codes[:3] == [1, 1, 1]
    assert codes[-1] == 0
    check_same(small / "runs", done["leace"])


def test_rows_survive_a_start_without_room(call, few, done, small, monkeypatch):
    words = ["run", *few, SECTIONED, f"record.dir={small}/runs"]
    with monkeypatch.context() as patch:
        patch.setattr(Probes, "measure", interrupt)
        assert call(*words).code == 1
    [rows] = small.rglob("rows.jsonl")
    before = rows.read_bytes()
    assert b'"section"' in before
    leave(small, 0)
    check_line(call(*words), 1, f"small/runs.*: {FULL}")
    assert rows.read_bytes() == before
    (small / "filler").unlink()
    assert call(*words).code == 0
    check_same(small / "runs", done["leace"])


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_report_without_room_leaves_the_one_before(call, few, small):
    place = small / "runs"
    assert call("run", *few, "intervene=none", f"record.dir={place}").code == 0
    (place / "report.html").write_text("the one before")
    before = contents(place)
    leave(small, 0)
    check_line(call("report", place), 1, rf"report\.csv: {FULL}")
    assert contents(place) == before


# -- no room, wherever a file is written -----------------------------------------------------------


@contextmanager
def without_room(name: str, when: str) -> Iterator[None]:
    """Every write of a file of this name fails, before or after there is a temporary file."""
    make, move = files.temporary_beside, Path.replace

    def temporary(path: Path) -> Path:
        if when == "before" and re.fullmatch(name, path.name):
            raise OSError(errno.ENOSPC, FULL, str(path))
        return make(path)

    def replace(path: Path, target: Path) -> Path:
        if when == "after" and re.fullmatch(name, Path(target).name):
            raise OSError(errno.ENOSPC, FULL, str(path))
        return move(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "temporary_beside", temporary)
        patch.setattr(Path, "replace", replace)
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "name",
    [
        "run.json", "rows.jsonl", "facts.json", "rows.parquet", "DONE",
        "intervention.safetensors", "intervention.json", "[0-9a-f]{32}.safetensors",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("own_cache")
def test_each_file_without_room(call, few, done, tmp_path, name, when):
    words = ["run", *few, SECTIONED]
    with without_room(name, when):
        check_line(call(*words), 1, f".*/{name}: {FULL}")
    check_nothing_half_written(tmp_path)
    assert not list(tmp_path.rglob("DONE"))
    assert call(*words).code == 0
    check_same(tmp_path / "results/runs", done["leace"])


@pytest.mark.parametrize("name", ["report.html", "report.csv", "report.tex"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_each_file_of_a_report_without_room(call, few, name, when):
    assert call("run", *few, "intervene=none").code == 0
    place = Path("results/runs")
    assert call("report", place).code == 0
    before = contents(place)
    with without_room(name, when):
        check_line(call("report", place), 1, f".*{name}: {FULL}")
    assert contents(place).keys() == before.keys()
    assert contents(place)[name] == before[name]


def test_a_tracker_without_room(call, few, done, tmp_path, monkeypatch):
    def init(*_, **__):
        raise OSError(errno.ENOSPC, FULL)

    words = ["run", *few, SECTIONED, "record=wandb", "record.tracker.mode=offline"]
    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", init)
        check_line(call(*words), 1, f"/wandb: {FULL}")
    [run] = load_unfinished(Path("results/runs"))
    assert run["status"] == "failed"
    assert FULL in run["error"]
    assert call(*words).code == 0
    check_same(tmp_path / "results/runs", done["leace"])


def test_each_run_of_many_tells_that_there_is_no_room(call, few):
    with without_room("rows.parquet", "before"):
        outcome = call("run", "-m", *few, "intervene=none", "seed=0,1")
    assert outcome.code == 1
    line = rf"seed=[01]: error: cannot write \S*/rows\.parquet: {FULL}; .*record\.dir=\n"
    assert re.fullmatch(f"({line}){{2}}", outcome.err)


def test_output_that_cannot_be_written(few, call, tmp_path):
    assert call("run", *few, "intervene=none").code == 0
    with Path("/dev/full").open("w") as full:
        report = subprocess.run(
            [sys.executable, "-m", "palimpsest", "report", "results/runs"],
            stdout=full, stderr=subprocess.PIPE, text=True, env=environment(tmp_path),
        )  # fmt: skip
    assert report.returncode == 1
    assert report.stderr.startswith(f"error: cannot write what the command makes: {FULL}")


# -- places that cannot be written -----------------------------------------------------------------


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Nothing can be made or removed in a directory, by root neither."""
    root = os.geteuid() == 0
    command, locked, free = ("chattr", "+i", "-i") if root else ("chmod", "a-w", "u+w")
    if subprocess.run([command, locked, directory], capture_output=True, check=False).returncode:
        pytest.skip("a file system on which nothing keeps root from writing")
    try:
        yield
    finally:
        subprocess.run([command, free, directory], check=True)


DENIED = "(Permission denied|Operation not permitted)"


@pytest.mark.parametrize("place", ["results", "results/runs"])
def test_a_read_only_place_of_results(call, few, tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    before = names(tmp_path)
    with read_only(tmp_path / place):
        check_line(call("run", *few, SECTIONED), 2, f"results/runs.*: {DENIED}")
    assert names(tmp_path) == before


def test_a_finished_run_in_a_read_only_place_is_skipped_and_can_be_read(call, few, tmp_path):
    assert call("run", *few, "intervene=none").code == 0
    before = contents(tmp_path)
    [path] = (tmp_path / "results/runs").iterdir()
    with read_only(path), read_only(path.parent):
        again = call("run", *few, "intervene=none")
        report = call("report", "results/runs")
    assert (again.code, again.err[:17]) == (0, "none: done before")
    check_line(report, 2, rf"report\.csv: {DENIED}")
    assert contents(tmp_path) == before


def test_an_unfinished_run_in_a_read_only_place_keeps_its_rows(call, few, done, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Probes, "measure", interrupt)
        assert call("run", *few, SECTIONED).code == 1
    [path] = Path("results/runs").iterdir()
    before = contents(path)
    with read_only(path):
        check_line(call("run", *few, SECTIONED), 2, f"{path}.*: {DENIED}")
    assert contents(path) == before
    assert call("run", *few, SECTIONED).code == 0
    check_same(Path("results/runs"), done["leace"])


def test_a_read_only_cache_is_told_before_the_work(own_cache):
    def make():
        raise AssertionError("the work was begun")

    own_cache.mkdir()
    with read_only(own_cache), pytest.raises(RequestError, match=r"PALIMPSEST_CACHE=$"):
        cache.cached_tensors("values", {"a": 1}, make)


@pytest.mark.usefixtures("own_cache")
def test_a_read_only_cache_serves_what_it_has(call, few, done, own_cache, tmp_path):
    own_cache.mkdir()
    with read_only(own_cache):
        check_line(call("run", *few, SECTIONED), 2, f"cache/.*: {DENIED}")
    assert call("run", *few, SECTIONED, "record.dir=first").code == 0
    inner = [path for path in own_cache.rglob("*") if path.is_dir()]
    with ExitStack() as stack:
        for path in (*inner, own_cache):
            stack.enter_context(read_only(path))
        assert call("run", *few, SECTIONED, "record.dir=second").code == 0
    check_same(tmp_path / "second", done["leace"])


# -- how a write fails -----------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_told_and_gone(own_cache):
    tensors = {"a": torch.zeros(10_000)}
    with largest(PAGE), pytest.raises(WriteError, match="File too large; free the disk"):
        cache.cached_tensors("values", {"a": 1}, lambda: tensors)
    assert contents(own_cache) == {}
    assert torch.equal(cache.cached_tensors("values", {"a": 1}, lambda: tensors)["a"], tensors["a"])


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, WriteError), (errno.EDQUOT, WriteError), (errno.EFBIG, WriteError),
        (errno.EROFS, RequestError), (errno.EACCES, RequestError), (errno.ENOTDIR, RequestError),
        (errno.EISDIR, RequestError), (errno.EIO, OSError),
    ],
)  # fmt: skip
def test_no_room_is_failed_work_and_a_wrong_place_a_wrong_request(tmp_path, number, kind):
    (tmp_path / "file").write_text("before")

    def write():
        with files.atomic(tmp_path / "file") as path:
            path.write_text("after")
            raise OSError(number, os.strerror(number))

    with pytest.raises(kind, match=os.strerror(number)):
        write()
    assert contents(tmp_path) == {"file": b"before"}


def test_a_directory_in_a_file_s_place(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(RequestError, match=r"cannot write .*run\.json: Is a directory; "):
        files.write_text(tmp_path / "run.json", "")
    assert names(tmp_path) == {"run.json"}
