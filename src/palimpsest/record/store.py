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

from palimpsest.errors import RequestError, Stopped, WriteError
from palimpsest.files import atomic, fingerprint, parse_json, write_json, write_text, writing
from palimpsest.record.redact import one_line
from palimpsest.record.results import (
    COLUMNS,
    FIELDS,
    KEY,
    MEASURE,
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
from palimpsest.record.row import SCHEMA_VERSION, Row

_RUN, _ROWS = "run.json", "rows.jsonl"
_MADE_ANEW = ("rows.parquet", "facts.json", "intervention", "wandb", "DONE")
_SAME = ("run_id", "versions", "code", "device")
"""What an unfinished attempt must share with a new one for its rows to be kept."""

_CONTROL = ("section", "attempt")
"""Keys of the lines of rows.jsonl that are no rows."""

Key = tuple[str | int | None, ...]


def is_done(directory: Path) -> bool:
    """Whether `directory` holds a finished run."""
    return (directory / "DONE").is_file()


def check_earlier(directory: Path) -> None:
    """Refuse a run's directory whose earlier attempt, finished or not, is not to be judged.

    Of a finished one only what takes little time is looked at: that each file is there, whole, and
    of its kind, and that no two rows have one key.

    Raises:
        RequestError: its run.json cannot be read, or is of another schema; a finished one lacks a
            file, has one that cannot be read, or says that it is not finished.
    """
    _check_record(directory)
    if is_done(directory):
        run = read_run(directory)
        if run["status"] != "done":
            raise unreadable(directory / "run.json", f"status {run['status']!r} beside DONE")
        _check_parquet(directory / "rows.parquet")
        read_facts(directory)
        if run["method"] != "trace":
            _check_intervention(directory / "intervention")


def run_of(directory: Path) -> dict[str, Any] | None:
    """The run.json of a run of this schema; None where there is none, or another one."""
    try:
        run = read_run(directory)
    except RequestError:
        return None
    return run if run.get("schema") == SCHEMA_VERSION else None


Taken = set[tuple[str, str]]
"""Measures that were taken, each with its key."""


def finished_runs(directory: Path) -> dict[str, list[tuple[Path, Taken]]]:
    """By request, the finished runs in a directory that it came to, and their measures.

    Directories of anything else are passed over.
    """
    found: dict[str, list[tuple[Path, Taken]]] = {}
    for path in sorted(directory.glob("*/run.json")):
        run = run_of(path.parent)
        if run is not None and run["status"] == "done" and is_done(path.parent):
            for request in run.get("requests") or ():
                found.setdefault(str(request), []).append((path.parent, measured(run)))
    return found


def add_requests(directory: Path, requests: Iterable[str]) -> None:
    """Note in a finished run's run.json that these requests came to it too.

    Raises:
        RequestError: the directory cannot be written.
        WriteError: there is no room.
    """
    run = read_run(directory)
    found = dict.fromkeys((*(run.get("requests") or ()), *requests))
    write_json(directory / _RUN, run | {"requests": list(found)})


def measured(run: Mapping[str, Any]) -> set[tuple[str, str]]:
    """The measures, each with its key, that a run.json says were taken."""
    found = run.get("measures")
    measures = found if isinstance(found, Mapping) else {}
    return {(name, key) for name, keys in measures.items() for key in keys}


class RunStore:
    """Writes one run's directory. Make one with `RunStore.open` or `RunStore.further`.

    One process at a time: whoever makes one holds the directory's lock.

    Attributes:
        directory: the run's own.
        finished: the run was finished before, and is measured further.
    """

    def __init__(
        self,
        directory: Path,
        run: dict[str, Any],
        kept: Sequence[dict[str, Any]],
        finished: bool = False,
    ) -> None:
        """Take over a run's directory and the lines that its rows.jsonl holds already."""
        self.directory = directory
        self.finished = finished
        self._run = run
        self._keys = {_key(line) for line in kept if not any(c in line for c in _CONTROL)}
        self._sections = {line["section"] for line in kept if "section" in line}
        self._measured: dict[str, dict[str, Any]] = {}

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
            kept = _take_up(directory, run)
            _clear(directory)
        store = cls(directory, run, kept)
        store.update(status="running", error=None, started=_now())
        return store

    @classmethod
    def further(cls, directory: Path, attempt: Mapping[str, Any]) -> Self:
        """Open a finished run to measure it further; until that is whole it stays as it is.

        Of an interrupted earlier attempt to measure it further, by the same versions, complete
        sections are kept.

        Args:
            directory: the run's own directory.
            attempt: `versions`, `code` and `device` of what measures now.

        Raises:
            RequestError: the directory cannot be written, or holds no finished run.
            WriteError: there is no room.
        """
        check_earlier(directory)
        run = read_run(directory)
        with writing(directory):
            kept = _take_up(directory, {**attempt, "run_id": run["run_id"]})
        return cls(directory, run, kept, finished=True)

    @property
    def run(self) -> Mapping[str, Any]:
        """The contents of run.json as far as known."""
        return self._run

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

    def note(self, measure: str, measure_key: str, **how: Any) -> None:
        """Remember that a measure was taken, and how, for run.json; kept with `finish`."""
        self._measured.setdefault(measure, {})[measure_key] = how | {"measured": _now()}

    def write_facts(self, facts: list[dict[str, Any]]) -> None:
        """Write facts.json: what the model said for each target fact, with its top predictions."""
        write_json(self.directory / "facts.json", facts)

    def snapshot(self) -> Run:
        """The run as written so far, read back from disk."""
        return Run(dict(self._run), self.directory)

    def finish(self) -> None:
        """Turn rows.jsonl into rows.parquet, set the status to `done` and write DONE last.

        Of a run that is measured further, rows of a measure taken anew replace its old ones.

        Raises:
            ValueError: two rows have one key; nothing is written.
            WriteError: there is no room.
        """
        source = self._source()
        check_keys(source)
        with atomic(self.directory / "rows.parquet") as temporary, database() as connection:
            connection.execute(
                f"COPY (SELECT * FROM {source} ORDER BY {ORDER}) TO ? "
                "(FORMAT parquet, COMPRESSION zstd, USE_TMP_FILE false)",  # `temporary` is one
                [str(temporary)],
            )
        before = self._run.get("measures") or {}
        names = dict.fromkeys((*before, *self._measured))
        taken = {name: {**before.get(name, {}), **self._measured.get(name, {})} for name in names}
        when = {} if self.finished else {"finished": _now()}
        self.update(status="done", measures=taken, **when)
        write_text(self.directory / "DONE", "")
        (self.directory / _ROWS).unlink(missing_ok=True)

    def fail(self, error: BaseException | str) -> None:
        """Set the status to `failed` with a one-line error. A finished run stays as it is.

        Where that cannot be written either, run.json goes on to say `running`.
        """
        if not is_done(self.directory):
            with suppress(RequestError, WriteError):
                cause = str(error) if isinstance(error, Stopped) else error
                self.update(status="failed", error=one_line(cause))

    def _source(self) -> str:
        """The rows so far, as SQL."""
        new = relation(self.directory / _ROWS)
        if not self.finished:
            return new
        old, pair = relation(self.directory / "rows.parquet"), ", ".join(MEASURE)
        kept = f"SELECT * FROM {old} WHERE ({pair}) NOT IN (SELECT ({pair}) FROM {new})"
        return f"({kept} UNION ALL SELECT * FROM {new})"


def _check_record(directory: Path) -> None:
    """Refuse a run.json, where there is one or has to be, of another schema or not to be read."""
    if (directory / _RUN).exists() or is_done(directory):
        check_schema(read_run(directory), directory)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _take_up(directory: Path, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Begin rows.jsonl with what may be kept of an earlier attempt, and give these lines."""
    attempt = fingerprint({name: run.get(name) for name in _SAME})
    kept = [{"attempt": attempt}, *_complete_sections(directory / _ROWS, attempt)]
    write_text(directory / _ROWS, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def _complete_sections(path: Path, attempt: str) -> list[dict[str, Any]]:
    """The lines of rows.jsonl up to the last section's end, if they are of the same attempt.

    A line torn by a crash, and what follows the last section, are left out. If any other line is
    not what a run writes, the file is damaged and nothing of it is kept.
    """
    try:
        text = path.read_text(encoding="utf-8")
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        lines = [_parsed(line) for line in whole]
    except (OSError, ValueError):
        return []
    if not lines or lines.pop(0) != {"attempt": attempt}:
        return []
    ends = [place for place, line in enumerate(lines) if "section" in line]
    return lines[: ends[-1] + 1] if ends else []


def _parsed(line: str) -> dict[str, Any]:
    """One line of rows.jsonl: a row, the end of a section, or whose attempt it is.

    Raises:
        ValueError: it is neither.
    """
    found = parse_json(line)
    valid = (*({name} for name in _CONTROL), set(COLUMNS))
    if not isinstance(found, dict) or set(found) not in valid:
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


def check_keys(source: str) -> None:
    """Refuse rows of which two share a key.

    Args:
        source: of the rows, as SQL.

    Raises:
        ValueError: names one such key.
    """
    key = ", ".join(KEY)
    query = f"SELECT {key} FROM {source} GROUP BY {key} HAVING count(*) > 1 LIMIT 1"
    with database() as connection:
        found = connection.execute(query).fetchone()
    if found is not None:
        raise ValueError(f"two rows with the same key: {_describe(found)}")


def _check_parquet(path: Path) -> None:
    """Refuse what is no parquet file with the columns of rows, or has two rows of one key."""
    query = f"SELECT {', '.join(COLUMNS)} FROM {relation(path)} LIMIT 0"
    try:
        with database() as connection:
            connection.execute(query)
        check_keys(relation(path))
    except (duckdb.Error, ValueError) as error:
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
