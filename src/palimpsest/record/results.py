"""What runs left behind, read back: the rows of many runs as one relation, or one run's as a list.

Nothing here computes statistics. A directory that cannot be trusted is passed over and told, so
that one damaged run does not hide the others.
"""

import glob
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import duckdb

from palimpsest import files
from palimpsest.errors import RequestError
from palimpsest.locks import holder
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

ORDER = ", ".join(
    f"{name} NULLS FIRST"
    for name in sorted(KEY, key=lambda name: name not in ("axis", "metric", "protocol"))
)
"""The order of the rows in a parquet file, as SQL."""

_WORDS = ("run_id", "method", "status")
_TABLES = ("model", "facts", "config", "site", "seconds", "peak_mb")
"""Keys of run.json that hold an object, or null."""


@dataclass(frozen=True, eq=False)
class Run:
    """What one run left behind.

    Attributes:
        run: the contents of run.json.
        path: the run's directory.
    """

    run: dict[str, Any]
    path: Path

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.run["method"])

    @property
    def run_id(self) -> str:
        """The run's identity: a hash of its scientific configuration."""
        return str(self.run["run_id"])

    @property
    def source(self) -> Path:
        """The file that holds its rows: rows.parquet, or rows.jsonl while the run is going."""
        parquet, done = self.path / "rows.parquet", self.path / "DONE"
        return parquet if parquet.exists() or done.exists() else self.path / "rows.jsonl"

    @cached_property
    def rows(self) -> list[Row]:
        """Every measured value in the parquet's order, read when first asked for.

        Raises:
            RequestError: the file cannot be read.
        """
        query = f"SELECT {', '.join(FIELDS)} FROM {relation(self.source)} ORDER BY {ORDER}"
        try:
            with database() as connection:
                records = connection.execute(query).fetchall()
        except duckdb.Error as error:
            raise unreadable(self.source, error) from error
        return [Row(**dict(zip(FIELDS, record, strict=True))) for record in records]

    @cached_property
    def facts(self) -> list[dict[str, Any]]:
        """What the model said for each target fact (facts.json); empty when not recorded.

        Raises:
            RequestError: the file cannot be read.
        """
        return read_facts(self.path)

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


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A directory that looks like a run's and is not read.

    Attributes:
        path: the directory.
        cause: why, and what to do, in one line.
    """

    path: Path
    cause: str


@dataclass(frozen=True, eq=False)
class Results:
    """The results of many runs.

    Their rows are one relation, `rows`: the columns of rows.parquet, and `run_id`. It is read from
    the files for each query, so that memory does not grow with the number of runs.

    Attributes:
        runs: the finished runs, ordered by run id.
        unfinished: run.json of those that failed or have not finished; where it says `running`
            and nobody works there any more, with the status `died`.
        passed_over: what could not be read or trusted.
    """

    runs: tuple[Run, ...]
    unfinished: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    passed_over: tuple[PassedOver, ...] = ()

    @classmethod
    def open(cls, directory: Path) -> Self:
        """The results in a sweep's directory, or in one run's own.

        Raises:
            RequestError: no such directory, or no finished run in it that can be read.
        """
        runs: dict[str, Run] = {}
        unfinished, passed = [], []
        with database() as connection:
            for path in run_directories(directory):
                try:
                    run = Run(read_run(path), path)
                    if not (path / "DONE").is_file():
                        unfinished.append(_as_it_stands(run))
                        continue
                    _check_finished(run, runs, connection)
                    runs[run.run_id] = run
                except RequestError as error:
                    passed.append(PassedOver(path, str(error)))
        if not runs:
            raise _nothing(directory, unfinished, passed)
        ordered = tuple(runs[name] for name in sorted(runs))
        return cls(ordered, tuple(unfinished), tuple(passed))

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Self:
        """The results of some runs, finished or not, of different ids."""
        return cls(tuple(runs))

    def run(self, run_id: str) -> Run:
        """The run of an id."""
        return next(run for run in self.runs if run.run_id == run_id)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """The records that an SQL query over `rows` gives.

        Tables and views that a query creates stay for later ones.

        Raises:
            RequestError: a file of rows can no longer be read.
        """
        try:
            return self._database.execute(sql).fetchall()
        except duckdb.IOException as error:
            raise RequestError(
                f"cannot read the rows of these runs: {one_line(error)}; ask for the report again"
            ) from error

    @cached_property
    def _database(self) -> duckdb.DuckDBPyConnection:
        connection = database()
        connection.execute("CREATE TABLE files (path VARCHAR, run_id VARCHAR)")
        named = [[str(run.source), run.run_id] for run in self.runs]
        if named:
            connection.executemany("INSERT INTO files VALUES (?, ?)", named)
        parts = [_empty(), *_sources(self.runs)]
        connection.execute(f"CREATE VIEW rows AS {' UNION ALL '.join(parts)}")
        return connection


def load_runs(directory: Path) -> list[Run]:
    """The finished runs in a sweep's directory, or the one in a run's own, ordered by run id.

    What cannot be read is passed over with a warning.

    Raises:
        RequestError: no such directory, or no finished run in it that can be read.
    """
    found = Results.open(directory)
    for each in found.passed_over:
        warnings.warn(f"passed over: {each.cause}", stacklevel=2)
    return list(found.runs)


def load_unfinished(directory: Path) -> list[dict[str, Any]]:
    """The run.json of every run in `directory` that failed or has not finished.

    Raises:
        RequestError: no such directory, or a run.json that cannot be read.
    """
    paths = run_directories(directory)
    return [read_run(path) for path in paths if not (path / "DONE").is_file()]


def run_directories(directory: Path) -> list[Path]:
    """The directories with a run.json: those in a sweep's, or a run's own.

    Raises:
        RequestError: no such directory.
    """
    if not directory.is_dir():
        raise RequestError(
            f"expected a directory of results, found nothing at {directory}; check the path, or "
            "make results with `palimpsest run`"
        )
    if (directory / "run.json").is_file():
        return [directory]
    return sorted(path.parent for path in directory.glob("*/run.json"))


def read_run(path: Path) -> dict[str, Any]:
    """The contents of a run's run.json.

    Raises:
        RequestError: it cannot be read, or is not what a run writes.
    """
    run = read_json(path / "run.json")
    if not isinstance(run, dict) or not all(isinstance(run.get(k), str) for k in _WORDS):
        raise unreadable(path / "run.json", f"expected the keys {', '.join(_WORDS)} with texts")
    for name in _TABLES:
        if not isinstance(run.get(name) or {}, Mapping):
            raise unreadable(path / "run.json", f"expected {name} to be an object or null")
    _check_values(run, path / "run.json")
    return run


def _check_values(run: Mapping[str, Any], file: Path) -> None:
    """Refuse a run.json whose values are not what is read of them.

    Raises:
        RequestError: names the key.
    """
    site, measures = run.get("site"), run.get("measures")
    sizes = (run.get("facts") or {}).get("sizes")
    sound = {
        "seed": isinstance(run.get("seed"), int | None),
        "site": not site or type(site.get("layer")) is int,
        "facts.sizes": isinstance(sizes, Mapping | None),
        "requests": _are_texts(run.get("requests")),
        "measures": isinstance(measures, Mapping | None)
        and all(map(_are_texts, (measures or {}).values())),
    }
    for name, right in sound.items():
        if not right:
            raise unreadable(file, f"another kind of value in {name} than a run writes")


def _are_texts(value: Any) -> bool:
    """Whether it is a list, or the keys of an object, of texts; or null."""
    return value is None or (
        isinstance(value, list | Mapping) and all(isinstance(item, str) for item in value)
    )


def check_schema(run: Mapping[str, Any], path: Path) -> None:
    """Refuse results of another version of the contract.

    Raises:
        RequestError: they are.
    """
    found = run.get("schema")
    if found == SCHEMA_VERSION:
        return
    remedy = "read them with another version of palimpsest, or delete the directory and run again"
    if found == 1:
        remedy = (
            "its rows do not say by which measure they were made: run the sweep again with this "
            "version, or read it with the version that wrote it"
        )
    elif isinstance(found, int) and found > SCHEMA_VERSION:
        remedy = "read them with a newer version of palimpsest"
    raise RequestError(
        f"expected results of schema {SCHEMA_VERSION} in {path}, found {found!r}; {remedy}"
    )


def read_facts(path: Path) -> list[dict[str, Any]]:
    """The contents of a run's facts.json; empty if there is none.

    Raises:
        RequestError: it cannot be read, or is no list of objects.
    """
    file = path / "facts.json"
    found = read_json(file) if file.exists() else []
    if not isinstance(found, list) or not all(
        isinstance(fact, dict) and "fact_id" in fact for fact in found
    ):
        raise unreadable(file, "expected a list of objects with a fact_id")
    return found


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        return files.read_json(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, cause: Exception | str) -> RequestError:
    """The error for a file of a run that cannot be read."""
    return RequestError(
        f"cannot read {path}: {one_line(cause)}; delete the run's directory and run it again"
    )


def database() -> duckdb.DuckDBPyConnection:
    """A database in memory, of one thread."""
    return duckdb.connect(config={"threads": 1})


def sql_text(text: str) -> str:
    """A text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def relation(file: Path) -> str:
    """The rows in a parquet or JSON-lines file, as SQL that stands after FROM."""
    name = sql_text(glob.escape(str(file)))
    if file.suffix == ".parquet":
        return f"read_parquet({name})"
    columns = ", ".join(f"{name}: '{kind}'" for name, kind in COLUMNS.items())
    lines = f"read_json({name}, format='newline_delimited', columns={{{columns}}})"
    return f"(SELECT * FROM {lines} WHERE metric IS NOT NULL)"  # not the lines that end a section


