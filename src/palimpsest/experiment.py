"""One experiment: facts, a model, a place, a change, a ruler, a record."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.evaluate.ruler import Ruler, portraits
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import FactSet
from palimpsest.facts.splits import Splits, on_dev
from palimpsest.intervene.intervention import Method
from palimpsest.locate.fixed import Fixed
from palimpsest.locate.locator import Evidence, Located, Locator
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.model.site import Site
from palimpsest.record import provenance
from palimpsest.record.provenance import Phase
from palimpsest.record.recording import Recording
from palimpsest.record.store import RunStore
from palimpsest.results import Ground, asked, described, recorded


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
    locate: Locator
    method: Method
    ruler: Ruler
    recording: Recording
    seed: int
    names: dict[str, str]
    config: dict[str, Any]
    command: str

    def located(self, model: ModelHandle, splits: Callable[[], Splits]) -> Located:
        """Where the method changes the model; one that changes several layers has its own table."""
        evidence = Evidence(
            seed=self.seed,
            lowest=self.method.lowest,
            dev=lambda: splits().dev,
            trial=lambda site: self.trial(model, on_dev(splits(), self.facts, self.seed), site),
        )
        return self.locate.locate(model, self.method.part, self.method.place, evidence)

    def trial(self, model: ModelHandle, facts: Splits, site: Site) -> float:
        """How well the method does on the dev facts at a site."""
        intervention = self.method.fit(model, facts, site)
        with intervention.applied(model):
            return self.ruler.downstream.worth(model, facts, intervention.change)


def run(experiment: Experiment, phase: Phase) -> tuple[Path, bool]:
    """Fit one method on the target facts, apply it, measure it, record it.

    Returns:
        the run's directory, and whether it was done before and is left as it was.

    Raises:
        RequestError: the request was wrong.
    """
    ground = Ground.of(experiment.model, experiment.facts, experiment.seed, phase)
    model, timed = ground.model, ground.phase
    with timed("locate"):
        located = experiment.located(model, ground.split)
    record = _record(experiment, model, ground.facts, located)

    def work(store: RunStore) -> None:
        _work(experiment, model, ground.split(), located.site, store, timed)

    return recorded(experiment.recording, record, model, ground.split, ground.watch, work)


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
            written = intervention.differences()
            sections += ruler.sections(model, facts, change, baseline, seed, written)
            for name, rows in sections:
                if not store.has(name):
                    store.append(rows, section=name)
            store.write_facts(portraits(model, facts))


def _record(
    experiment: Experiment, model: ModelHandle, facts: FactSet, located: Located
) -> dict[str, Any]:
    """run.json as far as it is known before the work begins."""
    site, locate = located.site, experiment.locate

    def run_id(method: Method) -> str:
        chosen = {} if isinstance(locate, Fixed) else {"locate": provenance.describe(locate)}
        return provenance.identity(
            {
                **asked(model, facts, experiment.facts, experiment.seed),
                "site": [site.layer, site.part] if method.sited else None,
                "method": provenance.describe(method),
                "ruler": provenance.describe(experiment.ruler),
                **chosen,
            }
        )

    imitated = experiment.method.imitates
    return {
        "run_id": run_id(experiment.method),
        "method": experiment.names["intervene"],
        "imitates": None if imitated is None else run_id(imitated),
        "site": {"layer": site.layer, "part": site.part},
        "located": {str(layer): score for layer, score in located.scores.items()},
        **described(experiment, model, facts),
    }
