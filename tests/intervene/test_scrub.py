"""Scrubbing: every layer's guarantee holds for the states that it really meets."""

from contextlib import ExitStack

import pytest
import torch

from palimpsest.intervene.erasers.eraser import cross_covariance
from palimpsest.intervene.erasers.leace import Leace
from palimpsest.intervene.erasers.scrub import Scrub
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene.concepts import LABELS, SAMPLE, assert_erased, states
from tests.intervene.conftest import assert_untouched, copy_of, weights

LAYERS = (0, 1, 2)


@pytest.fixture(scope="module")
def double(llama: ModelHandle) -> ModelHandle:
    return copy_of(llama, torch.float64)


def test_each_layer_is_fitted_on_what_the_layers_below_have_left(double: ModelHandle) -> None:
    scrubbed = Scrub(layers=list(LAYERS)).fit(double, SAMPLE, Site(2))
    below: list = []
    for part in scrubbed.parts:
        site = Site(part.change.layer, "residual")
        with ExitStack() as stack:
            for each in below:
                stack.enter_context(each.applied(double))
            assert_erased(states(double, site), part, 1e-8)
        below.append(part)


def test_the_scrubbed_model_has_nothing_linear_at_any_scrubbed_layer(double: ModelHandle) -> None:
    scrubbed = Scrub(layers=list(LAYERS)).fit(double, SAMPLE, Site(2))
    apart = Leace(layers=list(LAYERS)).fit(double, SAMPLE, Site(2))
    sites = [Site(layer, "residual") for layer in LAYERS]
    plain = [cross_covariance(states(double, site), LABELS).norm() for site in sites]
    left = {}
    for name, method in (("scrub", scrubbed), ("apart", apart)):
        with method.applied(double):
            found = [cross_covariance(states(double, site), LABELS).norm() for site in sites]
        left[name] = [float(a / b) for a, b in zip(found, plain, strict=True)]
    assert max(left["scrub"]) < 1e-8
    assert max(left["apart"][1:]) > 1e-3  # fitted apart, the upper layers meet other states


def test_all_layers_are_scrubbed_by_default_and_the_model_is_left_as_it_was(
    double: ModelHandle,
) -> None:
    before = weights(double)
    scrubbed = Scrub().fit(double, SAMPLE, Site(2))
    assert len(scrubbed.parts) == double.n_layers
    with scrubbed.applied(double):
        pass
    assert_untouched(double, before)
