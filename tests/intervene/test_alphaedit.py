"""AlphaEdit: against d × d systems in the null space, with the keys of earlier edits."""

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.intervene.editors.alphaedit import AlphaEdit
from palimpsest.model.handle import ModelHandle
from tests.intervene import literal_memit
from tests.intervene.conftest import CONTEXTS, copy_of, relative
from tests.intervene.spread import (
    CHOSEN,
    LAYER,
    SEARCH,
    Changes,
    Moments,
    changes,
    fit,
    layers,
    one_at_a_time,
    together,
)

OPTIONS = {"threshold": 0.5, "ridge": 2.0}
"""A threshold about which the given second moments have singular values on both sides."""


def small(c: Tensor) -> Tensor:
    """P, the projection to the singular vectors below the threshold."""
    u, singular, _ = torch.linalg.svd(c)
    inside = u[:, singular < OPTIONS["threshold"]]
    assert 0 < inside.shape[1] < len(c)
    return inside @ inside.T


@pytest.mark.parametrize("span", [1, 2])
@pytest.mark.parametrize("protocol", ["independent", "batch"])
def test_facts_are_edited_like_the_literal_alphaedit(
    model: ModelHandle, moments: Moments, protocol: str, span: int
) -> None:
    found = fit(model, moments, AlphaEdit, span=span, protocol=protocol, **OPTIONS)
    solve = literal_memit.alphaedit(**OPTIONS, moments=moments(model).given, before={})
    alone = protocol == "independent"
    expected = one_at_a_time(model, solve, span) if alone else [together(model, solve, span)]
    for i, change in enumerate(expected):
        mine = changes(found, i)
        assert mine.keys() == change.keys()
        assert max(relative(mine[layer], change[layer]) for layer in change) < 1e-4


def one_after_another(model: ModelHandle, moments: Moments, span: int, remember: bool) -> Changes:
    """Facts edited in turn on one copy, each edit's keys read once the copy carries it."""
    changed, before = copy_of(model), {layer: [] for layer in layers(span)}
    solve = literal_memit.alphaedit(**OPTIONS, moments=moments(model).given, before=before)
    total: Changes = {}
    for fact in CHOSEN:
        made = literal_memit.edit(changed, (fact,), layers(span), CONTEXTS, SEARCH, solve)
        total = {layer: total.get(layer, 0) + change for layer, change in made.items()}
        for layer in layers(span) if remember else ():
            before[layer].append(literal_memit.key(changed, fact, layer, CONTEXTS)[:, None])
    return total


@pytest.mark.parametrize("span", [1, 2])
def test_a_sequence_keeps_the_keys_of_the_edits_before(
    model: ModelHandle, moments: Moments, span: int
) -> None:
    mine = changes(fit(model, moments, AlphaEdit, span=span, protocol="sequential", **OPTIONS))
    expected = one_after_another(model, moments, span, remember=True)
    assert max(relative(mine[layer], expected[layer]) for layer in expected) < 1e-3
    forgetful = one_after_another(model, moments, span, remember=False)
    assert relative(forgetful[LAYER], expected[LAYER]) > 0.01


@pytest.mark.parametrize("protocol", ["independent", "batch", "sequential"])
def test_changes_lie_in_the_null_space(model: ModelHandle, moments: Moments, protocol: str) -> None:
    """Δ P = Δ, and Δ k = 0 for every k in the range of C above the threshold."""
    found = fit(model, moments, AlphaEdit, span=2, protocol=protocol, **OPTIONS)
    for layer, change in changes(found).items():
        p = small(moments(model).given[layer])
        delta = change.double()
        assert relative(delta @ p, delta) < 1e-5
        keys = torch.randn(64, len(p), dtype=torch.float64, generator=torch.Generator()) @ (
            torch.eye(len(p)) - p
        )
        assert float((delta @ keys.T).norm() / (delta.norm() * keys.norm())) < 1e-6


def test_a_threshold_below_every_singular_value_is_refused(
    model: ModelHandle, moments: Moments
) -> None:
    smallest = float(torch.linalg.svdvals(moments(model).given[LAYER])[-1])
    with pytest.raises(
        RequestError,
        match=rf"singular values .* below intervene.threshold={smallest / 2:g}, found "
        rf"{smallest:.3g} as the smallest; raise",
    ):
        fit(model, moments, AlphaEdit, span=1, threshold=smallest / 2)
