"""The directory of one run: rows are appended while it works and become parquet when it is done."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import duckdb
import safetensors

from palimpsest.errors import RequestError, WriteError
from palimpsest.files import atomic, write_json, write_text, writing
from palimpsest.record.redact import one_line
from palimpsest.record.results import (
    COLUMNS,
    FIELDS,
    KEY,
    ORDER,
    Run,
    check_schema,
    database,
    read_facts,
    read_json,
    read_run,
    relation,
    unreadable,
)
from palimpsest.record.results import load_runs as load_runs
from palimpsest.record.results import load_unfinished as load_unfinished
from palimpsest.record.row import SCHEMA_VERSION, Row

_RUN, _ROWS = "run.json", "rows.jsonl"
_MADE_ANEW = ("rows.parquet", "facts.json", "intervention", "wandb", "DONE")
_SAME = ("run_id", "versions", "code", "device")
"""What an unfinished attempt must share with a new one for its rows to be kept."""

Key = tuple[str | int | None, ...]


def is_done(directory: Path) -> bool:
    """Whether `directory` holds a finished run."""
    return (directory / "DONE").is_file()


def check_earlier(directory: Path) -> None:
    """Refuse a run's directory whose earlier attempt, finished or not, is not to be judged.

    Of a finished one only what takes no time is looked at: that each file is there, whole, and of
    its kind.

    Raises:
        RequestError: its run.json cannot be read, or is of another schema; a finished one lacks a
            file, or has one that cannot be read.
    """
    _check_record(directory)
    if is_done(directory):
        _check_parquet(directory / "rows.parquet")
        read_facts(directory)
        if read_run(directory)["method"] != "trace":
            _check_intervention(directory / "intervention")


class RunStore:
    """Writes one run's directory. Make one with `RunStore.open`."""

    def __init__(
        self, directory: Path, run: dict[str, Any], kept: Sequence[dict[str, Any]]
    ) -> None:
        """Take over a run's directory and the lines that its rows.jsonl holds already."""
        self.directory = directory
        self._run = run
        self._keys = {_key(line) for line in kept if "section" not in line}
        self._sections = {line["section"] for line in kept if "section" in line}

    @classmethod
    def open(cls, directory: Path, run: Mapping[str, Any]) -> Self:
        """Create `directory` and its run.json with status `running`.

        Of an unfinished earlier attempt at the same run, by the same versions, the rows of complete
        sections are kept, unless a line of its rows.jsonl cannot be read; all else that it left is
        removed, and other files stay. Open the store before the tracker, whose `wandb/` lives in
        the same directory.

        Args:
            directory: the run's own directory, `results/<sweep>/<run_id>`.
            run: the contents of run.json as far as known; at least `run_id` and `method`.

        Raises:
            RequestError: the directory cannot be written, or holds a finished run, one of another
                schema, or one whose run.json cannot be read.
            WriteError: there is no room; what an earlier attempt left stays.
        """
        _check_record(directory)
        if is_done(directory):
            raise RequestError(
                f"expected a new or unfinished run in {directory}, found a finished one; "
                "delete the directory to run it again"
            )
        run = {**run, "schema": SCHEMA_VERSION}
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            kept = _complete_sections(directory, run)
            write_text(directory / _ROWS, "".join(json.dumps(line) + "\n" for line in kept))
            _clear(directory)
        store = cls(directory, run, kept)
        store.update(status="running", error=None, started=_now())
        return store

    def has(self, section: str) -> bool:
        """Whether a section's rows are all there, from this attempt or an earlier one."""
        return section in self._sections

    def append(
        self,
        rows: Iterable[Row],
        section: str | None = None,
        measure: str = "fit",
        measure_key: str = "",
    ) -> None:
        """Add rows to the file on disk, all or none.

        A value that is NaN or infinite is kept as a missing one, with the cause in its note.

        Args:
            rows: any number.
            section: a name for them, if they are whole without any others: a later attempt at an
                interrupted run then keeps them.
            measure: the name of the measure that made them.
            measure_key: the hash of its configuration; empty for what is no measure of the ruler.

        Raises:
            ValueError: a row's key was already written; the message names the key.
            WriteError: there is no room.
        """
        made = {"measure": measure, "measure_key": measure_key}
        records = [made | _record(_finite(row)) for row in rows]
        fresh: set[Key] = set()
        for record in records:
            key = _key(record)
            if key in self._keys or key in fresh:
                raise ValueError(f"two rows with the same key: {_describe(key)}")
            fresh.add(key)
        lines = records + ([{"section": section}] if section else [])
        _extend(self.directory / _ROWS, "".join(json.dumps(line) + "\n" for line in lines))
        self._keys |= fresh
        self._sections |= {section} if section else set()

    def update(self, **fields: Any) -> None:
        """Set fields of run.json, which is replaced as a whole."""
        self._run |= fields
        write_json(self.directory / _RUN, self._run)

    def write_facts(self, facts: list[dict[str, Any]]) -> None:
        """Write facts.json: what the model said for each target fact, with its top predictions."""
        write_json(self.directory / "facts.json", facts)

    def snapshot(self) -> Run:
        """The run as written so far, read back from disk."""
        return Run(dict(self._run), self.directory)

    def finish(self) -> None:
        """Turn rows.jsonl into rows.parquet, set the status to `done` and write DONE last."""
        source = self._source()
        with atomic(self.directory / "rows.parquet") as temporary, database() as connection:
            connection.execute(
                f"COPY (SELECT * FROM {source} ORDER BY {ORDER}) TO ? "
                "(FORMAT parquet, COMPRESSION zstd, USE_TMP_FILE false)",  # `temporary` is one
                [str(temporary)],
            )
        (self.directory / _ROWS).unlink(missing_ok=True)
        self.update(status="done", finished=_now())
        write_text(self.directory / "DONE", "")

    def fail(self, error: BaseException | str) -> None:
        """Set the status to `failed` with a one-line error. A finished run stays as it is.

        Where that cannot be written either, run.json goes on to say `running`.
        """
        if not is_done(self.directory):
            with suppress(RequestError, WriteError):
                self.update(status="failed", error=one_line(error))

    def _source(self) -> str:
        return relation(self.directory / _ROWS)


