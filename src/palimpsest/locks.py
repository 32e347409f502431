"""Locks between processes: one at a time works in a run's directory or computes a cache entry.

A lock is a file. Whoever holds it has a kernel lock (`flock`) on that file, and has written into
it who they are. The kernel drops the lock when its process ends, however it ends, so that such a
lock is never stale. The file is removed when the lock is given up; a killed process leaves it
behind, and the next holder takes it over.

Some file systems have no `flock`. There a *soft* lock stands in: a file `NAME.1` that is created
by one process alone (`O_EXCL`), and whose time of change is renewed while its holder lives. It is
stale if its process is gone (on the same machine), or if it was not renewed for minutes (on
another). Whoever takes over from `NAME.1` creates `NAME.2`, which again succeeds for one process
alone; numbers never go back, so that one file stays behind.

What holds on a cluster's shared file system:

- NFS (version 4, or 3 with its lock daemon) and Lustre mounted with `flock`: the kernel lock holds
  across hosts. The server frees it after the host of its holder is lost, often after a minute or
  two.
- NFS or Lustre without locks: the soft lock. Two hosts are never both let in as long as every
  holder renews its lock. A holder that stands still for more than five minutes (a suspended
  process or host) loses it without being told.
- Mounted with `localflock` (Lustre) or `local_lock` (NFS), or mounted with locks on one host and
  without on another: processes of one host exclude each other, hosts do not. No process can see
  that from within.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from palimpsest.errors import RequestError
from palimpsest.files import writing

BEAT = 20.0
"""Seconds between two renewals of a soft lock."""

OLD = 300.0
"""Seconds without a renewal after which another machine's soft lock counts as stale."""

WATCHED = 120.0
"""Seconds for which it is also watched, unchanged, before it is taken over: clocks may differ."""

_PAUSES = (0.01, 0.5)
"""Seconds between two attempts: at first, and at most."""

_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)
_TAKEN = (errno.EAGAIN, errno.EACCES)
_RELEASED = b"released\n"
_CREATED = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_LONGEST = 4096
_READINGS = 10

Release = Callable[[], None]


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: the name of their machine; empty if they left no name.
        pid: the number of their process there; 0 if they left none.
        since: when they took the lock: UTC, ISO 8601, to the second.
    """

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        """For a message: `process 17 on node3, since 2026-11-30T12:00:00+00:00`."""
        if not self.pid:
            return f"an unnamed process, since {self.since}"
        return f"process {self.pid} on {self.host}, since {self.since}"


@dataclass(frozen=True)
class _Signature(Holder):
    """What a holder writes into the file.

    Attributes:
        machine: what the process number counts in: the host, its boot, its table of processes.
        start: when the process began, by the kernel's count; None where it does not tell.
    """

    machine: str
    start: str | None

    @property
    def holder(self) -> Holder:
        """As much of it as is told."""
        return Holder(self.host, self.pid, self.since)


@contextmanager
def held(
    path: Path, waiting: Callable[[Holder], None] | None = None, timeout: float | None = None
) -> Iterator[None]:
    """Hold the exclusive lock `path`, among processes and threads alike.

    It waits while somebody else holds the lock. It is not re-entrant: a thread that asks again for
    what it holds waits for ever. Directories that are made for the lock are removed afterwards if
    they are empty. A forked child that leaves the block does not give the lock up.

    Args:
        path: the lock's own file, inside or beside what it guards.
        waiting: called once, with the holder, if the lock is not free.
        timeout: seconds to wait; None for ever.

    Raises:
        RequestError: the lock was not free in time, or its directory cannot be written.
        WriteError: there is no room.
    """
    made = [place for place in path.absolute().parents if not place.exists()]
    with writing(path):
        release = _waited(path, waiting, timeout)
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:
            release()
            _remove_empty(made)


def holder(path: Path) -> Holder | None:
    """Who holds the lock `path` now; None if nobody does.

    Nothing is written, and a holder notices nothing. Whether another machine's soft lock is still
    renewed is judged by this machine's clock.
    """
    return _kernel_holder(path) or _soft_holder(path)


def announced(work: str) -> Callable[[Holder], None]:
    """For `held`'s `waiting`: a warning of one line that names who is waited for.

    Args:
        work: what they do, e.g. `"computes moments"`.
    """
    return lambda other: logging.getLogger(__name__).warning("waiting for %s: it %s", other, work)


def _waited(path: Path, waiting: Callable[[Holder], None] | None, timeout: float | None) -> Release:
    """Take the lock, whenever it is free; what gives it up."""
    begun, (pause, longest), watch = time.monotonic(), _PAUSES, _Watch()
    while True:
        release = _taken(path, watch)
        if release is not None:
            return release
        other = holder(path) if waiting is not None else None
        if other is not None and waiting is not None:
            waiting(other)
            waiting = None
        if timeout is not None and time.monotonic() - begun >= timeout:
            raise _too_late(path, timeout)
        time.sleep(pause)
        pause = min(1.5 * pause, longest)


def _too_late(path: Path, timeout: float) -> RequestError:
    return RequestError(
        f"expected the lock {path} to be free within {timeout:g} s, found it held by "
        f"{holder(path) or 'others in turn'}; wait until they are done, or end them"
    )


def _taken(path: Path, watch: "_Watch") -> Release | None:
    """Take the lock if it is free now; what gives it up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _kernel(path)
    except FileNotFoundError:  # the directory was removed, empty, by the last holder
        return None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
    return _soft(path, watch)


