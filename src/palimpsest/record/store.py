"""The directory of one run: rows are appended while it works and become parquet when it is done."""

import dataclasses
import glob
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import duckdb
import safetensors

from palimpsest.errors import RequestError, Stopped, WriteError
from palimpsest.files import (
    atomic,
    fingerprint,
    parse_json,
    read_json,
    write_json,
    write_text,
    writing,
)
from palimpsest.record.redact import one_line
from palimpsest.record.row import SCHEMA_VERSION, Row

COLUMNS = {
    "measure": "VARCHAR",
    "measure_key": "VARCHAR",
    "fact_id": "VARCHAR",
    "relation": "VARCHAR",
    "split": "VARCHAR",
    "scope": "VARCHAR",
    "axis": "VARCHAR",
    "metric": "VARCHAR",
    "protocol": "VARCHAR",
    "prompt_id": "VARCHAR",
    "layer": "INTEGER",
    "position": "VARCHAR",
    "step": "INTEGER",
    "budget": "INTEGER",
    "value": "DOUBLE",
    "n": "BIGINT",
    "note": "VARCHAR",
}
"""The columns of rows.parquet in order, with their SQL types."""

MEASURE = ("measure", "measure_key")
"""The columns that say by which measure a row was made, and how that was configured."""

FIELDS = tuple(name for name in COLUMNS if name not in MEASURE)
"""The columns that are fields of a Row."""

KEY = tuple(name for name in COLUMNS if name not in ("value", "n", "note"))
"""The columns that together name a row: no two rows of a run share them."""

_ORDER = ", ".join(
    f"{name} NULLS FIRST"
    for name in sorted(KEY, key=lambda name: name not in ("axis", "metric", "protocol"))
)
_RUN, _ROWS = "run.json", "rows.jsonl"
_MADE_ANEW = ("rows.parquet", "facts.json", "intervention", "wandb", "DONE")
_SAME = ("run_id", "versions", "code", "device")
"""What an unfinished attempt must share with a new one for its rows to be kept."""

_CONTROL = ("section", "attempt")
"""Keys of the lines of rows.jsonl that are no rows."""

Key = tuple[str | int | None, ...]


@dataclass(frozen=True)
class Run:
    """What one run left behind.

    Attributes:
        run: the contents of run.json.
        rows: every measured value, in the parquet's order.
        facts: what the model said for each target fact (facts.json); empty when not recorded.
        path: the run's directory.
    """

    run: dict[str, Any]
    rows: list[Row] = field(repr=False)
    facts: list[dict[str, Any]] = field(repr=False)
    path: Path

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.run["method"])

    @property
    def run_id(self) -> str:
        """The run's identity: a hash of its scientific configuration."""
        return str(self.run["run_id"])

    @cached_property
    def _index(self) -> dict[tuple[str, str], list[Row]]:
        index: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            index.setdefault((row.metric, row.protocol), []).append(row)
        return index

    def select(self, metric: str, protocol: str, **equal: str | int | None) -> list[Row]:
        """The rows of one metric and protocol whose named columns equal the given values."""
        rows = self._index.get((metric, protocol), [])
        return [row for row in rows if all(getattr(row, k) == v for k, v in equal.items())]


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
        run = _run_json(directory)
        if run["status"] != "done":
            raise _unreadable(directory / "run.json", f"status {run['status']!r} beside DONE")
        _check_parquet(directory / "rows.parquet")
        _facts(directory)
        if run["method"] != "trace":
            _check_intervention(directory / "intervention")


def read_run(directory: Path) -> dict[str, Any] | None:
    """The run.json of a run of this schema; None where there is none, or another one."""
    try:
        run = _run_json(directory)
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
        run = read_run(path.parent)
        if run is not None and is_done(path.parent):
            for request in run.get("requests") or ():
                found.setdefault(str(request), []).append((path.parent, measured(run)))
    return found