def _check_record(directory: Path) -> None:
    """Refuse a run.json, where there is one or has to be, of another schema or not to be read."""
    if (directory / _RUN).exists() or is_done(directory):
        check_schema(read_run(directory), directory)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _complete_sections(directory: Path, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of rows.jsonl up to the last section's end, if they are of the same run.

    A line torn by a crash, and what follows the last section, are left out. If any other line is
    not what a run writes, the file is damaged and nothing of it is kept.
    """
    try:
        before = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        text = (directory / "rows.jsonl").read_text(encoding="utf-8")
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        lines = [_parsed(line) for line in whole]
    except (OSError, ValueError):
        return []
    if any(before.get(name) != run.get(name) for name in _SAME):
        return []
    ends = [place for place, line in enumerate(lines) if "section" in line]
    return lines[: ends[-1] + 1] if ends else []


def _parsed(line: str) -> dict[str, Any]:
    """One line of rows.jsonl: a row, or the end of a section.

    Raises:
        ValueError: it is neither.
    """
    found = json.loads(line)
    if not isinstance(found, dict) or set(found) not in ({"section"}, set(COLUMNS)):
        raise ValueError("neither a row nor the end of a section")
    if any(isinstance(value, list | dict) for value in found.values()):
        raise ValueError("a column that holds more than one value")
    return found


def _clear(directory: Path) -> None:
    """Remove what is made anew of all that an earlier attempt left, and what is half written."""
    names = (_RUN, _ROWS, *_MADE_ANEW)
    torn = [path for name in names for path in directory.glob(f".{name}.????????")]
    for path in [*map(directory.joinpath, _MADE_ANEW), *torn]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _extend(path: Path, text: str) -> None:
    """Add text to the end of a file: where there is no room for all of it, none."""
    before = path.stat().st_size
    with writing(path):
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            os.truncate(path, before)
            raise


def _finite(row: Row) -> Row:
    if row.value is None or math.isfinite(row.value):
        return row
    cause = f"value was {float(row.value)}"
    note = f"{row.note}; {cause}" if row.note else cause
    return dataclasses.replace(row, value=None, note=note)


def _key(record: Mapping[str, Any]) -> Key:
    return tuple(record[name] for name in KEY)


def _describe(key: Key) -> str:
    return ", ".join(f"{n}={v!r}" for n, v in zip(KEY, key, strict=True) if v is not None)


def _record(row: Row) -> dict[str, Any]:
    record = {name: getattr(row, name) for name in FIELDS}
    return record | {"value": None if row.value is None else float(row.value)}


def _check_parquet(path: Path) -> None:
    """Refuse what is no parquet file with the columns of rows, by its last bytes alone."""
    query = f"SELECT {', '.join(COLUMNS)} FROM {relation(path)} LIMIT 0"
    try:
        with database() as connection:
            connection.execute(query)
    except duckdb.Error as error:
        raise unreadable(path, error) from error


def _check_intervention(directory: Path) -> None:
    """Refuse tensors that are not there, or not as many bytes as their header says."""
    if not isinstance(read_json(directory / "intervention.json"), dict):
        raise unreadable(directory / "intervention.json", "expected an object")
    file = directory / "intervention.safetensors"
    try:
        with safetensors.safe_open(file, framework="pt"):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        raise unreadable(file, error) from error
