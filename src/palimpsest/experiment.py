"""One experiment: facts, a model, a place, a change, a ruler, a record."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from palimpsest.evaluate.asking import knows
from palimpsest.evaluate.ruler import Ruler, portraits
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import FactSet
from palimpsest.facts.splits import Splits, split
from palimpsest.files import check_writable
from palimpsest.intervene.controls import NoChange
from palimpsest.intervene.intervention import Method
from palimpsest.locate.fixed import Fixed
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.model.site import Site
from palimpsest.record import provenance
from palimpsest.record.provenance import Stopwatch
from palimpsest.record.recording import Recording
from palimpsest.record.store import RunStore, check_earlier, is_done

Phase = Callable[[str], AbstractContextManager[None]]
"""Shows, for the length of a context, what is being done."""


@dataclass(frozen=True)
class Experiment:
    """Everything that one run is made of, configured and named.

    Attributes:
        model: where the model comes from.
        facts: the data set and its split plan.
        locate: chooses the site.
        method: what is tried.
        ruler: what it is measured with.
        recording: where the results go.
        seed: of the splits, the new objects and the owners' rotation.
        names: of method and facts, as on the command line.
        config: the resolved configuration, for the record.
        command: the command line, for the record.
    """

    model: Pretrained
    facts: DataSet
    locate: Fixed
    method: Method
    ruler: Ruler
    recording: Recording
    seed: int
    names: dict[str, str]
    config: dict[str, Any]
    command: str

    def site(self, model: ModelHandle) -> Site:
        """Where the method changes the model; one that changes several layers has its own table."""
        place = getattr(self.method, "place", None)
        return self.locate.site(model, self.method.part, place)


def run(experiment: Experiment, phase: Phase) -> tuple[Path, bool]:
    """Fit one method on the target facts, apply it, measure it, record it.

    Returns:
        the run's directory, and whether it was done before and is left as it was.

    Raises:
        RequestError: the request was wrong.
    """
    watch = Stopwatch()

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        with phase(name), watch.phase(name):
            yield

    with timed("load"):
        model = experiment.model.load()
        facts = experiment.facts.load()
    site = experiment.site(model)
    record = _record(experiment, model, facts, site)
    directory = experiment.recording.directory / record["run_id"]
    check_earlier(directory)
    if is_done(directory):
        return directory, True
    check_writable(directory)
    with timed("split"):
        splits = split(facts, experiment.facts, experiment.seed, partial(knows, model))
    record["facts"] |= {"counts": dict(splits.counts), "sizes": splits.sizes}
    store = RunStore.open(directory, record)
    tracker = experiment.recording.tracker
    try:
        with tracker.run(directory, record) as live:
            store.update(wandb=tracker.describe())
            _work(experiment, model, splits, site, store, timed)
            store.update(seconds=watch.seconds, peak_mb=watch.peak_mb)
            store.update(batch_sizes={"forward": model.batch_size})
            live.log_results(store.snapshot())
    except BaseException as error:
        store.fail(error)
        raise
    store.finish()
    return directory, False


def _work(
    experiment: Experiment,
    model: ModelHandle,
    facts: Splits,
    site: Site,
    store: RunStore,
    phase: Phase,
) -> None:
    """The method section: ask the unchanged model, fit, change, measure."""
    ruler, seed = experiment.ruler, experiment.seed
    with phase("prepare"):
        baseline = ruler.prepare(model, facts, seed)
    with phase("fit"):
        intervention = experiment.method.fit(model, facts, site)
        intervention.save(store.directory / "intervention")
        sections = [("fit", iter(intervention.diagnostics))]
    change = intervention.change
    with phase("measure"):
        for step in intervention.checkpoints:
            name = f"step/{step}"
            if not store.has(name):
                with intervention.at(step).applied(model):
                    store.append(ruler.along(model, facts, change, step, seed), section=name)
        with intervention.applied(model):
            sections += ruler.sections(model, facts, change, baseline, seed)
            for name, rows in sections:
                if not store.has(name):
                    store.append(rows, section=name)
            store.write_facts(portraits(model, facts))


def _record(
    experiment: Experiment, model: ModelHandle, facts: FactSet, site: Site
) -> dict[str, Any]:
    """run.json as far as it is known before the work begins."""

    def run_id(method: Method) -> str:
        plan = provenance.describe(experiment.facts)
        return provenance.identity(
            {
                "model": {"fingerprint": model.fingerprint, "prefix": model.prefix},
                "facts": {**plan, "path": None, "fingerprint": facts.fingerprint},
                "site": None if isinstance(method, NoChange) else [site.layer, site.part],
                "method": provenance.describe(method),
                "ruler": provenance.describe(experiment.ruler),
                "seed": experiment.seed,
            }
        )

    imitated = getattr(experiment.method, "imitates", None)
    return {
        "run_id": run_id(experiment.method),
        "method": experiment.names["intervene"],
        "imitates": None if imitated is None else run_id(imitated),
        "site": {"layer": site.layer, "part": site.part},
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
