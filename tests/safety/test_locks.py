"""Locks between real processes: by the kernel, and by files where the kernel has none."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import palimpsest
from palimpsest import locks
from palimpsest.errors import RequestError
from palimpsest.locks import Holder, held, holder

PROCESSES = 8

COMMON = """
import errno, fcntl, os, signal, sys, time
from pathlib import Path
from palimpsest import locks

def no_flock(*_):
    raise OSError(errno.ENOSYS, "no locks here")

kind, place = sys.argv[1], Path(sys.argv[2])
locks.WATCHED = 0.3
if kind == "soft":
    fcntl.flock = no_flock
path = place / ".lock"
"""

HOLD = """
with locks.held(path):
    print("held", flush=True)
    sys.stdin.read()
"""

COUNT = """
print("ready", flush=True)
sys.stdin.read()
for name in sys.argv[3:]:
    with locks.held(place / name / ".lock"):
        inside, count = place / name / "inside", place / name / "count"
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if somebody else is
        now = int(count.read_text())
        time.sleep(0.001)
        count.write_text(str(now + 1))
        os.unlink(inside)
"""

FORK = """
with locks.held(path):
    try:
        child = os.fork()
        if not child:
            raise KeyboardInterrupt
        os.waitpid(child, 0)
    except KeyboardInterrupt:
        pass
    print("held", flush=True)
    sys.stdin.read()
"""


def start(script: str, kind: str, place: Path, *names: str) -> subprocess.Popen[str]:
    source = str(Path(palimpsest.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", COMMON + script, kind, str(place), *names], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": source},
    )  # fmt: skip


@pytest.fixture(params=["kernel", "soft"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the file system offers, in this process too."""
    if request.param == "soft":
        monkeypatch.setattr(fcntl, "flock", no_flock)
    return request.param


@pytest.fixture
def soft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    monkeypatch.setattr(locks, "WATCHED", 0.1)


def no_flock(*_: int) -> None:
    raise OSError(errno.ENOSYS, "no locks here")


@pytest.fixture
def other(kind: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lock."""
    with start(HOLD, kind, tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def until(true: Callable[[], bool]) -> None:
    """Wait for what another thread or process does; a failure does not wait for ever."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def count(kind: str, place: Path, names: list[str]) -> dict[str, int]:
    """By lock, how often processes that all start at once were alone inside."""
    for name in names:
        (place / name / "count").write_text("0")
    processes = [start(COUNT, kind, place, *names) for _ in range(PROCESSES)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * PROCESSES
    for process in processes:
        process.stdin.close()
    codes = [process.wait() for process in processes]
    for process in processes:
        process.stdout.close()
    assert codes == [0] * PROCESSES
    return {name: int((place / name / "count").read_text()) for name in names}


# -- one at a time ---------------------------------------------------------------------------------


def test_processes_exclude_each_other(kind, tmp_path):
    assert count(kind, tmp_path, ["."] * 10) == {".": 10 * PROCESSES}


def test_threads_exclude_each_other(kind, tmp_path):
    inside = []

    def work(_):
        with held(tmp_path / ".lock"):
            inside.append(1)
            time.sleep(0.002)
            alone = len(inside) == 1
            inside.pop()
            return alone

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(24)))


def test_who_waits_is_told_once_and_goes_on_when_the_lock_is_free(kind, other, tmp_path):
    told = []

    def waiting(holder: Holder) -> None:
        told.append(holder)
        other.stdin.close()

    with held(tmp_path / ".lock", waiting):
        assert [(holder.pid, holder.host) for holder in told] == [(other.pid, socket.gethostname())]


def test_who_waits_too_long_is_told_who_works_there(kind, other, tmp_path):
    expected = rf"held by process {other.pid} on {socket.gethostname()}, since 20.*; wait"
    with pytest.raises(RequestError, match=expected), held(tmp_path / ".lock", timeout=0):
        pass


def test_a_free_lock_is_taken_without_a_word(kind, tmp_path):
    with held(tmp_path / ".lock", lambda _: pytest.fail("nobody is there"), timeout=0):
        pass


def test_an_error_inside_gives_the_lock_up(kind, tmp_path):
    with pytest.raises(KeyError), held(tmp_path / ".lock"):
        raise KeyError
    assert holder(tmp_path / ".lock") is None
    with held(tmp_path / ".lock", timeout=0):
        pass


