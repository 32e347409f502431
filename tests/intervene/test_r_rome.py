"""R-ROME: one key everywhere, against the literal version."""

from collections.abc import Callable

import pytest
import torch

from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.editors.r_rome import RRome
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.intervene.moments import GivenMoments
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene import literal, literal_rome
from tests.intervene.conftest import CONTEXTS, TARGETS, relative, splits

Moments = Callable[[ModelHandle], GivenMoments]

SHORT = ValueSearch(steps=6)


def fit(
    model: ModelHandle,
    moments: Moments,
    kind: type[Rome] = RRome,
    contexts: tuple[str, ...] = CONTEXTS,
    **options: object,
) -> WeightDeltas:
    """Deltas of all targets at layer 1."""
    prefixes = GivenPrefixes(list(contexts))
    method = kind(prefixes=prefixes, moments=moments(model), search=SHORT, **options)
    return method.fit(model, splits(TARGETS), Site(1, "mlp"))


@pytest.mark.parametrize("variant", ["moments", "plain"])
def test_every_fact_is_edited_like_the_literal_r_rome(
    model: ModelHandle, moments: Moments, variant: str
) -> None:
    found = fit(model, moments, variant=variant)
    c = moments(model).given[1] if variant == "moments" else None
    for i, fact in enumerate(TARGETS):
        expected = literal_rome.edit(model, fact, 1, CONTEXTS, c, SHORT, mean_everywhere=True)
        assert relative(found.matrix(i), expected.change) < 1e-4


@pytest.mark.parametrize("protocol", ["independent", "batch"])
def test_the_mean_key_is_turned_into_the_value_found(
    model: ModelHandle, moments: Moments, protocol: str
) -> None:
    found = fit(model, moments, protocol=protocol)
    w_out = literal.w_out(model, 1)
    weight, bias = (part.double() for part in literal.affine(w_out))
    for i, fact in enumerate(TARGETS):
        rows = literal.prompts(model, fact, CONTEXTS)
        key = torch.stack([literal.taken(model, row, w_out)[0] for row in rows]).double().mean(0)
        search = literal.Search.of(model, fact, CONTEXTS, w_out, SHORT)
        wanted = literal.find(model, search)
        change = found.matrix(i if protocol == "independent" else 0).double()
        value = (weight + change) @ key + bias
        torch.testing.assert_close(
            value, (wanted.start + wanted.delta).double(), rtol=1e-3, atol=1e-4
        )


def test_without_contexts_it_is_rome(model: ModelHandle, moments: Moments) -> None:
    one, other = (fit(model, moments, kind, contexts=()) for kind in (RRome, Rome))
    for i in range(len(TARGETS)):
        assert relative(one.matrix(i), other.matrix(i)) < 1e-5
    assert relative(fit(model, moments).matrix(2), fit(model, moments, Rome).matrix(2)) > 0.01
