"""A grid: what is done is left, jobs of one run are launched once, every outcome is told."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from palimpsest.cli.launching import Grid, Outcome, Planned, Work, grid
from palimpsest.cli.words import explained, say
from palimpsest.record.redact import one_line
from palimpsest.record.store import check_earlier, finished_runs, run_of
from palimpsest.sweep import plan as manifest

Of = Callable[[DictConfig], Any]
"""Of a job's configuration, the experiment that it asks for."""


@dataclass(frozen=True)
class Wanted:
    """What a job asks for: where, and what.

    Attributes:
        directory: of the sweep.
        request: of `provenance.request`.
        measures: the key of each measure.
    """

    directory: Path
    request: str
    measures: tuple[tuple[str, str], ...]

    def found(self, runs: Mapping[str, Any]) -> Path | None:
        """The finished run that has it all, among those of the directory."""
        for path, taken in runs.get(self.request, ()):
            if set(self.measures) <= taken:
                return Path(path)
        return None


def run_grid(
    command: str, words: Sequence[str], work: Work, of: Of, source: str | None = None
) -> int:
    """Plan a grid, launch what is not done, tell what became of every job.

    Args:
        command: `run` or `trace`.
        words: Hydra's flags and overrides.
        work: one job.
        of: the experiment that a job asks for.
        source: the sweep file; the directory's manifest then names the jobs.

    Returns:
        the exit code: 0 if all jobs are done, 2 if all that failed were wrong requests, else 1.

    Raises:
        RequestError: the configuration that all jobs share is wrong, or the grid is too large.
    """
    with grid(command, words) as found:
        jobs = found.plan(_looking(of))
        if source is not None:
            _write_manifest(jobs, source)
        return _told(jobs, _launched(found, jobs, work))


def _looking(of: Of) -> Callable[[DictConfig], tuple[Wanted, Path | None]]:
    """What a job asks for, and where it is done; each directory is read once."""
    runs: dict[Path, Mapping[str, Any]] = {}

    def look(config: DictConfig) -> tuple[Wanted, Path | None]:
        experiment = of(config)
        place = experiment.recording.directory
        if place not in runs:
            runs[place] = finished_runs(place)
        wanted = Wanted(place, experiment.request, tuple(sorted(experiment.keys.items())))
        done = wanted.found(runs[place])
        if done is not None:
            check_earlier(done)
        return wanted, done

    return look


def _write_manifest(jobs: Sequence[Planned], source: str) -> None:
    places: dict[Path, list[manifest.Job]] = {}
    for job in jobs:
        if isinstance(job.same, Wanted):
            line = manifest.Job(job.same.request, dict(job.same.measures), job.overrides, source)
            places.setdefault(job.same.directory, []).append(line)
    for place, lines in places.items():
        manifest.record(place, lines)


def _launched(found: Grid, jobs: Sequence[Planned], work: Work) -> dict[str, Outcome]:
    """What became of the jobs that had to be launched, by name."""
    first = {job.same: job.name for job in reversed(jobs) if job.same is not None}
    fresh = [job for job in jobs if job.same is not None and job.done is None]
    single = [job for job in fresh if first[job.same] == job.name]
    for job in jobs:
        if job.done is not None:
            say(f"{job.name}: done before, left as it is: {job.done}")
        elif job in fresh and job not in single:
            say(f"{job.name}: the same run as {first[job.same]}")
    if not single:
        return {}
    returned = found.launch(single, work)
    return {
        job.name: each if isinstance(each, Outcome) else _died(job, each)
        for job, each in zip(single, returned, strict=True)
    }


def _died(job: Planned, error: Exception) -> Outcome:
    """What is known of a job whose process told nothing: its run, or the launcher's word."""
    wanted = job.same
    if (done := wanted.found(finished_runs(wanted.directory))) is not None:
        return Outcome(0, f"done: {done}")
    for path in sorted(wanted.directory.glob("*/run.json")):
        run = run_of(path.parent)
        if run and wanted.request in (run.get("requests") or ()) and run.get("error"):
            return Outcome(1, f"error: {run['error']}")
    code, _ = explained(error)
    return Outcome(max(code, 1), f"error: its process died: {one_line(error)}")


def _told(jobs: Sequence[Planned], outcomes: Mapping[str, Outcome]) -> int:
    """Tell what became of every job that has not been told, by its name; the exit code of all."""
    found = {job.name: job.wrong or outcomes.get(job.name, Outcome(shown=True)) for job in jobs}
    for name, outcome in found.items():
        if not outcome.shown:
            say(f"{name}: {outcome.text}" if len(jobs) > 1 else outcome.text)
    return min((outcome.code for outcome in found.values() if outcome.code), default=0)