def add_requests(directory: Path, requests: Iterable[str]) -> None:
    """Note in a finished run's run.json that these requests came to it too.

    Raises:
        RequestError: the directory cannot be written.
        WriteError: there is no room.
    """
    run = _run_json(directory)
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
        run = _run_json(directory)
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
        rows = _read_rows(self._source())
        return Run(dict(self._run), rows, _facts(self.directory), self.directory)

    def finish(self) -> None:
        """Turn rows.jsonl into rows.parquet, set the status to `done` and write DONE last.

        Of a run that is measured further, rows of a measure taken anew replace its old ones.

        Raises:
            ValueError: two rows have one key; nothing is written.
            WriteError: there is no room.
        """
        source = self._source()
        check_keys(source)
        with atomic(self.directory / "rows.parquet") as temporary, _database() as database:
            database.execute(
                f"COPY (SELECT * FROM {source} ORDER BY {_ORDER}) TO ? "
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
        new = _jsonl(self.directory / _ROWS)
        if not self.finished:
            return new
        old, pair = _parquet(self.directory / "rows.parquet"), ", ".join(MEASURE)
        kept = f"SELECT * FROM {old} WHERE ({pair}) NOT IN (SELECT ({pair}) FROM {new})"
        return f"({kept} UNION ALL SELECT * FROM {new})"


def load_runs(directory: Path) -> list[Run]:
    """The finished runs in a sweep's directory, or the one in a run's own, ordered by run id.

    Raises:
        RequestError: no such directory, no finished run in it, a file that cannot be read, or
            results of another schema.
    """
    found = [path for path in _run_directories(directory) if is_done(path)]
    if not found:
        states = [f"{run['run_id']} {run['status']}" for run in load_unfinished(directory)]
        raise RequestError(
            f"expected finished runs (with a file DONE) in {directory}, found "
            f"{', '.join(states) or 'none'}; run `palimpsest run record.dir={directory}` first"
        )
    return [_load(path) for path in found]


def load_unfinished(directory: Path) -> list[dict[str, Any]]:
    """The run.json of every run in `directory` that failed or has not finished.

    Raises:
        RequestError: no such directory, or a run.json that cannot be read.
    """
    paths = [path for path in _run_directories(directory) if not is_done(path)]
    return [_run_json(path) for path in paths]


def _check_record(directory: Path) -> None:
    """Refuse a run.json, where there is one or has to be, of another schema or not to be read."""
    if (directory / _RUN).exists() or is_done(directory):
        _check_schema(_run_json(directory), directory)


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


def _database() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"threads": 1})


def _sql_text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def check_keys(source: str) -> None:
    """Refuse rows of which two share a key.

    Args:
        source: of the rows, as SQL.

    Raises:
        ValueError: names one such key.
    """
    key = ", ".join(KEY)
    query = f"SELECT {key} FROM {source} GROUP BY {key} HAVING count(*) > 1 LIMIT 1"
    with _database() as database:
        found = database.execute(query).fetchone()
    if found is not None:
        raise ValueError(f"two rows with the same key: {_describe(found)}")


def _jsonl(path: Path) -> str:
    columns = ", ".join(f"{name}: '{kind}'" for name, kind in COLUMNS.items())
    name = _sql_text(glob.escape(str(path)))
    file = f"read_json({name}, format='newline_delimited', columns={{{columns}}})"
    return f"(SELECT * FROM {file} WHERE metric IS NOT NULL)"  # not the lines that end a section


def _parquet(path: Path) -> str:
    return f"read_parquet({_sql_text(glob.escape(str(path)))})"


def _read_rows(source: str) -> list[Row]:
    query = f"SELECT {', '.join(FIELDS)} FROM {source} ORDER BY {_ORDER}"
    with _database() as database:
        records = database.execute(query).fetchall()
    return [Row(**dict(zip(FIELDS, record, strict=True))) for record in records]


def _run_directories(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise RequestError(
            f"expected a directory of results, found nothing at {directory}; check the path, or "
            "make results with `palimpsest run`"
        )
    if (directory / "run.json").is_file():
        return [directory]
    return sorted(path.parent for path in directory.glob("*/run.json"))


def _load(path: Path) -> Run:
    run = _run_json(path)
    _check_schema(run, path)
    try:
        rows = _read_rows(_parquet(path / "rows.parquet"))
    except duckdb.Error as error:
        raise _unreadable(path / "rows.parquet", error) from error
    return Run(run, rows, _facts(path), path)


def _check_schema(run: Mapping[str, Any], path: Path) -> None:
    found = run.get("schema")
    if found != SCHEMA_VERSION:
        age = "a newer" if isinstance(found, int) and found > SCHEMA_VERSION else "another"
        raise RequestError(
            f"expected results of schema {SCHEMA_VERSION} in {path}, found {found!r}; read them "
            f"with {age} version of palimpsest, or delete the directory and run again"
        )


def _check_parquet(path: Path) -> None:
    """Refuse what is no parquet file with the columns of rows, or has two rows of one key."""
    query = f"SELECT {', '.join(COLUMNS)} FROM {_parquet(path)} LIMIT 0"
    try:
        with _database() as database:
            database.execute(query)
        check_keys(_parquet(path))
    except (duckdb.Error, ValueError) as error:
        raise _unreadable(path, error) from error


def _check_intervention(directory: Path) -> None:
    """Refuse tensors that are not there, or not as many bytes as their header says."""
    if not isinstance(_json(directory / "intervention.json"), dict):
        raise _unreadable(directory / "intervention.json", "expected an object")
    file = directory / "intervention.safetensors"
    try:
        with safetensors.safe_open(file, framework="pt"):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(file, error) from error


def _run_json(path: Path) -> dict[str, Any]:
    run = _json(path / "run.json")
    needed = ("run_id", "method", "status")
    if not isinstance(run, dict) or any(name not in run for name in needed):
        raise _unreadable(path / "run.json", f"expected the keys {', '.join(needed)}")
    return run


def _facts(path: Path) -> list[dict[str, Any]]:
    file = path / "facts.json"
    found = _json(file) if file.exists() else []
    if not isinstance(found, list):
        raise _unreadable(file, "expected a list")
    return found


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, cause: Exception | str) -> RequestError:
    return RequestError(
        f"cannot read {path}: {one_line(cause)}; delete the run's directory and run it again"
    )