def test_a_forked_child_does_not_give_the_lock_up(kind, tmp_path):
    with start(FORK, kind, tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        assert holder(tmp_path / ".lock").pid == process.pid
        process.stdin.close()


def test_who_waited_for_a_file_that_is_gone_asks_for_the_new_one(tmp_path, monkeypatch):
    """Opened, then removed by its holder; meanwhile somebody else holds a new file of that name."""
    path, asked = tmp_path / ".lock", []

    def late(file, kind):
        if not asked:
            path.unlink()
            asked.append(os.open(path, os.O_RDWR | os.O_CREAT))
            flock(asked[0], fcntl.LOCK_EX)
        return flock(file, kind)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(RequestError, match="an unnamed process"), held(path, timeout=0):
        pass
    os.close(asked[0])
    with held(path, timeout=0):
        pass


# -- who holds it ----------------------------------------------------------------------------------


def test_the_holder_is_named_while_there_is_one(kind, other, tmp_path):
    found = holder(tmp_path / ".lock")
    assert (found.pid, found.host) == (other.pid, socket.gethostname())
    other.stdin.close()
    other.wait()
    assert holder(tmp_path / ".lock") is None


@pytest.mark.parametrize("dead", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_frees_the_lock(kind, other, tmp_path, dead):
    other.send_signal(dead)
    other.wait()
    assert holder(tmp_path / ".lock") is None
    with held(tmp_path / ".lock", timeout=0):
        assert holder(tmp_path / ".lock").pid == os.getpid()


def test_a_directory_that_cannot_be_written_is_asked_all_the_same(
    kind, other, tmp_path, monkeypatch
):
    refuse_writing(monkeypatch)
    assert holder(tmp_path / ".lock").pid == other.pid
    other.kill()
    other.wait()
    assert holder(tmp_path / ".lock") is None


def test_nothing_is_written_by_asking(kind, other, tmp_path):
    before = {file.name: file.stat() for file in tmp_path.iterdir()}
    holder(tmp_path / ".lock")
    assert {file.name: file.stat() for file in tmp_path.iterdir()} == before


def test_a_lock_that_does_not_say_who_holds_it_is_held(tmp_path):
    with held(tmp_path / ".lock"):
        (tmp_path / ".lock").write_text("?")
        found = holder(tmp_path / ".lock")
    assert (found.host, found.pid, str(found)[:26]) == ("", 0, "an unnamed process, since ")


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path, monkeypatch):
    refuse_writing(monkeypatch)
    with pytest.raises(RequestError, match="cannot write"), held(tmp_path / ".lock"):
        pass


def refuse_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a read-only file system does, which holds for root too."""
    opened = os.open

    def refuse(path, flags, *rest, **named):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)


# -- what it leaves --------------------------------------------------------------------------------


def test_nothing_is_left(tmp_path):
    with held(tmp_path / "made" / "for it" / ".lock"):
        assert (tmp_path / "made" / "for it" / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_inside_stays(kind, tmp_path):
    with held(tmp_path / "made" / ".lock"):
        (tmp_path / "made" / "file").touch()
    assert (tmp_path / "made" / "file").exists()


def test_of_soft_locks_one_file_is_left(soft, tmp_path):
    for _ in range(3):
        with held(tmp_path / ".lock", timeout=0):
            pass
    assert [file.name for file in tmp_path.iterdir()] == [".lock.3"]
    assert holder(tmp_path / ".lock") is None


def test_a_link_in_the_locks_place_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RequestError, match="cannot write"), held(tmp_path / ".lock"):
        pass
    assert (tmp_path / "precious").read_text() == "text"


def test_a_full_disk_locks_without_a_name(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with held(tmp_path / ".lock"):
        assert holder(tmp_path / ".lock").pid == 0
    with held(tmp_path / ".lock", timeout=0):
        pass


# -- stale soft locks ------------------------------------------------------------------------------


def leave(place: Path, age: float, **changes: object) -> Path:
    """A soft lock of this process, changed, that was last renewed so many seconds ago."""
    signature = {
        "host": "node3", "pid": os.getpid(), "since": "2026-11-30T12:00:00+00:00",
        "machine": locks._machine(), "start": locks._began(os.getpid()),
    }  # fmt: skip
    place.mkdir(exist_ok=True)
    file = place / ".lock.1"
    file.write_text(json.dumps(signature | changes) + "\n")
    os.utime(file, (time.time() - age,) * 2)
    return file


def check_held(path: Path) -> None:
    assert holder(path) is not None
    with pytest.raises(RequestError, match="to be free within"), held(path, timeout=0.5):
        pass


def test_a_soft_lock_of_a_living_process_is_not_stale_however_old(soft, tmp_path):
    leave(tmp_path, age=1e6)
    check_held(tmp_path / ".lock")


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"start": "0"}], ids=["gone", "reused"])
def test_a_soft_lock_of_a_process_that_is_gone_is_taken_over_at_once(soft, tmp_path, changes):
    leave(tmp_path, age=0, **changes)
    assert holder(tmp_path / ".lock") is None
    with held(tmp_path / ".lock", timeout=0):
        assert holder(tmp_path / ".lock").host == socket.gethostname()


def test_a_soft_lock_of_another_machine_is_respected_while_it_is_renewed(soft, tmp_path):
    leave(tmp_path, age=0, machine="elsewhere")
    assert str(holder(tmp_path / ".lock")).startswith(f"process {os.getpid()} on node3, since 2026")
    check_held(tmp_path / ".lock")


def test_a_soft_lock_of_another_machine_that_was_not_renewed_is_taken_over(soft, tmp_path):
    leave(tmp_path, age=locks.OLD + 10, machine="elsewhere")
    assert holder(tmp_path / ".lock") is None
    with held(tmp_path / ".lock"):
        assert holder(tmp_path / ".lock").pid == os.getpid()


def test_a_machine_whose_clock_is_wrong_keeps_the_lock_that_it_renews(soft, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WATCHED", 10.0)
    file = leave(tmp_path, age=1e5, machine="elsewhere")
    over = threading.Event()

    def renew() -> None:
        while not over.wait(0.02):
            os.utime(file, (file.stat().st_mtime + 1,) * 2)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(RequestError), held(tmp_path / ".lock", timeout=0.5):
            pass
    finally:
        over.set()
        thread.join()


def test_a_stale_soft_lock_is_taken_over_by_one_of_several(tmp_path):
    names = [f"{number}" for number in range(10)]
    for name in names[:5]:
        leave(tmp_path / name, age=locks.OLD + 10, machine="elsewhere")
    for name in names[5:]:
        leave(tmp_path / name, age=0, start="0")
    assert count("soft", tmp_path, names) == dict.fromkeys(names, PROCESSES)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"pid": "7"}', "\x00"])
def test_a_soft_lock_without_a_name_is_held_until_it_is_old(soft, tmp_path, text):
    (tmp_path / ".lock.1").write_text(text)
    assert holder(tmp_path / ".lock").pid == 0
    os.utime(tmp_path / ".lock.1", (time.time() - locks.OLD - 10,) * 2)
    assert holder(tmp_path / ".lock") is None
    with held(tmp_path / ".lock"):
        pass


def test_a_soft_lock_is_renewed_while_it_is_held(soft, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    with held(tmp_path / ".lock"):
        file = tmp_path / ".lock.1"
        os.utime(file, (0, 0))
        until(lambda: file.stat().st_mtime > 0)


@pytest.mark.parametrize("number", [2, 3], ids=["at once", "and cleaned up"])
def test_who_comes_late_to_a_stale_lock_sees_that_others_went_on(
    soft, tmp_path, monkeypatch, number
):
    """Judged stale; before it is taken over, others do so. Of those after it one file is left."""
    leave(tmp_path, age=0, start="0")
    judged = locks._free

    def late(path, last, watch):
        free = judged(path, last, watch)
        leave(tmp_path, age=0).rename(tmp_path / f".lock.{number}")
        return free

    monkeypatch.setattr(locks, "_free", late)
    with pytest.raises(RequestError), held(tmp_path / ".lock", timeout=0):
        pass
    assert [file.name for file in tmp_path.iterdir() if file.stat().st_size] == [f".lock.{number}"]
