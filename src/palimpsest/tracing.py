"""Causal tracing as an experiment of its own: facts, a model, a trace of each fact, a record."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from palimpsest.errors import RequestError
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import Fact, FactSet
from palimpsest.facts.splits import Splits
from palimpsest.locate.tracing import Trace, Tracing
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.record import provenance
from palimpsest.record.provenance import Phase
from palimpsest.record.recording import Recording
from palimpsest.record.store import RunStore
from palimpsest.results import Ground, Task, asked, described, finished, recorded

TRACED = ("target", "test", "dev", "others")
"""Splits of facts that the model knows."""


@dataclass(frozen=True)
class TraceExperiment:
    """Everything that a trace is made of, configured and named.

    Attributes:
        model: where the model comes from.
        facts: the data set and its split plan.
        tracing: how facts are traced.
        recording: where the results go.
        split: the facts that are traced.
        seed: of the splits.
        names: of the facts, as on the command line.
        config: the resolved configuration, for the record.
        command: the command line, for the record.
    """

    model: Pretrained
    facts: DataSet
    tracing: Tracing
    recording: Recording
    split: str
    seed: int
    names: dict[str, str]
    config: dict[str, Any]
    command: str

    def __post_init__(self) -> None:
        """Check the split.

        Raises:
            RequestError: it is none whose facts the model knows.
        """
        if self.split not in TRACED:
            raise RequestError(
                f"expected split to be one of {', '.join(TRACED)}, whose facts the model knows, "
                f"found {self.split!r}; choose one of them"
            )

    @cached_property
    def request(self) -> str:
        """What is asked for, the record left out; known before a model is loaded."""
        parts: dict[str, Any] = {"model": self.model, "facts": self.facts, "seed": self.seed}
        return provenance.request(parts | {"tracing": self.tracing, "split": self.split})

    @property
    def keys(self) -> dict[str, str]:
        """No measure is taken."""
        return {}

    def traced(self, splits: Splits) -> tuple[Fact, ...]:
        """The facts that are traced."""
        facts: tuple[Fact, ...] = getattr(splits, self.split)
        return facts

    def check(self, model: ModelHandle, splits: Splits) -> None:
        """Refuse what cannot be traced, before anything is written.

        Raises:
            RequestError: no fact, a prompt without its subject, or layers that the model lacks.
        """
        if not self.traced(splits):
            raise RequestError(
                f"expected facts that the model knows in the split {self.split}, found none; raise "
                "its size and share under facts, or choose another split"
            )
        self.tracing.check(model, self.traced(splits))


def trace(
    experiment: TraceExperiment, phase: Phase, told: Callable[[str], None] = print
) -> tuple[Path, bool]:
    """Trace known facts one by one and record every effect.

    Args:
        experiment: what is asked for.
        phase: shows what is being done.
        told: tells the user in a line that another process works on this run.

    Returns:
        the run's directory, and whether it was done before and is left as it was.

    Raises:
        RequestError: the request was wrong.
    """
    found = finished(experiment.recording, experiment.request, {})
    if found is not None:
        return found, True
    ground = Ground.of(experiment.model, experiment.facts, experiment.seed, phase)
    model = ground.model

    @cache
    def splits() -> Splits:
        experiment.check(model, ground.split())
        return ground.split()

    def work(store: RunStore, missing: set[str]) -> None:
        with ground.phase("trace"):
            _work(experiment, model, experiment.traced(splits()), store)

    record = _record(experiment, model, ground.facts)
    return recorded(experiment.recording, Task(record, {}, ground, splits, work), told)


def _work(
    experiment: TraceExperiment, model: ModelHandle, facts: tuple[Fact, ...], store: RunStore
) -> None:
    tracing, portraits = experiment.tracing, []
    for found in tracing.trace(model, facts):
        section = f"trace/{found.fact.id}"
        if not store.has(section):
            store.append(tracing.rows(found, experiment.split), section, measure="trace")
        portraits.append(_portrait(model, found))
    store.write_facts(portraits)


def _portrait(model: ModelHandle, found: Trace) -> dict[str, Any]:
    """A traced fact in words: its prompt token by token."""
    fact, row = found.fact, found.row
    return {
        "fact_id": fact.id,
        "relation": fact.relation,
        "subject": fact.subject,
        "prompt": fact.prompt.text,
        "true": fact.true,
        "new": fact.new,
        "tokens": [model.decode([token]) for token in row.ids[: row.prompt]],
        "subject_tokens": list(row.subject or ()),
    }


def _record(experiment: TraceExperiment, model: ModelHandle, facts: FactSet) -> dict[str, Any]:
    """run.json as far as it is known before the work begins."""
    parts = {
        **asked(model, facts, experiment.facts, experiment.seed),
        "split": experiment.split,
        "tracing": provenance.describe(experiment.tracing),
    }
    return {
        "run_id": provenance.identity(parts),
        "method": "trace",
        "imitates": None,
        "split": experiment.split,
        **described(experiment, model, facts),
    }
