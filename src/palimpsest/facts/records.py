"""Records of published data sets: from JSON, JSON Lines or parquet."""

import json
from collections.abc import Iterator
from pathlib import Path

from palimpsest.errors import RequestError
from palimpsest.files import sha256_file

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


def _json(path: Path) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return [(f"record {i}", record) for i, record in enumerate(json.loads(text))]
        lines = enumerate(text.split("\n"), start=1)
        return [(f"line {i}", _line(line, i)) for i, line in lines if line.strip()]
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"expected JSON, a list of records or one record per line, in {path}, found text that "
            f"is neither ({error}); give the original file"
        ) from error


def _line(line: str, number: int) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {str(error).partition(': line')[0]}") from error
