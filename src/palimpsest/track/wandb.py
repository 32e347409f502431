"""Weights & Biases: a view of a run's rows, offline unless the user is logged in.

The only importer of wandb. Tables and figures are made from what the store keeps, so nothing is
lost when there is no tracker.
"""

import logging
import netrc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args
from urllib.parse import urlsplit

from palimpsest.errors import RequestError, nearest
from palimpsest.files import writing
from palimpsest.record.results import FIELDS, Results, Run
from palimpsest.study.headline import Headline
from palimpsest.study.intervals import Estimate
from palimpsest.study.samples import measured
from palimpsest.study.sequences import courses
from palimpsest.study.study import Block, Figure
from palimpsest.study.table import Table
from palimpsest.study.traces import (
    TraceView,
    aie_rows,
    is_trace,
    peak,
    traced_facts,
    views,
)

Mode = Literal["online", "offline", "disabled"]

_MODES = ("auto", *get_args(Mode))
_STEP = "step"


class Live(Protocol):
    """A run that is being tracked."""

    def log_results(self, run: Run) -> None:
        """Show the run's headline numbers, rows, figures and intervention."""


class NullLive:
    """Tracks nothing."""

    def log_results(self, run: Run) -> None:
        """Do nothing."""


@dataclass
class NullTracker:
    """The tracker of those who want none; same interface as `Tracker`."""

    def run(self, directory: Path, run: Mapping[str, Any]) -> AbstractContextManager[Live]:
        """A run that is not tracked."""
        return nullcontext(NullLive())

    def describe(self) -> dict[str, str | None]:
        """Mode, id and directory for run.json."""
        return {"mode": "disabled", "id": None, "directory": None}


@dataclass
class Tracker:
    """Where runs are shown.

    Attributes:
        mode: `online`, `offline`, `disabled`, or `auto`: `WANDB_MODE` if set, else online if the
            user is logged in and offline if not.
        project: the wandb project.
        entity: the wandb user or team; None for the default one.
        tags: shown with every run.
    """

    mode: str = "auto"
    project: str = "palimpsest"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    _described: dict[str, str | None] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the mode.

        Raises:
            RequestError: it is none of those above.
        """
        self.resolved_mode()

    def run(self, directory: Path, run: Mapping[str, Any]) -> AbstractContextManager[Live]:
        """Start a wandb run whose files lie in `directory/wandb`.

        Its id is the run's, its group the sweep (the directory above), its job type the method. An
        error inside the block marks it failed there and is raised again.

        Args:
            directory: the run's own directory.
            run: the contents of run.json; `run_id`, `method` and `config` are read.
        """
        mode = self.resolved_mode()
        if mode == "disabled":
            return NullTracker().run(directory, run)
        return self._started(mode, directory, run)

    def describe(self) -> dict[str, str | None]:
        """Mode, id and directory for run.json; the last two are None before a run has started."""
        return {"mode": self.resolved_mode(), "id": None, "directory": None} | self._described

    def resolved_mode(self) -> Mode:
        """The mode with `auto` decided.

        Raises:
            RequestError: the mode is unknown.
        """
        mode = os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode
        if mode == "auto":
            return "online" if _logged_in() else "offline"
        if mode not in _MODES:
            raise RequestError(
                f"expected record.tracker.mode (or WANDB_MODE) to be one of {', '.join(_MODES)}, "
                f"found {mode!r}; {nearest(mode, _MODES)}"
            )
        return cast(Mode, mode)

    @contextmanager
    def _started(self, mode: Mode, directory: Path, run: Mapping[str, Any]) -> Iterator[Live]:
        import wandb

        place = directory.resolve() / "wandb"
        with _unlogged():
            with writing(place):
                live = self._init(wandb, mode, place.parent, run)
            try:
                yield WandbLive(live, wandb)
            except BaseException:
                _give_up(wandb, live)
                raise
            with writing(place):
                live.finish(exit_code=0)

    def _init(self, wandb: Any, mode: Mode, directory: Path, run: Mapping[str, Any]) -> Any:
        live = wandb.init(
            mode=mode,
            project=self.project,
            entity=self.entity,
            tags=list(self.tags),
            id=run["run_id"],
            name=f"{run['method']} {run['run_id']}",
            group=directory.parent.name,
            job_type=run["method"],
            config=dict(run.get("config") or {}),
            dir=str(directory),
            reinit="finish_previous",
            resume="allow",
            settings=_quiet(wandb),
        )
        place = Path(live.settings.sync_dir).relative_to(directory)
        self._described = {"mode": mode, "id": live.id, "directory": str(place)}
        live.define_metric(_STEP, hidden=True)
        live.define_metric("*", step_metric=_STEP)
        return live


@dataclass(frozen=True)
class WandbLive:
    """A wandb run in progress."""

    live: Any
    wandb: Any

    def log_results(self, run: Run) -> None:
        """Log means by step, headline numbers, rows, key figures and the intervention's files.

        Of a run of causal tracing: mean and largest effects, AIE as a table, and its figures.

        Raises:
            WriteError: there is no room.
        """
        with writing(run.path / "wandb"):
            if is_trace(run):
                self._log_trace(run)
            else:
                self._log(run)

    def _log(self, run: Run) -> None:
        results = Results.of([run])
        for step, values in _by_step(results):
            self.live.log({_STEP: step, **values})
        blocks = Headline().read(results)
        self.live.log({"rows": self._table(results), **self._figures(blocks)})
        self.live.summary.update(_scalars(blocks))
        self._artifact(run)

    def _table(self, results: Results) -> Any:
        rows = results.query(f"SELECT {', '.join(FIELDS)} FROM rows")
        return self.wandb.Table(columns=list(FIELDS), data=[list(row) for row in rows])

    def _figures(self, blocks: Sequence[Block]) -> dict[str, Any]:
        from plotly.graph_objects import Figure as Plotly

        return {
            f"figures/{block.name}": self.wandb.Plotly(Plotly(block.chart))
            for block in blocks
            if isinstance(block, Figure) and block.chart
        }

    def _log_trace(self, run: Run) -> None:
        [view] = views(Results.of([run]))
        self.live.log({"aie": self._aie_table(view), **self._trace_figures(view)})
        self.live.summary.update(_trace_scalars(view))

    def _aie_table(self, view: TraceView) -> Any:
        names = ["corruption", "kind", "position", "layer", "value", "low", "high", "n"]
        data = [[*place, e.value, e.low, e.high, e.n] for *place, e in aie_rows(view)]
        return self.wandb.Table(columns=names, data=data)

    def _trace_figures(self, view: TraceView) -> dict[str, Any]:
        from palimpsest.study.figures import tracing

        made = {
            "figures/average": tracing.average(view),
            "figures/aie": tracing.curves(view),
        }
        for place, traced in enumerate(traced_facts(view)):
            made[f"figures/fact-{place}"] = tracing.fact(view, traced)
        return {name: self.wandb.Plotly(fig) for name, fig in made.items() if fig is not None}

    def _artifact(self, run: Run) -> None:
        """The intervention's files, referenced where they lie instead of copied."""
        folder = run.path / "intervention"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            return
        artifact = self.wandb.Artifact(f"intervention-{run.run_id}", type="intervention")
        for path in files:
            name = path.relative_to(folder).as_posix()
            artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
        self.live.log_artifact(artifact)