def _remove_empty(directories: list[Path]) -> None:
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()


# --- the kernel's lock ----------------------------------------------------------------------------


def _kernel(path: Path) -> Release | None:
    """The kernel's lock on the file that has this name now, if it is free."""
    file = os.open(path, os.O_RDWR | _CREATED, 0o666)
    try:
        if not _flock(file, fcntl.LOCK_EX) or not _current(file, path):
            os.close(file)
            return None
        _sign(file)
    except BaseException:
        os.close(file)
        raise
    return lambda: _give_up(file, path)


def _flock(file: int, kind: int) -> bool:
    """Whether a lock of this kind was free, and is had now."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        return False
    return True


def _current(file: int, path: Path) -> bool:
    """Whether an open file still has its name; on NFS, a name may be remembered for too long."""
    if os.pread(file, len(_RELEASED), 0) == _RELEASED:
        return False
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _give_up(file: int, path: Path) -> None:
    """Remove the file, say so within it to whoever has it open, and let the lock go."""
    try:
        with suppress(OSError):
            if _current(file, path):
                path.unlink()
                os.pwrite(file, _RELEASED, 0)
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def _kernel_holder(path: Path) -> Holder | None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if _flock(file, fcntl.LOCK_SH) or not _current(file, path):
            return None
        return _told(file)
    except OSError:
        return None
    finally:
        os.close(file)


def _told(file: int) -> Holder:
    """Who signed an open lock, in a moment if it was just taken; else somebody without a name."""
    for _ in range(_READINGS):
        signature = _signature(os.pread(file, _LONGEST, 0))
        if signature is not None:
            return signature.holder
        time.sleep(_PAUSES[0])
    return Holder("", 0, _time(os.fstat(file).st_mtime))


# --- the soft lock --------------------------------------------------------------------------------


@dataclass
class _Watch:
    """What a waiting process has seen of a soft lock.

    Attributes:
        sight: the lock's number and time of change, as last seen.
        since: since when it has been so, on this process's own clock.
    """

    sight: tuple[int, int] = (0, 0)
    since: float = field(default_factory=time.monotonic)

    def unchanged(self, sight: tuple[int, int]) -> float:
        """Seconds for which this has been the sight."""
        if sight != self.sight:
            self.sight, self.since = sight, time.monotonic()
        return time.monotonic() - self.since


def _soft(path: Path, watch: _Watch) -> Release | None:
    """A soft lock with the next number, if the last one is free and nobody else is quicker."""
    last = _last(path)
    if last and not _free(path, last, watch):
        return None
    mine = _numbered(path, last + 1)
    try:
        file = os.open(mine, os.O_RDWR | os.O_EXCL | _CREATED, 0o666)
    except FileExistsError:
        return None
    try:
        if _last(path) == last + 1:  # else others went on from a number that was taken meanwhile
            _sign(file)
            _remove_until(path, last)
            return _beating(file, path, mine)
    except BaseException:
        _leave(file, mine)
        raise
    _leave(file, mine)
    return None


def _remove_until(path: Path, last: int) -> None:
    for number in _numbers(path):
        if number <= last:
            _numbered(path, number).unlink(missing_ok=True)


def _leave(file: int, mine: Path) -> None:
    os.close(file)
    mine.unlink(missing_ok=True)


def _beating(file: int, path: Path, mine: Path) -> Release:
    """Renew a soft lock from now on; what ends that and marks the lock as given up."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            with suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=beat, name=f"lock {path}", daemon=True)
    thread.start()

    def release() -> None:
        over.set()
        thread.join()
        _mark_released(file, mine)
        with suppress(OSError):
            if not path.stat().st_size:  # left by the attempt at a kernel lock
                path.unlink()

    return release


