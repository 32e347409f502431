"""What every experiment leaves behind: a directory that is opened, tracked and finished."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from palimpsest.errors import RequestError, WriteError
from palimpsest.evaluate.asking import knows
from palimpsest.evaluate.ruler import Prepared, Ruler, after, portraits
from palimpsest.evaluate.scene import Scene, Shadow
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import Fact, FactSet
from palimpsest.facts.splits import Splits, split, with_targets
from palimpsest.files import check_writable
from palimpsest.intervene.changes.composition import Parts
from palimpsest.intervene.intervention import Intervention
from palimpsest.locks import Holder, held
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.model.site import Change
from palimpsest.record import provenance
from palimpsest.record.provenance import Phase, Stopwatch
from palimpsest.record.recording import Recording
from palimpsest.record.store import (
    RunStore,
    add_requests,
    check_earlier,
    finished_runs,
    is_done,
    measured,
    run_of,
)

Keys = Mapping[str, str]
"""The measures that are wanted, by name, and the key of each."""


@dataclass(frozen=True)
class Ground:
    """What every experiment begins with: model and facts loaded, and a watch that runs.

    Attributes:
        model: the loaded model.
        facts: every usable fact.
        plan: how they are split.
        seed: of the splits.
        watch: of the phases.
        phase: shows and times what is being done.
    """

    model: ModelHandle
    facts: FactSet
    plan: DataSet
    seed: int
    watch: Stopwatch
    phase: Phase

    @classmethod
    def of(cls, model: Pretrained, plan: DataSet, seed: int, phase: Phase) -> "Ground":
        """Load model and facts.

        Raises:
            RequestError: either cannot be loaded.
        """
        watch = Stopwatch()
        timed = watch.timing(phase)
        with timed("load"):
            return cls(model.load(), plan.load(), plan, seed, watch, timed)

    @cached_property
    def _splits(self) -> Splits:
        with self.phase("split"):
            return split(self.facts, self.plan, self.seed, partial(knows, self.model))

    def split(self) -> Splits:
        """The facts, split, and filtered to what the model knows; once.

        Raises:
            RequestError: too few of them.
        """
        return self._splits


def keys_of(ruler: Ruler) -> dict[str, str]:
    """The key of each measure, by name."""
    return {name: provenance.measure_key(each) for name, each in ruler.measures.items()}


def finished(recording: Recording, request: str, keys: Keys) -> Path | None:
    """The finished run that was asked for by this request and has all of these measures.

    No model is looked at.

    Args:
        recording: where the runs stand.
        request: what was asked, as of `provenance.request`.
        keys: the measures that are wanted.

    Returns:
        the run's directory; None if there is none yet.

    Raises:
        RequestError: it is there, and damaged.
    """
    for directory, taken in finished_runs(recording.directory).get(request, ()):
        if set(keys.items()) <= taken:
            check_earlier(directory)
            return directory
    return None


@dataclass(frozen=True)
class Task:
    """One run that is to be there afterwards.

    Attributes:
        record: run.json as far as it is known before the work begins.
        keys: the measures that it is to have.
        ground: model and facts.
        splits: gives the facts; not called if nothing is to be done.
        work: appends rows to the store that it is given; the names are of the measures to take.
    """

    record: dict[str, Any]
    keys: Keys
    ground: Ground
    splits: Callable[[], Splits]
    work: Callable[[RunStore, set[str]], None]


def recorded(recording: Recording, task: Task, told: Callable[[str], None]) -> tuple[Path, bool]:
    """Do some work in a run's directory, tracked; leave it if it was done before.

    The directory is locked meanwhile: a second process that asks for the same run waits. A finished
    run that lacks some of the measures is measured further.

    Args:
        recording: where results go.
        task: what is to be there afterwards.
        told: tells the user in a line who works there.

    Returns:
        the run's directory, and whether it was done before and is left as it was.

    Raises:
        RequestError: an earlier attempt is not to be judged, or the directory cannot be written.
    """
    directory = recording.directory / task.record["run_id"]
    check_earlier(directory)
    if not is_done(directory):
        check_writable(directory)
    with held(directory / ".lock", waiting=partial(_tell, directory, told)):
        check_earlier(directory)
        run = run_of(directory) if is_done(directory) else None
        have = set() if run is None else measured(run)
        missing = {name for name, key in task.keys.items() if (name, key) not in have}
        if run is not None and not missing:
            _also_asked(directory, run, task.record["requests"])
            return directory, True
        store = _opened(directory, task, run)
        _carried_out(recording, store, task, missing)
    return directory, False


def _tell(directory: Path, told: Callable[[str], None], holder: Holder) -> None:
    told(f"waiting for {directory}: {holder} works there")


def _also_asked(directory: Path, run: Mapping[str, Any], requests: list[str]) -> None:
    """Note that another request came to the same run, so that it is known without a model.

    Where that cannot be written the run is done all the same.
    """
    if not set(requests) <= set(run.get("requests") or ()):
        with suppress(RequestError, WriteError):
            add_requests(directory, requests)


def _opened(directory: Path, task: Task, run: Mapping[str, Any] | None) -> RunStore:
    record = task.record
    if run is not None:
        return RunStore.further(directory, record)
    facts = {"counts": dict(task.splits().counts), "sizes": task.splits().sizes}
    return RunStore.open(directory, record | {"facts": record["facts"] | facts})


def _carried_out(recording: Recording, store: RunStore, task: Task, missing: set[str]) -> None:
    """Work and tell the tracker; what fails is written down."""
    tracker, watch, model = recording.tracker, task.ground.watch, task.ground.model
    try:
        with tracker.run(store.directory, store.run) as live:
            store.update(wandb=tracker.describe())
            task.work(store, missing)
            if store.finished:
                store.finish()  # so that the tracker is shown old rows and new ones
            else:
                store.update(seconds=watch.seconds, peak_mb=watch.peak_mb)
                store.update(batch_sizes={"forward": model.batch_size})
            live.log_results(store.snapshot())
        if not store.finished:
            store.finish()
        add_requests(store.directory, task.record["requests"])
    except BaseException as error:
        store.fail(error)
        raise


Again = Callable[[Splits], Intervention]
"""Fits a run's method anew, at its site, on other target facts."""


