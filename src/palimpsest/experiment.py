"""One experiment: facts, a model, a place, a change, a ruler, a record."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from palimpsest.evaluate.downstream import worth
from palimpsest.evaluate.ruler import Ruler
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import FactSet
from palimpsest.facts.splits import Splits, on_dev
from palimpsest.intervene.changes.kinds import KINDS
from palimpsest.intervene.intervention import Intervention, Method, load
from palimpsest.locate.fixed import Fixed
from palimpsest.locate.locator import Evidence, Located, Locator
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.model.site import Site
from palimpsest.record import provenance
from palimpsest.record.provenance import Phase
from palimpsest.record.recording import Recording
from palimpsest.record.store import RunStore
from palimpsest.results import (
    Ground,
    Task,
    asked,
    described,
    finished,
    keys_of,
    measure_into,
    recorded,
)


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

    @cached_property
    def request(self) -> str:
        """What is asked for, ruler and record left out; known before a model is loaded."""
        parts: dict[str, Any] = {"model": self.model, "facts": self.facts, "method": self.method}
        place = self.locate.asked(self.method.place) if self.method.sited else None
        return provenance.request(parts | {"locate": place, "seed": self.seed})

    @cached_property
    def keys(self) -> dict[str, str]:
        """The key of each measure that the run is to have."""
        return keys_of(self.ruler)

    def located(self, model: ModelHandle, splits: Callable[[], Splits]) -> Located:
        """Where the method changes the model; of one that changes nothing there is no choice."""
        if not self.method.sited:
            return Located(Site(0, self.method.part))  # type: ignore[arg-type]
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
            return worth(model, facts, intervention.change)


def run(
    experiment: Experiment, phase: Phase, told: Callable[[str], None] = print
) -> tuple[Path, bool]:
    """Fit one method on the target facts, apply it, measure it, record it.

    What was done before is not done again: a finished run costs no model, and one that lacks some
    of the measures is measured further from its saved intervention.

    Args:
        experiment: what is asked for.
        phase: shows what is being done.
        told: tells the user in a line that another process works on this run.

    Returns:
        the run's directory, and whether it was done before and is left as it was.

    Raises:
        RequestError: the request was wrong.
    """
    found = finished(experiment.recording, experiment.request, experiment.keys)
    if found is not None:
        return found, True
    ground = Ground.of(experiment.model, experiment.facts, experiment.seed, phase)
    with ground.phase("locate"):
        located = experiment.located(ground.model, ground.split)

    def work(store: RunStore, missing: set[str]) -> None:
        _work(experiment, ground, located.site, store, experiment.ruler.only(missing))

    record = _record(experiment, ground.model, ground.facts, located)
    task = Task(record, experiment.keys, ground, ground.split, work)
    return recorded(experiment.recording, task, told)


def _work(
    experiment: Experiment, ground: Ground, site: Site, store: RunStore, ruler: Ruler
) -> None:
    """The method section: ask the unchanged model, fit, change, measure."""
    model, facts = ground.model, ground.split()
    with ground.phase("prepare"):
        prepared = ruler.prepare(model, facts, experiment.seed)
    with ground.phase("fit"):
        intervention = _fitted(experiment.method, model, facts, site, store)
    with ground.phase("measure"):
        again = partial(_fit_again, experiment.method, model, site)
        measure_into(store, ruler, intervention, ground, prepared, again)


def _fit_again(method: Method, model: ModelHandle, site: Site, facts: Splits) -> Intervention:
    """The method fitted on other target facts."""
    return method.fit(model, facts, site)


def _fitted(
    method: Method, model: ModelHandle, facts: Splits, site: Site, store: RunStore
) -> Intervention:
    """The intervention of the run: fitted and saved, or read back from a finished run."""
    place = store.directory / "intervention"
    if store.finished:
        return load(place, KINDS)
    intervention = method.fit(model, facts, site)
    intervention.save(place)
    if not store.has("fit"):
        store.append(intervention.diagnostics, section="fit")
    return intervention


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
                **(chosen if method.sited else {}),
            }
        )

    imitated = experiment.method.imitates
    return {
        "run_id": run_id(experiment.method),
        "method": experiment.names["intervene"],
        "imitates": None if imitated is None else run_id(imitated),
        "site": {"layer": site.layer, "part": site.part} if experiment.method.sited else None,
        "located": {str(layer): score for layer, score in located.scores.items()},
        **described(experiment, model, facts),
    }
