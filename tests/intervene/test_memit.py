"""MEMIT: against d × d systems and weights really changed; what λ does."""

from dataclasses import replace

import pytest
import torch

from palimpsest.errors import RequestError
from palimpsest.intervene.editors.editor import see
from palimpsest.intervene.editors.memit import Memit
from palimpsest.intervene.editors.solving import Inverse, ridge
from palimpsest.intervene.editors.spread import mean_key
from palimpsest.model.handle import ModelHandle
from tests.intervene import literal, literal_memit
from tests.intervene.conftest import CONTEXTS, TARGETS, relative
from tests.intervene.spread import (
    LAYER,
    SEARCH,
    Moments,
    changes,
    fit,
    one_at_a_time,
    together,
)

WEIGHT = 20.0
"""λ at which a key of the tiny models is met by a part."""


@pytest.mark.parametrize("span", [1, 3])
def test_independent_facts_are_edited_as_if_each_were_alone(
    model: ModelHandle, moments: Moments, span: int
) -> None:
    found = fit(model, moments, Memit, span=span, weight=WEIGHT)
    assert found.change.independent
    assert found.change.layer == LAYER - span + 1
    solve = literal_memit.memit(WEIGHT, moments(model).given)
    for i, expected in enumerate(one_at_a_time(model, solve, span)):
        mine = changes(found, i)
        assert mine.keys() == expected.keys()
        assert max(relative(mine[layer], expected[layer]) for layer in expected) < 1e-4


@pytest.mark.parametrize("span", [1, 3])
def test_a_batch_is_edited_like_the_literal_memit(
    model: ModelHandle, moments: Moments, span: int
) -> None:
    found = fit(model, moments, Memit, span=span, weight=WEIGHT, protocol="batch")
    assert not found.change.independent
    expected = together(model, literal_memit.memit(WEIGHT, moments(model).given), span)
    mine = changes(found)
    assert mine.keys() == expected.keys()
    assert max(relative(mine[layer], expected[layer]) for layer in expected) < 1e-4


def test_a_batch_of_one_is_an_independent_edit(model: ModelHandle, moments: Moments) -> None:
    for target in (TARGETS[:1], TARGETS[2:3]):
        alone, batch = (
            changes(fit(model, moments, Memit, target, span=2, weight=WEIGHT, protocol=protocol))
            for protocol in ("independent", "batch")
        )
        assert all(relative(alone[layer], batch[layer]) < 1e-4 for layer in alone)


def test_a_small_weight_meets_the_key_exactly(model: ModelHandle, moments: Moments) -> None:
    """As λ → 0 the state at the subject becomes z; a large λ leaves the model as it was."""
    fact = TARGETS[1]
    block = literal.block(model, LAYER)
    wanted = literal.find(model, literal.Search.of(model, fact, CONTEXTS, block, SEARCH))
    row = literal.prompts(model, fact, [])[0]
    misses = []
    for weight in (1e-9, 1.0, 1e9):
        made = fit(model, moments, Memit, (fact,), span=1, weight=weight)
        key = literal_memit.key(model, fact, LAYER, CONTEXTS)
        moved = changes(made)[LAYER].double() @ key
        misses.append(relative(moved, wanted.delta))
    assert misses[0] < 1e-4
    assert misses[0] < misses[1] < misses[2]
    assert misses[2] == pytest.approx(1.0, abs=1e-4)
    made = fit(model, moments, Memit, (fact,), contexts=(), span=1, weight=1e-9, protocol="batch")
    bare = literal.find(model, literal.Search.of(model, fact, (), block, SEARCH))
    with made.applied(model):  # without contexts the key is the bare prompt's own
        state = literal.taken(model, row, block)[1]
    torch.testing.assert_close(state, bare.start + bare.delta, rtol=1e-4, atol=1e-4)


def test_the_share_of_a_key_that_is_met(model: ModelHandle, moments: Moments) -> None:
    """kᵀC⁻¹k / (λ + kᵀC⁻¹k), as the docstring says."""
    fact, weight = TARGETS[0], 5 * WEIGHT
    made = fit(model, moments, Memit, (fact,), span=1, weight=weight)
    key = literal_memit.key(model, fact, LAYER, CONTEXTS)
    square = float(key @ torch.linalg.inv(moments(model).given[LAYER]) @ key)
    met = float(made.parts[0].left[0, 0].double() @ key)
    assert met == pytest.approx(square / (weight + square), rel=1e-5)
    assert 0.05 < met < 0.95


@pytest.mark.parametrize("weight", [1e-3, 1.0, 15_000.0])
def test_small_systems_equal_large_ones(weight: float) -> None:
    """Woodbury: Kᵀ (λC + K Kᵀ)⁻¹ = (Kᵀ C⁻¹ K + λ 1)⁻¹ Kᵀ C⁻¹."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(64, 200, generator=generator, dtype=torch.float64)
    c = root @ root.T / 200
    k = torch.randn(2, 7, 64, generator=generator, dtype=torch.float64)
    u = Inverse.of(c.clone()).apply(k.flatten(0, 1)).view_as(k)
    for group, found in zip(k, ridge(u, k, weight), strict=True):
        expected = group @ torch.linalg.inv(weight * c + group.T @ group)
        assert relative(found, expected) < 1e-8


def test_the_key_weighs_the_bare_prompt_by_half(model: ModelHandle) -> None:
    seen = see(model, TARGETS, 1, CONTEXTS)
    for i, fact in enumerate(TARGETS):
        assert relative(mean_key(seen)[i], literal_memit.key(model, fact, 1, CONTEXTS)) < 1e-5
    assert torch.equal(mean_key(see(model, TARGETS, 1, ())), see(model, TARGETS, 1, ()).key[:, 0])


def test_layers_share_the_residual(model: ModelHandle, moments: Moments) -> None:
    """With keys met exactly, three layers bring the state as far as one."""
    fact = TARGETS[1]
    block = literal.block(model, LAYER)
    wanted = literal.find(model, literal.Search.of(model, fact, (), block, SEARCH))
    row = literal.prompts(model, fact, [])[0]
    made = fit(model, moments, Memit, (fact,), (), span=3, weight=1e-9, protocol="batch")
    with made.applied(model):
        state = literal.taken(model, row, block)[1]
    torch.testing.assert_close(state, wanted.start + wanted.delta, rtol=1e-4, atol=1e-4)


def test_there_must_be_so_many_layers(gpt2: ModelHandle, moments: Moments) -> None:
    with pytest.raises(RequestError, match=r"at least 4 layers up to layer 2, found 3; raise"):
        fit(gpt2, moments, Memit, span=4)
    with pytest.raises(RequestError, match=r"intervene.span.*at least 1"):
        Memit(span=0)


def test_what_cannot_be_written_is_refused(gpt2: ModelHandle, moments: Moments) -> None:
    broken = replace(TARGETS[0], new=None)
    with pytest.raises(RequestError, match=f"found fact {broken.id} without a new object"):
        fit(gpt2, moments, Memit, (*TARGETS, broken), span=1)