def _mark_released(file: int, mine: Path) -> None:
    """Say within a soft lock that it was given up; where there is no room, remove it."""
    try:
        os.pwrite(file, _RELEASED, 0)
    except OSError:
        mine.unlink(missing_ok=True)
    finally:
        os.close(file)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _numbers(path: Path) -> list[int]:
    """Of every soft lock beside `path`."""
    ends = (name.removeprefix(f"{path.name}.") for name in os.listdir(path.parent))
    return [int(end) for end in ends if end.isascii() and end.isdigit()]


def _last(path: Path) -> int:
    return max(_numbers(path), default=0)


def _free(path: Path, number: int, watch: _Watch) -> bool:
    """Whether a soft lock was given up, or is stale beyond doubt."""
    try:
        text, changed = _seen(_numbered(path, number))
    except FileNotFoundError:  # a later one has replaced it
        return False
    unchanged = watch.unchanged((number, changed))
    gone = _gone(text)
    return (_is_old(changed) and unchanged >= WATCHED) if gone is None else gone


def _soft_holder(path: Path) -> Holder | None:
    try:
        number = _last(path)
        text, changed = _seen(_numbered(path, number))
    except OSError:
        return None
    gone = _gone(text)
    if gone or (gone is None and _is_old(changed)):
        return None
    signature = _signature(text)
    return Holder("", 0, _time(changed / 1e9)) if signature is None else signature.holder


def _seen(file: Path) -> tuple[bytes, int]:
    """The text of a soft lock, and its time of change in nanoseconds."""
    with file.open("rb") as opened:
        return opened.read(_LONGEST), os.fstat(opened.fileno()).st_mtime_ns


def _is_old(changed: int) -> bool:
    return time.time() - changed / 1e9 > OLD


def _gone(text: bytes) -> bool | None:
    """Whether the holder of a soft lock is gone; None if that cannot be told from here."""
    if text.startswith(_RELEASED):
        return True
    signature = _signature(text)
    if signature is None or signature.machine != _machine():
        return None
    return not _lives(signature)


# --- who holds it ---------------------------------------------------------------------------------


def _sign(file: int) -> None:
    """Write who holds the lock; where there is no room the lock holds all the same."""
    pid, now = os.getpid(), _time(time.time())
    signature = _Signature(socket.gethostname(), pid, now, _machine(), _began(pid))
    line = json.dumps(asdict(signature)).encode() + b"\n"
    with suppress(OSError):
        os.pwrite(file, line, 0)
        os.ftruncate(file, len(line))


def _signature(text: bytes) -> _Signature | None:
    """What a holder wrote, read back; None if it is anything else."""
    try:
        found: Any = json.loads(text.partition(b"\n")[0])
        return _Signature(**found) if isinstance(found["pid"], int) else None
    except (ValueError, TypeError, KeyError):
        return None


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _machine() -> str:
    """Two processes for which this is equal see each other under their numbers."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _lives(signature: _Signature) -> bool:
    """Whether a process of this machine is still the one that signed."""
    try:
        os.kill(signature.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    began = _began(signature.pid)
    return began is None or signature.start is None or began == signature.start


def _began(pid: int) -> str | None:
    """When a process of this machine began, by the kernel's count; None if it cannot be told.

    A process that has ended, and whose parent has not asked for its exit code, is `ended`.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return "ended" if fields[0] in "ZX" else fields[19]