def _empty() -> str:
    columns = ", ".join(f"NULL::{kind} AS {name}" for name, kind in COLUMNS.items())
    return f"SELECT NULL::VARCHAR AS run_id, {columns} WHERE false"


def _sources(runs: Sequence[Run]) -> list[str]:
    """The rows of all parquet files together, and those of each run that is going, as queries."""
    names = ", ".join(COLUMNS)
    parquets = [run.source for run in runs if run.source.suffix == ".parquet"]
    listed = ", ".join(sql_text(glob.escape(str(path))) for path in parquets)
    finished = (
        f"SELECT run_id, {names} FROM read_parquet([{listed}], filename = true) AS found "
        "JOIN files ON found.filename = files.path"
    )
    going = [
        f"SELECT {sql_text(run.run_id)} AS run_id, {names} FROM {relation(run.source)}"
        for run in runs
        if run.source not in parquets and run.source.exists()
    ]
    return ([finished] if parquets else []) + going


def _as_it_stands(run: Run) -> dict[str, Any]:
    """The run.json of an unfinished run; its lock tells whether somebody works on it still."""
    alone = run.run["status"] == "running" and holder(run.path / ".lock") is None
    return run.run | {"status": "died"} if alone else run.run


def _check_finished(
    run: Run, others: Mapping[str, Run], connection: duckdb.DuckDBPyConnection
) -> None:
    """Refuse a finished run that is of another schema, damaged, or there twice."""
    check_schema(run.run, run.path)
    if run.run["status"] != "done":
        raise unreadable(
            run.path / "run.json", f"expected status 'done' beside DONE, found {run.run['status']}"
        )
    if run.run_id in others:
        raise RequestError(
            f"expected one run of the id {run.run_id}, found it in {others[run.run_id].path} and "
            f"{run.path}; delete one of them"
        )
    _check_rows(run.path / "rows.parquet", connection)
    read_facts(run.path)


def _check_rows(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    """Refuse rows that cannot be read, all columns of them, or whose keys repeat."""
    others = ", ".join(f"count({name})" for name in COLUMNS if name not in KEY)
    query = (
        f"SELECT count(*), count(DISTINCT hash({', '.join(KEY)})), {others} FROM {relation(path)}"
    )
    try:
        [counts] = connection.execute(query).fetchall()
    except duckdb.Error as error:
        raise unreadable(path, error) from error
    if counts[0] != counts[1]:
        raise unreadable(path, f"{counts[0] - counts[1]:,} of {counts[0]:,} rows are there twice")


def _nothing(
    directory: Path, unfinished: Sequence[Mapping[str, Any]], passed: Sequence[PassedOver]
) -> RequestError:
    """The error where no run can be read: what was passed over, or what has not finished."""
    if passed:
        more = f" ({len(passed) - 1} more cannot be read either)" if len(passed) > 1 else ""
        return RequestError(passed[0].cause + more)
    states = [f"{run['run_id']} {run['status']}" for run in unfinished]
    return RequestError(
        f"expected finished runs (with a file DONE) in {directory}, found "
        f"{', '.join(states) or 'none'}; run `palimpsest run record.dir={directory}` first"
    )
