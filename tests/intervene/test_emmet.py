"""EMMET: against d × d systems; constraints met; one fact is r-ROME."""

import pytest
import torch

from palimpsest.intervene.editors.emmet import Emmet
from palimpsest.model.handle import ModelHandle
from tests.intervene import literal, literal_memit
from tests.intervene.conftest import CONTEXTS, TARGETS, relative
from tests.intervene.spread import (
    CHOSEN,
    LAYER,
    SEARCH,
    Moments,
    changes,
    fit,
    one_at_a_time,
    together,
)


@pytest.mark.parametrize("span", [1, 2])
def test_a_batch_is_edited_like_the_literal_emmet(
    model: ModelHandle, moments: Moments, span: int
) -> None:
    expected = together(model, literal_memit.emmet(0.1, moments(model).given), span)
    mine = changes(fit(model, moments, Emmet, span=span, protocol="batch"))
    assert mine.keys() == expected.keys()
    assert max(relative(mine[layer], expected[layer]) for layer in expected) < 1e-4


def test_independent_facts_are_edited_as_if_each_were_alone(
    model: ModelHandle, moments: Moments
) -> None:
    found = fit(model, moments, Emmet)
    solve = literal_memit.emmet(0.1, moments(model).given)
    for i, expected in enumerate(one_at_a_time(model, solve, 1)):
        assert relative(changes(found, i)[LAYER], expected[LAYER]) < 1e-4


def test_without_a_ridge_every_constraint_is_met(model: ModelHandle, moments: Moments) -> None:
    block = literal.block(model, LAYER)
    exact, soft = (
        changes(fit(model, moments, Emmet, ridge=ridge, protocol="batch"))[LAYER].double()
        for ridge in (0.0, 10.0)
    )
    for fact in CHOSEN:
        found = literal.find(model, literal.Search.of(model, fact, CONTEXTS, block, SEARCH))
        key = literal_memit.key(model, fact, LAYER, CONTEXTS)
        assert relative(exact @ key, found.delta) < 1e-3
        assert relative(soft @ key, found.delta) > 0.01


def test_one_fact_is_edited_as_r_rome_would(model: ModelHandle, moments: Moments) -> None:
    """(v − W k̄) uᵀ / (uᵀ k̄) with u = C⁻¹k̄ and the same residual, whatever the ridge."""
    c = moments(model).given[LAYER]
    block = literal.block(model, LAYER)
    for fact in (TARGETS[0], TARGETS[2]):
        found = literal.find(model, literal.Search.of(model, fact, CONTEXTS, block, SEARCH))
        key = literal_memit.key(model, fact, LAYER, CONTEXTS)
        u = torch.linalg.inv(c) @ key
        expected = torch.outer(found.delta.double(), u) / (u @ key)
        for ridge in (0.0, 0.1, 5.0):
            mine = changes(fit(model, moments, Emmet, (fact,), ridge=ridge, protocol="batch"))
            assert relative(mine[LAYER], expected) < 1e-4
