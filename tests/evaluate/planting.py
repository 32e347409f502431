"""States made of what a test hides in them, in place of a model's, and what probes find there."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from palimpsest.evaluate.measure import Measure
from palimpsest.evaluate.probing.measuring import POSITIONS
from palimpsest.evaluate.scene import Scene
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Position, Site
from palimpsest.model.tokens import NOBODY, Tokens
from palimpsest.record.row import UPSTREAM, Row
from tests.evaluate.toy import CLASSES

NONE = Change("fact", False, None)
INDEPENDENT = Change("fact", True, 2)
BATCH = Change("relation", False, 2)
REACHES = (
    NONE,
    INDEPENDENT,
    BATCH,
    Change("relation", False, 0),
    Change("fact", True, 3),
    Change("relation", False, 1, "residual", "all_but_sink"),
    Change("relation", False, 1, "residual", "last_prompt"),
    Change("relation", False, 1, "residual", "last_subject"),
)
"""Changes that reach different places."""


@dataclass(frozen=True)
class State:
    """A state that is asked for: whose, after which block, in which row."""

    fact: Fact
    prompt: Prompt
    owner: int
    layer: int
    position: Position

    def noise(self) -> Tensor:
        """In the last features: the same for a subject and prompt, layer and position."""
        key = f"{self.fact.id}/{self.prompt.id}/{self.layer}/{self.position}"
        seed = int.from_bytes(key.encode(), "big") % (2**63 - 1)
        noise = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        return torch.cat([torch.zeros(24), noise])

    def object(self, at: int = 0) -> Tensor:
        """The true object as one of the features from `at` on."""
        index = sorted({*CLASSES, "Peru", "Chad"}).index(self.fact.true)
        return 3.0 * torch.eye(32)[at + index]


class Planted:
    """Stands for `features`: states made of what a test hides in them."""

    def __init__(self, model: ModelHandle, facts: Splits, state: Callable[[State], Tensor]) -> None:
        self.state = state
        self.asked: list[list[Tokens]] = []
        self.of: dict[tuple[int, ...], tuple[Fact, Prompt]] = {}
        for fact in (*facts.target, *facts.test, *facts.probe, *facts.dev):
            for prompt in (fact.prompt, *fact.paraphrases):
                self.of[model.encode(prompt).ids] = fact, prompt

    def __call__(
        self,
        model: ModelHandle,
        rows: Sequence[Tokens],
        sites: Sequence[Site],
        positions: Sequence[Position],
    ) -> Tensor:
        self.asked.append(list(rows))
        out = torch.empty(len(sites), len(positions), len(rows), 32)
        for s, site in enumerate(sites):
            assert site.part == "residual"
            for p, position in enumerate(positions):
                for n, row in enumerate(rows):
                    fact, prompt = self.of[row.ids]
                    state = State(fact, prompt, row.owner, site.layer, position)
                    out[s, p, n] = self.state(state)
        return out


Plant = Callable[[Splits, Callable[[State], Tensor]], Planted]


def plain(state: State) -> Tensor:
    """The object can be read at every place."""
    return state.object() + state.noise()


def overwritten(owned: bool) -> Callable[[State], Tensor]:
    """From block 2 on the object has moved to other features: everywhere, or where one owns it."""

    def state(at: State) -> Tensor:
        changed = at.layer >= 2 and (not owned or at.owner != NOBODY)
        return at.object(10 if changed else 0) + at.noise()

    return state


def measured(
    measure: Measure,
    model: ModelHandle,
    facts: Splits,
    change: Change,
    plant: Plant,
    before: Callable[[State], Tensor] = plain,
    after: Callable[[State], Tensor] = plain,
) -> list[Row]:
    """Probes trained on the states of before, put to the states of after."""
    plant(facts, before)
    prepared = measure.prepare(model, facts, 0)
    plant(facts, after)
    return list(measure.measure(Scene(model, facts, change), prepared))


def judged(rows: Iterable[Row], protocol: str, split: str, **where: Any) -> list[Row]:
    """Accuracies of a protocol on a split."""
    return [
        row
        for row in rows
        if (row.metric, row.protocol, row.split) == ("probe_accuracy", protocol, split)
        and all(getattr(row, name) == value for name, value in where.items())
    ]


def share(rows: Sequence[Row]) -> float:
    """The mean of what has a value."""
    assert rows
    return fmean(row.value for row in rows if row.value is not None)


def of(rows: Iterable[Row], metric: str, protocol: str) -> list[Row]:
    """The rows of a metric and protocol."""
    return [row for row in rows if (row.metric, row.protocol) == (metric, protocol)]


def assert_controlled(rows: Sequence[Row], protocol: str, layers: Sequence[int]) -> None:
    """Selectivity is accuracy less the share of eight control labels that are named."""
    found = of(rows, "probe_selectivity", protocol)
    assert {(row.layer, row.position) for row in found} == {
        (layer, position) for layer in layers for position in POSITIONS
    }
    for row in found:
        accuracy = share(judged(rows, protocol, "test", layer=row.layer, position=row.position))
        assert row.value is not None
        control = accuracy - row.value
        assert abs(control - round(control * 8) / 8) < 1e-6
        assert 0 <= control < 0.8
        assert (row.n, row.split) == (8, "test")


def assert_undefined(
    rows: Sequence[Row], metric: str, protocol: str, layers: Sequence[int]
) -> None:
    """Nulls at every place, that say that independent edits change no probe subject."""
    null = of(rows, metric, protocol)
    assert {(row.layer, row.position) for row in null} == {
        (layer, position) for layer in layers for position in POSITIONS
    }
    assert {(row.value, row.n, row.fact_id) for row in null} == {(None, 0, None)}
    assert {row.note for row in null} == {
        "undefined for independent edits: no probe subject is edited"
    }


def assert_labelled(rows: Iterable[Row], change: Change) -> set[tuple[str, str | None]]:
    """Every value of a state says whether the change can have reached it.

    Returns:
        the metrics and protocols that have such values.
    """
    seen = set()
    for row in rows:
        if row.value is None or row.metric in ("probe_baseline", "probe_strength"):
            continue
        assert row.layer is not None
        assert row.position in POSITIONS
        fixed = row.metric == "probe_capacity" and str(row.protocol).startswith("frozen")
        reached = change.reaches(row.layer, row.position) and not fixed
        assert row.note == (None if reached else UPSTREAM)
        seen.add((row.metric, row.protocol))
    return seen


def baselines(rows: Iterable[Row]) -> dict[tuple[str | None, int | None, str | None], Row]:
    """Rows of baselines by protocol and place."""
    found = [row for row in rows if row.metric == "probe_baseline"]
    keyed = {(row.protocol, row.layer, row.position): row for row in found}
    assert len(keyed) == len(found)
    return keyed