def measure_into(
    store: RunStore,
    ruler: Ruler,
    intervention: Intervention,
    ground: Ground,
    prepared: Prepared,
    again: Again,
) -> None:
    """Lay a ruler on the changed model, and append its rows measure by measure.

    Sections that the store has already are left out.

    Args:
        store: of the run.
        ruler: the measures to take.
        intervention: fitted before, on this model.
        ground: model and facts.
        prepared: what the measures took from the unchanged model.
        again: fits the method on facts of an attacker's own; called only by measures that ask.
    """
    model, facts, change = ground.model, ground.split(), intervention.change
    keys = keys_of(ruler)
    for step in intervention.checkpoints:
        with intervention.at(step).applied(model):
            scene = after(Scene(model, facts, change, ground.seed), step)
            _append(store, ruler.along, keys, scene, prepared, f"/step/{step}")
    with shadowed(intervention, ground, again) as shadow:
        differences = intervention.differences()
        scene = Scene(model, facts, change, ground.seed, differences, shadow=shadow)
        _append(store, ruler, keys, scene, prepared)
        if not store.finished:
            store.write_facts(portraits(model, facts))
    for name, measure in ruler.measures.items():
        store.note(name, keys[name], settings=provenance.describe(measure), **made_with(model))


@contextmanager
def shadowed(intervention: Intervention, ground: Ground, again: Again) -> Iterator[Shadow]:
    """Apply an intervention; what is given puts the method's change of other facts in its place.

    A change that all subjects feel, and no change, stay as they are.
    """
    model, change, shared = ground.model, intervention.change, _felt_by_all(intervention)
    with ExitStack() as applied:
        applied.enter_context(intervention.applied(model))

        @contextmanager
        def shadow(facts: Sequence[Fact]) -> Iterator[Change]:
            if shared:
                yield change
                return
            applied.close()
            try:
                other = again(with_targets(ground.split(), facts, ground.seed))
                with other.applied(model):
                    yield other.change
            finally:
                applied.enter_context(intervention.applied(model))

        yield shadow


def _felt_by_all(intervention: Intervention) -> bool:
    """Whether all subjects of a relation feel the whole change, or nothing is changed."""
    if isinstance(intervention, Parts):
        return all(map(_felt_by_all, intervention.parts))
    change = intervention.change
    wide = change.scope == "relation" and not change.gated and not change.independent
    return change.layer is None or wide


def _append(
    store: RunStore,
    ruler: Ruler,
    keys: Keys,
    scene: Scene,
    prepared: Prepared,
    behind: str = "",
) -> None:
    for name, rows in ruler.sections(scene, prepared):
        section = f"{name}/{keys[name]}{behind}"
        if not store.has(section):
            store.append(rows, section, name, keys[name])


def asked(model: ModelHandle, facts: FactSet, plan: DataSet, seed: int) -> dict[str, Any]:
    """What of a run's identity says whom it asked, and what."""
    about = {**provenance.describe(plan), "path": None, "fingerprint": facts.fingerprint}
    return {
        "model": {"fingerprint": model.fingerprint, "prefix": model.prefix},
        "facts": about,
        "seed": seed,
    }


def made_with(model: ModelHandle) -> dict[str, Any]:
    """The versions, the code and the device of what works now."""
    return {
        "versions": provenance.versions(),
        "code": provenance.code(),
        "device": provenance.device_name(model.device),
    }


class Described(Protocol):
    """What an experiment of any kind tells of itself."""

    @property
    def recording(self) -> Recording:
        """Where the results go."""
        ...

    @property
    def seed(self) -> int:
        """Of the splits."""
        ...

    @property
    def names(self) -> dict[str, str]:
        """Of the chosen options, as on the command line."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        ...

    @property
    def command(self) -> str:
        """The command line."""
        ...

    @property
    def request(self) -> str:
        """What was asked, before a model was loaded."""
        ...


def described(experiment: Described, model: ModelHandle, facts: FactSet) -> dict[str, Any]:
    """What run.json says of every experiment."""
    return {
        "requests": [experiment.request],
        "model": {"name": model.name, "fingerprint": model.fingerprint, "prefix": model.prefix},
        "facts": {"name": experiment.names["facts"], "fingerprint": facts.fingerprint},
        "seed": experiment.seed,
        "sweep": experiment.recording.directory.name,
        "config": experiment.config,
        "git_commit": provenance.git_commit(),
        **made_with(model),
        "batch_sizes": {"forward": model.batch_size},
        "command": experiment.command,
    }
