"""The manifest of a sweep: every job that was asked for, by its request, known without a model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from palimpsest.errors import RequestError
from palimpsest.files import read_json, write_json
from palimpsest.locks import held
from palimpsest.record.row import SCHEMA_VERSION
from palimpsest.record.store import finished_runs

NAME = "manifest.json"

State = Literal["done", "pending"]


@dataclass(frozen=True)
class Job:
    """One job of a grid.

    Attributes:
        request: what it asks for, as of `provenance.request`.
        measures: the key of each measure that its run is to have, by name.
        overrides: the words that set it apart in the grid.
        source: the sweep file's name.
    """

    request: str
    measures: Mapping[str, str]
    overrides: tuple[str, ...]
    source: str

    @property
    def key(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """What two jobs share if they are one run with the same measures."""
        return self.request, tuple(sorted(self.measures.items()))


def record(directory: Path, jobs: Iterable[Job]) -> None:
    """Write a sweep's jobs into its directory's manifest, beside those of other sweeps there.

    Jobs of the same sweep file that an earlier manifest names and this one does not are dropped.

    Raises:
        RequestError: the directory cannot be written, or holds another manifest.
    """
    fresh = list(jobs)
    with held(directory / f".{NAME}.lock"):
        sources = {job.source for job in fresh}
        others = [job for job in read(directory) if job.source not in sources]
        found = [asdict(job) for job in [*others, *fresh]]
        write_json(directory / NAME, {"schema": SCHEMA_VERSION, "jobs": found})


def read(directory: Path) -> list[Job]:
    """The jobs of a directory's manifest; none where there is no manifest.

    Raises:
        RequestError: it cannot be read.
    """
    path = directory / NAME
    if not path.exists():
        return []
    try:
        return [_job(each) for each in read_json(path)["jobs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"expected a sweep's manifest in {path}, found {type(error).__name__}: {error}; "
            "delete it and start the sweep again"
        ) from error


def _job(found: Mapping[str, Any]) -> Job:
    overrides = tuple(str(word) for word in found["overrides"])
    return Job(str(found["request"]), dict(found["measures"]), overrides, str(found["source"]))


def states(directory: Path, jobs: Sequence[Job]) -> list[State]:
    """Of each job whether its run is finished with all its measures; no model is loaded."""
    runs = finished_runs(directory)
    return [
        "done" if any(set(job.measures.items()) <= taken for _, taken in runs.get(job.request, ()))
        else "pending"
        for job in jobs
    ]  # fmt: skip