def _quiet(wandb: Any) -> Any:
    """Settings that print nothing and collect nothing about the machine or the code."""
    return wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )


def _give_up(wandb: Any, live: Any) -> None:
    """Mark a run failed; the error that made it fail is the one to be told."""
    try:
        live.finish(exit_code=1)
    except Exception:
        wandb.teardown(exit_code=1)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Print nothing about a log that cannot be written; what else cannot be is told in a line."""
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    finally:
        logging.raiseExceptions = before


def _logged_in() -> bool:
    """Whether wandb would find an API key: in the environment, or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):  # none, or not a text
        return False


def _scalars(blocks: Sequence[Block]) -> dict[str, float]:
    """The headline numbers that have a value, by flat name."""
    [table] = [block for block in blocks if isinstance(block, Table) and block.name == "report"]
    cells = zip(table.headings, table.lines[0].cells, strict=True)
    return {
        heading.key: cell.value
        for heading, cell in cells
        if isinstance(cell, Estimate) and cell.value is not None
    }


def _trace_scalars(view: TraceView) -> dict[str, float]:
    """Mean effects, and where the AIE of each protocol is largest, by flat name."""
    means = {f"localization/{m}/{c}": e.value for (m, c), e in view.effects.items()}
    found = {name: value for name, value in means.items() if value is not None}
    for protocol in view.protocols:
        for name, group in (("peak_aie", None), ("peak_aie_last_subject", "last_subject")):
            top = peak(view, protocol, group)
            if top is not None and top.estimate.value is not None:
                found[f"localization/{name}/{protocol}"] = top.estimate.value
                found[f"localization/{name}_layer/{protocol}"] = top.layer
    return found


def _by_step(results: Results) -> list[tuple[int, dict[str, float]]]:
    """Means over facts of what was measured after so many edits or relearning steps, by step.

    Missing values are left out, and so are prompts that were fitted where others were asked too.
    """
    condition = (
        "step IS NOT NULL AND layer IS NULL AND NOT (metric = 'suppression' AND prompt_id = 'fit')"
    )
    found = measured(results, condition, ["step", "axis", "metric", "protocol"])
    steps: dict[int, dict[str, float]] = {}
    for (_, step, *name), estimate in sorted(found.items()):
        if estimate.value is not None:
            steps.setdefault(step, {})[f"by_step/{'/'.join(name)}"] = estimate.value
    for course in courses(results):
        for stage in course.stages:
            for key, estimate in stage.values.items():
                if "/retention/" in key and estimate.value is not None:
                    steps.setdefault(stage.step, {})[f"by_step/{key}"] = estimate.value
    return sorted(steps.items())
