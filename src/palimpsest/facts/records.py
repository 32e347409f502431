"""Records of published data sets: from JSON, JSON Lines or parquet."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from palimpsest.errors import RequestError
from palimpsest.facts import lines
from palimpsest.facts.checks import show
from palimpsest.facts.lines import DECODER, LONGEST, Problem
from palimpsest.files import sha256_file

_NO_BLANK = re.compile(r"[^ \t\r\n]")
_LONG = f"a record of more than {LONGEST} characters"

Record = tuple[str, object]
"""A record's place in words, for error messages, and what stands there."""


def read(path: Path) -> list[Record]:
    """All records of a file, or of all parquet files in a directory.

    Raises:
        RequestError: nothing there, not readable, or not in one of the three formats.
    """
    try:
        return [record for file in _files(path) for record in _records(file)]
    except OSError as error:
        raise RequestError(
            f"cannot read {path}: {error.strerror or error}; correct facts.path or its permissions"
        ) from error


def digest(path: Path) -> str | list[str]:
    """SHA-256 of the file, or of each parquet file in the directory."""
    files = _files(path)
    return sha256_file(path) if files == [path] else [sha256_file(file) for file in files]


def _files(path: Path) -> list[Path]:
    """The file itself, or a directory's parquet files, those of its subdirectories too."""
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise RequestError(f"expected a CounterFact file at {path}, found none; correct facts.path")
    return files


def _records(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        binary = file.read(4) == b"PAR1"
    values = _parquet(path) if binary else _json(path)
    return ((f"{place} of {path}", value) for place, value in values)


def _parquet(path: Path) -> list[Record]:
    import duckdb

    try:
        relation = duckdb.read_parquet(str(path))
        rows = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    except duckdb.Error as error:
        raise RequestError(
            f"expected a parquet file at {path}, found one that cannot be read "
            f"({' '.join(str(error).split())[:120]}); fetch it again"
        ) from error
    return [(f"record {i}", row) for i, row in enumerate(rows)]


def _json(path: Path) -> Iterator[tuple[str, object]]:
    try:
        with path.open(encoding="utf-8") as file:
            text = _Text(file)
            if text.blank() == "[":
                yield from ((f"record {i}", value) for i, value in enumerate(text.elements()))
                return
        for number, value in lines.read(path):
            if isinstance(value, Problem):
                raise ValueError(f"{value}")
            yield f"line {number}", value
    except ValueError as error:
        raise RequestError(
            f"expected JSON, a list of records or one record per line, in {path}, found text that "
            f"is neither ({error}); give the original file"
        ) from error


@dataclass
class _Text:
    """A JSON list read piece by piece: memory holds few of its elements at a time.

    Attributes:
        file: where it stands.
        rest: what was read last.
        at: what comes before this place in `rest` is done with.
        line: the number of the line in which this place is.
        ended: there is nothing more to read.
    """

    file: TextIO
    rest: str = ""
    at: int = 0
    line: int = 1
    ended: bool = False

    def elements(self) -> Iterator[object]:
        """The elements of the list that begins here; nothing may follow it.

        Raises:
            ValueError: it is none, or one of its elements is too long.
        """
        end = self._sign("[")
        if self.blank() == "]":
            end = self._sign("]")
        while end != "]":
            yield self._value()
            self.blank()
            end = self._sign(",]")
        if self.blank():
            raise self._wrong("more after the list")

    def blank(self) -> str:
        """Go past white space; the character that follows, empty at the end."""
        while True:
            found = _NO_BLANK.search(self.rest, self.at)
            self._go(found.start() if found else len(self.rest))
            if found or not self._read():
                return self.rest[self.at : self.at + 1]

    def _sign(self, wanted: str) -> str:
        """Go past one of the characters `wanted`."""
        found = self.rest[self.at : self.at + 1]
        if not found or found not in wanted:
            raise self._wrong(f"{show(found)} for one of {show(wanted)}")
        self._go(self.at + 1)
        return found

    def _value(self) -> object:
        """Go past a value."""
        self.blank()
        if len(self.rest) - self.at <= LONGEST:
            self._read()
        whole = len(self.rest) - self.at <= LONGEST
        try:
            value, end = DECODER.raw_decode(self.rest, self.at)
        except json.JSONDecodeError as error:
            cut = "Unterminated" in error.msg or error.pos > len(self.rest) - len("-Infinity")
            raise self._wrong(error.msg if whole or not cut else _LONG) from error
        except RecursionError as error:
            raise self._wrong("brackets nested too deeply") from error
        except ValueError as error:
            raise self._wrong(f"{error}") from error
        if end - self.at > LONGEST:
            raise self._wrong(_LONG)
        self._go(end)
        return value

    def _go(self, to: int) -> None:
        self.line += self.rest.count("\n", self.at, to)
        self.at = to

    def _read(self) -> bool:
        """Read on, by more than the longest element; whether there was anything."""
        piece = "" if self.ended else self.file.read(4 * LONGEST)
        self.ended = not piece
        if piece:
            self.rest, self.at = self.rest[self.at :] + piece, 0
        return not self.ended

    def _wrong(self, found: str) -> ValueError:
        return ValueError(f"line {self.line}: {found}")
