"""Probes with a hidden layer: they find what no linear probe finds, and are controlled alike."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.evaluate.mlp_probes import MLPProbes
from palimpsest.evaluate.probes import Probes
from palimpsest.evaluate.probing.measuring import POSITIONS
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.record.row import UPSTREAM
from tests.evaluate.planting import (
    BATCH,
    INDEPENDENT,
    NONE,
    REACHES,
    Plant,
    State,
    assert_controlled,
    assert_labelled,
    assert_undefined,
    baselines,
    judged,
    measured,
    of,
    overwritten,
    plain,
    share,
)
from tests.evaluate.toy import RELATION, make_splits
from tests.model.tiny import make_handle

MLPS = MLPProbes(stride=3, hidden=16)
LAYERS = (0, 3)


def test_a_secret_of_no_linear_kind_is_found_by_mlps_alone(
    model: ModelHandle, plant: Plant
) -> None:
    """The class is the sign of a product; from block 2 on it is that of another two features."""
    facts = make_splits(("France", "Italy"), target=10, test=40, probe=100)
    facts = replace(facts, test=tuple(replace(fact, new=None) for fact in facts.test))
    sign = {"France": 1.0, "Italy": -1.0}

    def hidden(first: int) -> Callable[[State], Tensor]:
        def state(at: State) -> Tensor:
            one = torch.randn(1, generator=torch.Generator().manual_seed(int(at.fact.id[5:])))
            found = at.noise()
            found[first], found[first + 1] = one, sign[at.fact.true] * one
            return found

        return state

    rows = []
    for each in (Probes(stride=3, strengths=[1.0]), MLPS):
        rows += measured(
            each, model, facts, BATCH, plant, hidden(0),
            lambda at: hidden(0 if at.layer < 2 else 4)(at),
        )  # fmt: skip
    for layer, frozen in ((0, True), (3, False)):
        read = {p: share(judged(rows, p, "test", layer=layer)) for p in
                ("frozen", "retrained", "frozen_mlp", "retrained_mlp")}  # fmt: skip
        assert max(read["frozen"], read["retrained"]) < 0.7
        assert read["retrained_mlp"] > 0.75
        assert (read["frozen_mlp"] > 0.75) == frozen


def test_what_probes_with_a_hidden_layer_tell(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    """No codes, no bits, no strength, no baselines of names: these are the linear probes'."""
    told = {
        (row.metric, row.protocol)
        for change in (BATCH, INDEPENDENT)
        for row in measured(MLPS, model, facts, change, plant)
    }
    metrics = ("probe_accuracy", "probe_selectivity", "probe_capacity")
    kinds = ("frozen_mlp", "retrained_mlp")
    shuffled = {("probe_baseline", "shuffled_mlp")}
    assert told == shuffled | {(metric, kind) for metric in metrics for kind in kinds}


def test_without_a_change_retrained_probes_are_the_frozen_ones(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(MLPS, model, facts, NONE, plant, State.noise, State.noise)
    for split in ("target", "test"):
        frozen, retrained = (judged(rows, f"{p}_mlp", split) for p in ("frozen", "retrained"))
        assert [replace(row, protocol="frozen_mlp") for row in retrained] == frozen != []


def test_selectivity_is_accuracy_less_that_of_the_control(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(MLPS, model, facts, BATCH, plant, plain, overwritten(owned=False))
    for protocol in ("frozen_mlp", "retrained_mlp"):
        assert_controlled(rows, protocol, LAYERS)
    capacity = of(rows, "probe_capacity", "retrained_mlp")
    assert {(row.n, row.split) for row in capacity} == {(24, "probe")}
    assert {row.note for row in of(rows, "probe_capacity", "frozen_mlp")} == {UPSTREAM}


def test_independent_changes_have_no_retrained_probe_and_say_why(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    rows = measured(MLPS, model, facts, INDEPENDENT, plant)
    for metric in ("probe_accuracy", "probe_selectivity", "probe_capacity"):
        assert_undefined(rows, metric, "retrained_mlp", LAYERS)


@pytest.mark.parametrize("change", REACHES)
def test_states_that_the_change_cannot_reach_are_labelled(
    model: ModelHandle, facts: Splits, plant: Plant, change: Change
) -> None:
    seen = assert_labelled(measured(MLPS, model, facts, change, plant), change)
    kinds = ("frozen_mlp",) if change.independent else ("frozen_mlp", "retrained_mlp")
    metrics = ("probe_accuracy", "probe_selectivity", "probe_capacity")
    assert seen == {(metric, kind) for metric in metrics for kind in kinds}


def test_permuted_labels_are_a_baseline_at_every_place(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    found = baselines(measured(MLPS, model, facts, BATCH, plant))
    assert set(found) == {
        ("shuffled_mlp", layer, position) for layer in LAYERS for position in POSITIONS
    }
    assert abs(share(list(found.values())) - 1 / 4) < 0.3


def test_a_relation_with_too_few_probe_subjects_is_null(
    model: ModelHandle, facts: Splits, plant: Plant
) -> None:
    picky = replace(MLPS, least=6)
    fewer = replace(facts, probe=facts.probe[:-1])
    rows = measured(picky, model, fewer, BATCH, plant)
    assert [(r.metric, r.protocol, r.value, r.n, r.relation, r.note) for r in rows] == [
        ("probe_accuracy", "frozen_mlp", None, 0, RELATION, "fewer than 6 probe subjects a class")
    ]


def test_probes_are_trained_once(model: ModelHandle, facts: Splits, plant: Plant) -> None:
    planted = plant(facts, plain)
    first = MLPS.prepare(model, facts, 0)[RELATION].tensors()
    again = MLPS.prepare(model, facts, 0)[RELATION].tensors()
    assert len(planted.asked) == 1
    assert first.keys() == again.keys()
    assert all(
        torch.equal(again[name], tensor) for name, tensor in first.items() if "bits" not in name
    )
    MLPS.prepare(model, facts, 1)
    replace(MLPS, hidden=2).prepare(model, facts, 0)
    replace(MLPS, stride=2).prepare(model, facts, 0)
    MLPS.prepare(make_handle(seed=1), facts, 0)
    assert len(planted.asked) == 5


@pytest.mark.parametrize("name", ["stride", "hidden"])
def test_unusable_options_are_refused(name: str) -> None:
    with pytest.raises(
        RequestError, match=rf"evaluate\.mlp_probes\.{name} to be at least 1, found 0"
    ):
        MLPProbes(**{name: 0})
