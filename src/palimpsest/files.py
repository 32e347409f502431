"""Files that are written whole or not at all."""

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from palimpsest.errors import RequestError, WriteError

DEEPEST = 100
"""Lists and mappings that may stand within each other in a file that is read."""

LARGEST = 100_000_000
"""Bytes that a text or JSON file may have that is read as a whole."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
_FOREIGN = re.compile(r'\(os error (\d+)\)|"errno":"(\d+)"')
"""How safetensors and DuckDB tell the number of an operating system's error."""


def cache_dir() -> Path:
    """The user's cache directory for Palimpsest; `PALIMPSEST_CACHE` overrides it."""
    override = os.environ.get("PALIMPSEST_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("palimpsest"))


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value in canonical form: sorted keys, no white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cannot_write(
    path: Path, error: Exception, option: str | None = None
) -> RequestError | WriteError | None:
    """What stands in the way of writing `path`, in one line; None if it is something else.

    Args:
        path: what was to be written.
        error: the operating system's, or that of a library which passes it on.
        option: what names another place; None for those of a run.

    Returns:
        a `WriteError` where there is no room, a `RequestError` where the place is wrong.
    """
    number = _number(error)
    if number not in _FULL + _UNWRITABLE:
        return None
    kind = WriteError if number in _FULL else RequestError
    if option is None:
        option = "PALIMPSEST_CACHE=" if path.is_relative_to(cache_dir()) else "record.dir="
    return kind(
        f"cannot write {path}: {os.strerror(number)}; free the disk, change its permissions or "
        f"choose another place with {option}"
    )


def _number(error: Exception) -> int:
    """The operating system's number of an error; 0 if it has none."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = _FOREIGN.search(str(error))
    return int(found[1] or found[2]) if found else 0


@contextmanager
def writing(path: Path, option: str | None = None) -> Iterator[None]:
    """Tell in one line why `path` cannot be written; what is told already passes as it is.

    Args:
        path: what is written inside.
        option: what names another place; None for those of a run.

    Raises:
        RequestError: the place is no directory, or not to be written.
        WriteError: there is no room.
    """
    try:
        yield
    except (RequestError, WriteError):
        raise
    except Exception as error:
        told = cannot_write(path, error, option)
        if told is None:
            raise
        raise told from error


def check_writable(directory: Path) -> None:
    """Refuse a directory, made or yet to be made, that nothing can be written to.

    Raises:
        RequestError: the place is no directory, or not to be written.
        WriteError: there is no room.
    """
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    with writing(directory), tempfile.TemporaryFile(dir=there):
        pass


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on error it vanishes.

    Raises:
        RequestError: the directory cannot be written.
        WriteError: there is no room.
    """
    with writing(path):
        temporary = temporary_beside(path)
        try:
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A new empty file beside `path`, in a directory that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    return Path(name)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; keys keep their order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, not JSON, larger than `LARGEST` bytes or deeper than
            `DEEPEST` levels; the message says which.
    """
    if path.exists() and not path.is_file():  # to read a pipe would not end
        raise ValueError("no file")
    with path.open("rb") as file:
        raw = file.read(LARGEST + 1)
    if len(raw) > LARGEST:
        raise ValueError(f"more than {LARGEST} bytes")
    return parse_json(raw.decode("utf-8"))


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or deeper than `DEEPEST` levels.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"more than {DEEPEST} levels of brackets") from error
    if _is_deep(value):
        raise ValueError(f"more than {DEEPEST} levels of brackets")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [each for each in level if isinstance(each, dict | list)]
        if not inner:
            return False
        level = [e for each in inner for e in (each.values() if isinstance(each, dict) else each)]
    return True


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: the file cannot be read.
        RequestError: it is not UTF-8, or larger than `LARGEST` bytes.
    """
    with reading(path), path.open("rb") as file:
        raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise RequestError(f"expected at most {LARGEST} bytes in {path}, found more; divide it")
        return raw.decode("utf-8")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a text's wrong encoding into a wrong request.

    Raises:
        RequestError: what is read inside is not UTF-8.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise RequestError(
            f"expected UTF-8 text in {path}, found {error.reason} at byte {error.start}; "
            "convert the file"
        ) from error
