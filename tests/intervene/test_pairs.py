"""Pairs of methods: the second sees the model that carries the first one's change."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from palimpsest.errors import RequestError
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.erasers.eraser import (
    GONE,
    Eraser,
    concept,
    relative_cross_covariance,
    states_of,
)
from palimpsest.intervene.erasers.inlp import Inlp
from palimpsest.intervene.erasers.leace import Leace
from palimpsest.intervene.erasers.leace_weights import LeaceWeights
from palimpsest.intervene.erasers.orth import MeanProjection
from palimpsest.intervene.erasers.random_subspace import RandomSubspace
from palimpsest.intervene.moments import GivenMoments
from palimpsest.intervene.pairs import InTurn
from palimpsest.model.forward import keys
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene.concepts import SAMPLE, assert_erased, states
from tests.intervene.conftest import assert_untouched, copy_of, relative, weights

EDITED, ERASED = 1, 2


@pytest.fixture
def rome(moments: Callable[[ModelHandle], GivenMoments], llama: ModelHandle) -> Rome:
    return Rome(prefixes=GivenPrefixes([]), moments=moments(llama))


def test_an_edit_is_computed_on_the_erased_model(llama: ModelHandle, rome: Rome) -> None:
    before = weights(llama)
    both = InTurn(Leace(), rome, first_layer=0).fit(llama, SAMPLE, Site(EDITED, "mlp"))
    erasure, deltas = both.parts
    assert isinstance(erasure, Erasure)
    with erasure.applied(llama):
        wanted = rome.fit(llama, SAMPLE, Site(EDITED, "mlp"))
    plain = rome.fit(llama, SAMPLE, Site(EDITED, "mlp"))
    assert relative(deltas.matrix(0), wanted.matrix(0)) < 1e-5
    assert relative(deltas.matrix(0), plain.matrix(0)) > 1e-2
    assert_untouched(llama, before)


def test_an_eraser_is_fitted_on_the_edited_model(llama: ModelHandle, rome: Rome) -> None:
    method = InTurn(rome, Leace(), then_layer=ERASED)
    assert method.part == "mlp"
    both = method.fit(llama, SAMPLE, Site(EDITED, "mlp"))
    edit, erasure = both.parts
    owned = {fact.id: n for n, fact in enumerate(SAMPLE.target)}
    with edit.applied(llama):
        facts = SAMPLE.fit
        found = states_of(llama, facts, [Site(ERASED)], "last_prompt", owned)[0]
    assert_erased(found, erasure, 1e-6)
    assert torch.allclose(erasure.bias, found.mean(0))
    unedited = states(llama, Site(ERASED))
    edited = torch.tensor([fact.id in owned for fact in facts])
    assert not torch.allclose(unedited[edited], found[edited])
    assert torch.allclose(unedited[~edited], found[~edited])


def test_both_changes_act_and_are_taken_back(llama: ModelHandle, rome: Rome) -> None:
    model = copy_of(llama)
    both = InTurn(Leace(), rome, first_layer=0).fit(model, SAMPLE, Site(EDITED, "mlp"))
    rows = [model.encode(fact.prompt, owner=n) for n, fact in enumerate(SAMPLE.target)]
    before, plain = weights(model), keys(model, rows, EDITED)[1]
    with both.applied(model):
        found = keys(model, rows, EDITED)[1]
    with both.parts[1].applied(model):
        edited = keys(model, rows, EDITED)[1]
    assert relative(found, plain) > 1e-2
    assert relative(found, edited) > 1e-3
    assert_untouched(model, before)
    assert torch.equal(keys(model, rows, EDITED)[1], plain)


def test_the_ruler_is_told_of_both(llama: ModelHandle, rome: Rome) -> None:
    both = InTurn(Leace(), rome, first_layer=0).fit(llama, SAMPLE, Site(EDITED, "mlp"))
    change = both.change
    assert (change.scope, change.independent, change.layer) == ("relation", True, 0)
    assert not change.oracle
    gated = InTurn(Leace(gate="subjects"), rome, first_layer=0)
    assert gated.fit(llama, SAMPLE, Site(EDITED, "mlp")).change.oracle
    metrics = {row.metric for row in both.diagnostics}
    assert {"residual_cross_covariance", "value_loss"} <= metrics


@pytest.mark.parametrize("then", [Leace(), MeanProjection(), Inlp(), RandomSubspace()])
def test_a_second_eraser_finds_nothing_left(llama: ModelHandle, then: Eraser) -> None:
    """Theorem 3.1: what LEACE leaves does not covary with the objects; there is no map of noise."""
    both = InTurn(Leace(), then, then_layer=ERASED).fit(llama, SAMPLE, Site(ERASED))
    leace, second = both.parts
    assert second.proj_left.shape == (llama.width, 0)
    found = {
        row.protocol: (row.value, row.note)
        for row in both.diagnostics
        if row.metric == "residual_cross_covariance" and row.protocol.startswith("fit_sample")
    }
    assert found["fit_sample"][0] < 1e-9
    assert found["fit_sample, then"] == (None, GONE)
    assert_erased(states(llama, Site(ERASED)), leace, 1e-6)


def test_two_erasers_at_one_layer_tell_of_their_fits_apart(llama: ModelHandle) -> None:
    inner = InTurn(RandomSubspace(seed=1), Leace(), then_layer=ERASED)
    both = InTurn(RandomSubspace(), inner, then_layer=ERASED).fit(llama, SAMPLE, Site(ERASED))
    residual = {
        row.protocol: row.value
        for row in both.diagnostics
        if row.metric == "residual_cross_covariance" and row.protocol.startswith("fit_sample")
    }
    assert list(residual) == ["fit_sample", "fit_sample, then", "fit_sample, then, then"]
    assert residual["fit_sample, then, then"] < 1e-9 < residual["fit_sample, then"]
    keys = [(row.metric, row.protocol, row.layer) for row in both.diagnostics]
    assert len(set(keys)) == len(keys)


def test_half_precision_leaves_nothing_to_erase_either(llama: ModelHandle) -> None:
    half = copy_of(llama, torch.bfloat16)
    both = InTurn(Leace(), Leace(), then_layer=ERASED).fit(half, SAMPLE, Site(ERASED))
    assert both.parts[1].proj_left.shape == (half.width, 0)


def test_a_control_after_leace_tells_what_it_removes(llama: ModelHandle) -> None:
    shuffled = Leace(shuffled=True)
    both = InTurn(Leace(), shuffled, then_layer=ERASED).fit(llama, SAMPLE, Site(ERASED))
    told = {row.metric: row.value for row in both.diagnostics if row.protocol == "fit_sample, then"}
    assert told["residual_cross_covariance"] is None
    assert 0 < told["variance_removed"] < 1


@pytest.mark.parametrize("protocol", ["independent", "batch"])
def test_an_eraser_is_not_folded_under_edits_that_no_weight_holds(
    llama: ModelHandle, rome: Rome, protocol: str
) -> None:
    pair = InTurn(replace(rome, protocol=protocol), LeaceWeights(), then_layer=EDITED)
    if protocol == "independent":
        with pytest.raises(RequestError, match=r"both at layer 1: .*; set protocol=batch"):
            pair.fit(llama, SAMPLE, Site(EDITED, "mlp"))
        return
    both = pair.fit(llama, SAMPLE, Site(EDITED, "mlp"))
    with both.applied(llama):
        left = states(llama, Site(EDITED, "mlp"))
    labels = concept(SAMPLE.fit, llama.width).labels
    with both.parts[0].applied(llama):
        assert relative_cross_covariance(states(llama, Site(EDITED, "mlp")), left, labels) < 1e-4


def test_nothing_is_written_below_an_eraser_of_what_w_out_gives(
    llama: ModelHandle, rome: Rome
) -> None:
    before = weights(llama)
    for first in (Leace("mlp"), InTurn(Leace("mlp"), Leace(), then_layer=0)):
        with pytest.raises(RequestError, match=r"both at layer 1: .*; set another layer"):
            InTurn(first, rome, then_layer=EDITED).fit(llama, SAMPLE, Site(EDITED, "mlp"))
    assert_untouched(llama, before)


@pytest.mark.parametrize(("first", "then", "found"), [(None, None, "none"), (1, 2, "both")])
def test_one_of_the_two_is_located(first: int | None, then: int | None, found: str) -> None:
    with pytest.raises(RequestError, match=f"found {found}; set one"):
        InTurn(Leace(), Leace(), first, then)
