"""Mean projection, INLP and the random subspace: what each does, and what it does not."""

import pytest
import torch

from palimpsest.errors import RequestError
from palimpsest.intervene.erasers.eraser import relative_cross_covariance
from palimpsest.intervene.erasers.inlp import Inlp
from palimpsest.intervene.erasers.leace import Leace
from palimpsest.intervene.erasers.orth import MeanProjection
from palimpsest.intervene.erasers.random_subspace import RandomSubspace
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene.concepts import LABELS, SAMPLE, assert_erased, majority, readable, states
from tests.intervene.conftest import copy_of

SITE = Site(2, "residual")


@pytest.fixture(scope="module")
def double(llama: ModelHandle) -> ModelHandle:
    return copy_of(llama, torch.float64)


def test_mean_projection_is_orthogonal_and_erases(double: ModelHandle) -> None:
    erasure = MeanProjection().fit(double, SAMPLE, SITE)
    before = states(double, SITE)
    assert_erased(before, erasure)
    removed = erasure.proj_left @ erasure.proj_right
    assert torch.allclose(removed, removed.T)
    assert torch.linalg.matrix_rank(removed) == LABELS.shape[1] - 1


def test_mean_projection_changes_states_more_than_leace(double: ModelHandle) -> None:
    before = states(double, SITE)
    moved = [
        float((method.fit(double, SAMPLE, SITE).erase(before) - before).square().sum())
        for method in (MeanProjection(), Leace())
    ]
    assert moved[0] > moved[1]


def test_inlp_takes_directions_until_its_classifier_fails(double: ModelHandle) -> None:
    before = states(double, SITE)
    assert readable(before) > majority() + 0.3
    one, many = (Inlp(rounds=n, c=100.0).fit(double, SAMPLE, SITE) for n in (1, 20))
    k = LABELS.shape[1]
    assert one.proj_left.shape[1] == k - 1
    assert many.proj_left.shape[1] > k - 1
    for erasure in (one, many):
        q = erasure.proj_left
        assert torch.allclose(q.T @ q, torch.eye(q.shape[1]).double(), atol=1e-9)
        assert torch.equal(erasure.proj_right, q.T)
    left = [relative_cross_covariance(before, e.erase(before), LABELS) for e in (one, many)]
    assert 1e-6 < left[1] < left[0] < 1  # no theorem: something is left


def test_a_random_subspace_has_leaces_rank_and_spares_the_concept(double: ModelHandle) -> None:
    before = states(double, SITE)
    first, again, other = (RandomSubspace(seed=s).fit(double, SAMPLE, SITE) for s in (0, 0, 1))
    assert torch.equal(first.proj_left, again.proj_left)
    assert not torch.allclose(first.proj_left, other.proj_left)
    assert first.proj_left.shape[1] == LABELS.shape[1] - 1
    assert readable(first.erase(before)) == pytest.approx(readable(before), abs=0.1)
    assert readable(Leace().fit(double, SAMPLE, SITE).erase(before)) == pytest.approx(majority())


def test_layers_have_random_directions_of_their_own(double: ModelHandle) -> None:
    parts = RandomSubspace(layers=[1, 2]).fit(double, SAMPLE, SITE).parts
    assert not torch.allclose(parts[0].proj_left, parts[1].proj_left)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Inlp(rounds=0), "intervene.rounds.*at least 1"),
        (lambda: Inlp(c=0.0), "intervene.c to be a finite number above 0"),
        (lambda: MeanProjection(tolerance=-1.0), "intervene.tolerance"),
        (
            lambda: RandomSubspace(layers=[]),
            r"intervene.layers or intervene.all_layers.*found \[\]",
        ),
        (lambda: RandomSubspace(layers=[1], all_layers=True), r"found \[1\] and true"),
        (lambda: RandomSubspace(gate="never"), "intervene.gate.*always, subjects"),
        (lambda: RandomSubspace(rare="merg"), "intervene.rare.*did you mean 'merge'"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()
