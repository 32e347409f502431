"""W' − W as it is told is W' − W as it is found in the model."""

import pytest
import torch
from torch import Tensor

from palimpsest.intervene.changes.composition import Composition, History
from palimpsest.intervene.changes.deltas import BiasShift, OutDeltas, WeightDeltas
from palimpsest.intervene.changes.dense import DenseDeltas
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.intervention import Intervention, Unchanged
from palimpsest.model.difference import merged
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(model: ModelHandle, layer: int, facts: int = 1, seed: int = 0) -> WeightDeltas:
    return WeightDeltas(
        change=Change("fact", facts > 1, layer),
        model=model.fingerprint,
        left=noise(facts, 2, model.w_out(layer).shape[1], seed=seed),
        right=noise(facts, 2, model.width, seed=seed + 1),
    )


def dense(model: ModelHandle, layer: int, facts: int = 1) -> DenseDeltas:
    return DenseDeltas(
        change=Change("fact", facts > 1, layer),
        model=model.fingerprint,
        delta=noise(facts, *model.w_out(layer).shape, seed=7),
    )


def erasure(model: ModelHandle) -> Erasure:
    left, right = noise(model.width, 2).double(), noise(2, model.width).double()
    change = Change("relation", False, 0, "residual", "all")
    return Erasure(
        change=change,
        model=model.fingerprint,
        proj_left=left,
        proj_right=right,
        bias=noise(model.width).double(),
    )


def together(model: ModelHandle, *parts: Intervention) -> Composition:
    return Composition(change=parts[0].change, model=model.fingerprint, parts=parts)


@pytest.mark.parametrize("kind", ["low_rank", "dense", "layers", "same_layer", "history"])
def test_one_change_of_all_is_found_in_the_model(model: ModelHandle, kind: str) -> None:
    low, full = low_rank(model, 0), dense(model, 1)
    last = together(model, low_rank(model, 1, seed=3), full, erasure(model))
    made: dict[str, Intervention] = {
        "low_rank": low,
        "dense": full,
        "layers": together(model, full, low),
        "same_layer": last,
        "history": History(
            change=low.change, model=model.fingerprint, parts=(low, last), steps=(1, 2)
        ),
    }
    before = [model.w_out(layer).clone() for layer in range(model.n_layers)]
    with made[kind].applied(model):
        found = [model.w_out(layer) - before[layer] for layer in range(model.n_layers)]
    told = {each.layer: each for each in merged(made[kind].differences())}
    assert list(told) == [layer for layer, delta in enumerate(found) if delta.any()]
    for layer, each in told.items():
        assert each.facts == 1
        assert not each.independent
        torch.testing.assert_close(each.matrix(0), found[layer], rtol=1e-4, atol=1e-4)
        assert float(each.norms()) == pytest.approx(float(found[layer].norm()), rel=1e-4)


def test_independent_changes_are_one_a_fact(model: ModelHandle) -> None:
    several: list[OutDeltas] = [low_rank(model, 0, 3), dense(model, 0, 3), low_rank(model, 0)]
    [every] = merged(together(model, *several).differences())
    assert every.facts == 3
    assert every.independent
    for fact in range(3):
        wanted = several[0].matrix(fact) + several[1].matrix(fact) + several[2].matrix(0)
        torch.testing.assert_close(every.matrix(fact), wanted, rtol=1e-4, atol=1e-4)


def test_what_changes_no_weight_tells_of_none(model: ModelHandle) -> None:
    change, shift = Change("fact", False, 0), noise(model.width)
    none = (
        Unchanged(change=Change("fact", False, None), model=model.fingerprint),
        BiasShift(change=change, model=model.fingerprint, shift=shift),
        erasure(model),
    )
    assert [each.differences() for each in (*none, together(model, *none))] == [()] * 4
