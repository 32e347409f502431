"""What every experiment leaves behind: a directory that is opened, tracked and finished."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from palimpsest.evaluate.asking import knows
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import FactSet
from palimpsest.facts.splits import Splits, split
from palimpsest.files import check_writable
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.record import provenance
from palimpsest.record.provenance import Phase, Stopwatch
from palimpsest.record.recording import Recording
from palimpsest.record.store import RunStore, check_earlier, is_done


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


def recorded(
    recording: Recording,
    record: dict[str, Any],
    model: ModelHandle,
    splits: Callable[[], Splits],
    watch: Stopwatch,
    work: Callable[[RunStore], None],
) -> tuple[Path, bool]:
    """Do some work in a run's directory, tracked; leave it if it was done before.

    Args:
        recording: where results go.
        record: run.json as far as it is known.
        model: the loaded model.
        splits: gives the facts; not called if the run was done before.
        watch: of the phases.
        work: appends rows to the store that it is given.

    Returns:
        the run's directory, and whether it was done before and is left as it was.

    Raises:
        RequestError: an earlier attempt is not to be judged, or the directory cannot be written.
    """
    directory = recording.directory / record["run_id"]
    check_earlier(directory)
    if is_done(directory):
        return directory, True
    check_writable(directory)
    record["facts"] |= {"counts": dict(splits().counts), "sizes": splits().sizes}
    store = RunStore.open(directory, record)
    tracker = recording.tracker
    try:
        with tracker.run(directory, record) as live:
            store.update(wandb=tracker.describe())
            work(store)
            store.update(seconds=watch.seconds, peak_mb=watch.peak_mb)
            store.update(batch_sizes={"forward": model.batch_size})
            live.log_results(store.snapshot())
    except BaseException as error:
        store.fail(error)
        raise
    store.finish()
    return directory, False


def asked(model: ModelHandle, facts: FactSet, plan: DataSet, seed: int) -> dict[str, Any]:
    """What of a run's identity says whom it asked, and what."""
    about = {**provenance.describe(plan), "path": None, "fingerprint": facts.fingerprint}
    return {
        "model": {"fingerprint": model.fingerprint, "prefix": model.prefix},
        "facts": about,
        "seed": seed,
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


def described(experiment: Described, model: ModelHandle, facts: FactSet) -> dict[str, Any]:
    """What run.json says of every experiment."""
    return {
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "facts": {"name": experiment.names["facts"], "fingerprint": facts.fingerprint},
        "seed": experiment.seed,
        "sweep": experiment.recording.directory.name,
        "config": experiment.config,
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "code": provenance.code(),
        "device": provenance.device_name(model.device),
        "batch_sizes": {"forward": model.batch_size},
        "command": experiment.command,
    }
