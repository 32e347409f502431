"""A ruined model has no values: no metric may read a result off NaN."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from palimpsest.evaluate.probing.probes import train_all
from palimpsest.evaluate.ruler import Ruler, portraits
from palimpsest.evaluate.scene import Scene
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from tests.evaluate.changed import every


@pytest.fixture
def ruler(tmp_path: Path) -> Ruler:
    """All measures, with a short held-out text."""
    return every(tmp_path)


@contextmanager
def ruined(model: ModelHandle, value: float) -> Iterator[None]:
    """W_out of layer 1 filled with what is no number."""
    weight = model.w_out(1)
    saved = weight.clone()
    weight.fill_(value)
    try:
        yield
    finally:
        weight.copy_(saved)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("independent", [False, True])
def test_nothing_is_read_off_a_ruined_model(
    model: ModelHandle, facts: Splits, ruler: Ruler, value: float, independent: bool
) -> None:
    """On every axis; what lies before the change, and the baselines of names, stay."""
    change = Change("fact", independent, 1)
    prepared = ruler.prepare(model, facts, 0)
    with ruined(model, value):
        rows = list(ruler.measure(Scene(model, facts, change), prepared))
        told = portraits(model, facts)
    upstream = ("majority", "embedding")
    below = [row for row in rows if row.layer is not None and row.layer < 1]
    given = [row for row in rows if row.metric == "probe_strength" or row.upstream]
    values = [r for r in rows if r.value is not None and r not in below + given]
    assert not any(row.metric.startswith("attack") for row in values)
    assert {row.protocol for row in values} <= {*upstream}
    assert {row.axis for row in rows} == {"downstream", "recoverability", "consistency"}
    assert all(row.note for row in rows if row.value is None)
    assert all(fact["top"] == [] for fact in told)


def test_a_probe_of_what_is_not_finite_says_nothing() -> None:
    states = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    labels = ["a", "b", "c"] * 4
    (probe,) = train_all(states[None], labels, 0.01)
    said = probe.predict(states)
    assert None not in said
    lost = states.clone()
    lost[3, 1] = torch.nan
    assert probe.predict(lost) == [*said[:3], None, *said[4:]]
    assert train_all(lost[None], labels, 0.01)[0].predict(states) == [None] * 12


@pytest.mark.parametrize("independent", [False, True])
def test_what_feels_a_failed_facts_change_is_left_out(
    model: ModelHandle, facts: Splits, ruler: Ruler, independent: bool
) -> None:
    """It would show the unchanged model; a change that all feel has no such owners."""
    lost = facts.target[0].id
    sound = Change("fact", independent, 1)
    failed = replace(sound, failed={lost: "cause"})
    prepared = ruler.prepare(model, facts, 0)
    found, whole = (
        list(ruler.measure(Scene(model, facts, change), prepared)) for change in (failed, sound)
    )

    def count(rows: list, split: str | None, metric: str) -> int:
        return sum(r.n for r in rows if (r.split, r.metric) == (split, metric))

    for split, metric in (
        ("test", "relation_accuracy"),
        ("others", "other_accuracy"),
        (None, "perplexity"),
    ):
        less = count(found, split, metric) < count(whole, split, metric)
        assert less == independent, metric
