"""The ruler that every method faces: an ordered mapping of measures. It never sees the method."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch

from palimpsest.errors import RequestError
from palimpsest.evaluate.asking import withheld
from palimpsest.evaluate.measure import Measure
from palimpsest.evaluate.scene import Scene
from palimpsest.facts.splits import Splits
from palimpsest.model.forward import greedy, next_token_logprobs
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.record.row import IN_SAMPLE, Row

TAKEN = ("fit", "trace")
"""Names of what makes rows and is no measure."""

Prepared = Mapping[str, Any]
"""By measure, what it took from the unchanged model."""

_MEMBERS = ("version", "along", "prepare", "measure")


@dataclass(frozen=True)
class Ruler:
    """Measures by name, in the order in which they are taken.

    Attributes:
        measures: each asks one thing; none knows of the others.
    """

    measures: Mapping[str, Measure]

    def __post_init__(self) -> None:
        """Check that every entry is a measure.

        Raises:
            RequestError: a name that is taken, nothing, a class that lacks a member, or one whose
                settings cannot be told.
        """
        for name, measure in self.measures.items():
            _check(name, measure)

    def only(self, names: Collection[str]) -> "Ruler":
        """The ruler of these measures alone."""
        return Ruler({name: each for name, each in self.measures.items() if name in names})

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> dict[str, Any]:
        """Ask the unchanged model what each measure is relative to."""
        return {name: each.prepare(model, facts, seed) for name, each in self.measures.items()}

    def measure(self, scene: Scene, prepared: Prepared) -> Iterator[Row]:
        """The rows of all measures, in their order."""
        for _, rows in self.sections(scene, prepared):
            yield from rows

    def sections(self, scene: Scene, prepared: Prepared) -> Iterator[tuple[str, Iterator[Row]]]:
        """By measure its rows, computed when they are iterated.

        Rows of facts that could not be changed are null with the cause; those of a change that
        knows where the subject or the prompt ends are marked `oracle_gate`.
        """
        for name, measure in self.measures.items():
            yield name, _told(measure, scene, prepared[name])

    @property
    def along(self) -> "Ruler":
        """The measures that are taken after so many edits of a sequence too."""
        return Ruler({name: each for name, each in self.measures.items() if each.along})


def _check(name: str, measure: object) -> None:
    """Refuse an entry of the ruler that is no measure, or whose name is taken."""
    if name in TAKEN or not name.isidentifier():
        raise RequestError(
            f"expected a name of a measure under evaluate, found {name!r}; choose a plain name "
            f"other than {' and '.join(TAKEN)}"
        )
    if measure is None:
        raise RequestError(
            f"expected evaluate.{name} to be a measure, found null; leave it out with "
            f"'~evaluate.{name}'"
        )
    if not isinstance(measure, Measure):
        lacking = [each for each in _MEMBERS if not hasattr(measure, each)]
        raise RequestError(
            f"expected evaluate.{name} to be a measure, found {type(measure).__name__} without "
            f"{', '.join(lacking)}; docs/extend.md shows a whole one"
        )
    if not is_dataclass(measure):
        raise RequestError(
            f"expected evaluate.{name} to be a dataclass, whose fields are its settings, found "
            f"{type(measure).__name__}; write @dataclass(frozen=True) above the class"
        )


def after(scene: Scene, step: int) -> Scene:
    """The scene after `step` edits of a sequence: of the targets only those edited so far."""
    so_far = replace(scene.facts, target=scene.facts.target[:step])
    return Scene(scene.model, so_far, scene.change, scene.seed, step=step)


def _told(measure: Measure, scene: Scene, prepared: Any) -> Iterator[Row]:
    for row in measure.measure(scene, prepared):
        yield _marked(row, scene.change)


def _marked(row: Row, change: Change) -> Row:
    """Null if the method could not change the fact; the mark of an oracle where it had one.

    What can be read of facts that the method was fitted on is told under a split of its own.
    """
    row = withheld(row, change)
    if (row.axis, row.split) == ("recoverability", "target") and "target" in change.fitted_on:
        row = replace(row, split=IN_SAMPLE)
    if not change.oracle:
        return row
    return replace(row, note="oracle_gate" if row.note is None else f"{row.note}; oracle_gate")


def portraits(model: ModelHandle, facts: Splits, tokens: int = 5) -> list[dict[str, Any]]:
    """Each target fact in words: prompt, continuation, likeliest next tokens."""
    rows = [model.encode(fact.prompt, owner=i) for i, fact in enumerate(facts.target)]
    said = greedy(model, rows, tokens)
    top = torch.topk(next_token_logprobs(model, rows).exp(), 5)
    return [
        {
            "fact_id": fact.id,
            "relation": fact.relation,
            "subject": fact.subject,
            "prompt": fact.prompt.text,
            "true": fact.true,
            "new": fact.new,
            "answer": model.decode(said[i]),
            "top": [
                [model.decode([token]), probability]
                for token, probability in zip(
                    top.indices[i].tolist(), top.values[i].tolist(), strict=True
                )
                if math.isfinite(probability)
            ],
        }
        for i, fact in enumerate(facts.target)
    ]
