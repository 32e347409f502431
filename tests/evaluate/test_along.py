"""Along a sequence of edits: the same measurements, of the facts edited so far."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from palimpsest.evaluate.ruler import Ruler, after
from palimpsest.evaluate.scene import Scene
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.record.row import Row
from tests.evaluate.changed import every

CHANGE = Change("fact", False, 1)


@pytest.fixture
def ruler(tmp_path: Path) -> Ruler:
    """All measures, with a short held-out text."""
    return every(tmp_path)


@contextmanager
def changed(model: ModelHandle, seed: int) -> Iterator[None]:
    """Another W_out of layer 1."""
    weight = model.w_out(1)
    saved = weight.clone()
    weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) / 4)
    try:
        yield
    finally:
        weight.copy_(saved)


def along(
    ruler: Ruler, model: ModelHandle, facts: Splits, change: Change, step: int
) -> Iterator[Row]:
    """The rows after so many edits."""
    part = ruler.along
    prepared = part.prepare(model, facts, 0)
    return part.measure(after(Scene(model, facts, change), step), prepared)


def without_step(rows: list[Row]) -> list[Row]:
    """The rows as a measurement after the last edit would name them."""
    return [replace(row, step=None) for row in rows]


@pytest.mark.parametrize("step", [1, 3, 8])
def test_the_first_facts_are_measured_as_if_there_were_no_others(
    model: ModelHandle, facts: Splits, ruler: Ruler, step: int
) -> None:
    """Every value is that of a whole measurement with those facts for targets."""
    some = replace(facts, target=facts.target[:step])
    prepared = ruler.prepare(model, facts, 0)
    with changed(model, step):
        found = list(along(ruler, model, facts, CHANGE, step))
        direct = dict(ruler.sections(Scene(model, some, CHANGE), prepared))
        expected = list(direct["downstream"])
    assert {row.step for row in found} == {step}
    of_targets = [row for row in expected if row.split == "target" or row.metric == "perplexity"]
    assert without_step(found) == of_targets
    ids = {fact.id for fact in facts.target[:step]}
    assert {row.fact_id for row in found} == ids | {None}


def test_the_metrics_along_the_way(model: ModelHandle, facts: Splits, ruler: Ruler) -> None:
    rows = list(along(ruler, model, facts, CHANGE, 8))
    metrics = {row.metric for row in rows}
    assert metrics == {
        "efficacy", "paraphrase", "neighborhood", "suppression", "score", "perplexity",
        "old_probability", "new_probability",
    }  # fmt: skip
    assert {row.axis for row in rows} == {"downstream"}
    names = [(r.metric, r.protocol, r.fact_id, r.prompt_id, r.step) for r in rows]
    assert len(set(names)) == len(names)


def test_each_state_is_measured_by_itself(model: ModelHandle, facts: Splits, ruler: Ruler) -> None:
    """The model is asked anew at every step."""
    perplexity = []
    for step in (1, 2):
        with changed(model, step):
            rows = list(along(ruler, model, facts, CHANGE, step))
        perplexity += [row.value for row in rows if row.metric == "perplexity"]
    assert len(set(perplexity)) == 2


def test_a_fact_that_could_not_be_changed_has_no_value(
    model: ModelHandle, facts: Splits, ruler: Ruler
) -> None:
    lost = facts.target[1]
    change = replace(CHANGE, failed={lost.id: "no finite loss"})
    plain = list(along(ruler, model, facts, CHANGE, 4))
    found = list(along(ruler, model, facts, change, 4))
    for before, now in zip(plain, found, strict=True):
        if before.fact_id == lost.id:
            assert now == replace(before, value=None, n=0, note="no finite loss")
        elif before.metric != "score":
            assert now == before
    score = next(row for row in found if row.metric == "score")
    assert score.n == 3


def test_every_axis_withholds_what_was_not_changed(
    model: ModelHandle, facts: Splits, ruler: Ruler
) -> None:
    lost = facts.target[0]
    change = replace(CHANGE, failed={lost.id: "no finite loss"})
    prepared = ruler.prepare(model, facts, 0)
    plain, found = (list(ruler.measure(Scene(model, facts, c), prepared)) for c in (CHANGE, change))
    axes = set()
    for before, now in zip(plain, found, strict=True):
        if before.fact_id == lost.id and before.split == "target":
            assert (now.value, now.n) == (None, 0)
            assert "no finite loss" in (now.note or "")
            axes.add(now.axis)
        elif before.fact_id is not None:
            assert now == before
    assert axes == {"downstream", "recoverability", "consistency"}


def test_a_model_without_finite_probabilities_has_no_values(
    model: ModelHandle, facts: Splits, ruler: Ruler
) -> None:
    """Neither lost nor won: of a ruined model it can only be said that it is ruined."""
    weight = model.w_out(1)
    saved = weight.clone()
    weight.fill_(torch.nan)
    try:
        rows = list(along(ruler, model, facts, CHANGE, 3))
    finally:
        weight.copy_(saved)
    assert {row.metric for row in rows} >= {"efficacy", "suppression", "neighborhood", "perplexity"}
    assert [row for row in rows if row.value is not None] == []
    told = {row.note for row in rows if row.metric in ("efficacy", "suppression", "neighborhood")}
    assert told == {"the model gives no finite probabilities"}
