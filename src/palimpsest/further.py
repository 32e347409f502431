"""Finished runs measured further, from their saved interventions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.errors import RequestError
from palimpsest.evaluate.ruler import Ruler
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.splits import Splits
from palimpsest.intervene.changes.kinds import KINDS
from palimpsest.intervene.intervention import Intervention, Method, load
from palimpsest.model.load import Pretrained
from palimpsest.model.site import Site
from palimpsest.record.provenance import Phase
from palimpsest.record.recording import Recording
from palimpsest.record.store import RunStore, measured
from palimpsest.results import Ground, Task, keys_of, made_with, measure_into, recorded


@dataclass(frozen=True)
class Further:
    """A finished run, and what it is to be measured with.

    Attributes:
        run: the contents of its run.json.
        method: what was tried.
        model: where its model comes from on this machine.
        facts: its data set and split plan.
        ruler: the measures that it is to have.
        recording: where it stands, and which tracker shows it.
        seed: of its splits.
    """

    run: dict[str, Any]
    method: Method
    model: Pretrained
    facts: DataSet
    ruler: Ruler
    recording: Recording
    seed: int

    @property
    def missing(self) -> set[str]:
        """The measures that it lacks."""
        have = measured(self.run)
        return {name for name, key in keys_of(self.ruler).items() if (name, key) not in have}


def measure(
    runs: Sequence[Further], phase: Phase, told: Callable[[str], None] = print
) -> Iterator[tuple[Path, bool]]:
    """Measure runs further, one after another; runs of one model and the same facts load them once.

    Args:
        runs: finished ones.
        phase: shows what is being done.
        told: tells the user in a line that another process works on a run.

    Returns:
        of each run its directory, and whether it had all measures before and is left as it is.

    Raises:
        RequestError: the model or the facts are not those of a run.
    """
    grounds: dict[str, Ground] = {}
    for each in runs:
        if not each.missing:
            yield each.recording.directory / each.run["run_id"], True
            continue
        name = repr((each.model, each.facts, each.seed))
        if name not in grounds:
            grounds.clear()  # one model at a time
            grounds[name] = Ground.of(each.model, each.facts, each.seed, phase)
        yield _measured(each, grounds[name], told)


def _measured(each: Further, ground: Ground, told: Callable[[str], None]) -> tuple[Path, bool]:
    _check(each, ground)

    def again(facts: Splits) -> Intervention:
        return each.method.fit(ground.model, facts, Site(**each.run["site"]))

    def work(store: RunStore, missing: set[str]) -> None:
        ruler = each.ruler.only(missing)
        intervention = load(store.directory / "intervention", KINDS)
        intervention.check_model(ground.model)
        with ground.phase("prepare"):
            prepared = ruler.prepare(ground.model, ground.split(), each.seed)
        with ground.phase("measure"):
            measure_into(store, ruler, intervention, ground, prepared, again)

    record = {**each.run, **made_with(ground.model), "requests": []}
    return recorded(
        each.recording, Task(record, keys_of(each.ruler), ground, ground.split, work), told
    )


def _check(each: Further, ground: Ground) -> None:
    """Refuse another model, other facts, or facts that fell to other splits.

    Raises:
        RequestError: names what differs.
    """
    wanted, about = each.run["model"], each.run["facts"]
    pairs = (
        ("the model", wanted["fingerprint"][:12], ground.model.fingerprint[:12], "model.path="),
        ("the facts", about["fingerprint"][:12], ground.facts.fingerprint[:12], "facts.path="),
    )
    for name, expected, found, remedy in pairs:
        if expected != found:
            raise RequestError(
                f"expected {name} of run {each.run['run_id']} with fingerprint {expected}, found "
                f"{found}; name the right one with {remedy}"
            )
    counts = dict(ground.split().counts)
    if counts != about.get("counts"):
        changed = {key for key in counts if counts[key] != (about.get("counts") or {}).get(key)}
        raise RequestError(
            f"expected the splits of run {each.run['run_id']}, found other numbers of facts "
            f"({', '.join(sorted(changed))}); this version chooses other facts: run it again"
        )
