"""JSON Lines read strictly: every complaint knows its line."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from palimpsest.errors import RequestError

LONGEST = 1_000_000
"""Bytes that a line may have."""

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """What is wrong on one line of a file.

    Attributes:
        line: counted from 1.
        text: what was expected, what was found, what to do.
    """

    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


def read(path: Path) -> Iterator[tuple[int, Any | Problem]]:
    """Every line that is not blank: its number from 1, and its JSON value or what is wrong with it.

    Raises:
        RequestError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise RequestError(f"expected a JSONL file at {path}, found none; correct the path")
    try:
        with path.open("rb") as file:
            yield from _values(file)
    except OSError as error:
        raise RequestError(
            f"cannot read {path}: {error.strerror or error}; correct the path or its permissions"
        ) from error


def _values(file: BinaryIO) -> Iterator[tuple[int, Any | Problem]]:
    for number in count(1):
        raw = file.readline(LONGEST + 1)
        if not raw:
            return
        if number == 1 and raw.startswith(BOM):
            text = "expected plain UTF-8, found a byte order mark before the text; save without it"
            yield number, Problem(number, text)
            raw = raw.removeprefix(BOM)
        if len(raw) > LONGEST and not raw.endswith(b"\n"):
            _skip(file)
            yield number, Problem(number, f"expected at most {LONGEST} bytes, found more; split it")
        elif raw.strip():
            yield number, _value(number, raw)


def _skip(file: BinaryIO) -> None:
    """Go to the end of the line."""
    while (rest := file.readline(LONGEST)) and not rest.endswith(b"\n"):
        pass


def _value(number: int, raw: bytes) -> Any | Problem:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at place {error.start + 1}"
        return Problem(number, f"expected UTF-8, found {found}; save the file as UTF-8")
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        found = f"{error.msg} at column {error.colno}"
    except RecursionError:
        found = "brackets nested too deeply"
    except ValueError as error:
        found = str(error)
    return Problem(number, f"expected one JSON value on the line, found {found}; correct the line")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not JSON")


def _no_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:60]!r} twice in one object")
        found[key] = value
    return found


DECODER = json.JSONDecoder(parse_constant=_no_number, object_pairs_hook=_no_repeats)
"""Takes JSON and nothing more: no NaN, no infinities, no key twice in one object."""
