"""LEACE weighed by text: the guarantee, and least change of the mixture."""

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.intervene.erasers.eraser import cross_covariance
from palimpsest.intervene.erasers.leace_background import (
    LeaceBackground,
    least_change,
    text_moments,
)
from palimpsest.intervene.moments import RunningText
from palimpsest.model.forward import capturing, forward
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from palimpsest.model.tokens import Tokens, collate
from tests.intervene.concepts import LABELS, SAMPLE, assert_erased, states
from tests.intervene.conftest import copy_of

SITE = Site(2, "residual")
TEXT = RunningText(tokens=300, length=16)


@pytest.fixture(scope="module")
def double(llama: ModelHandle) -> ModelHandle:
    return copy_of(llama, torch.float64)


def test_the_concept_is_erased_whatever_the_share(double: ModelHandle) -> None:
    before = states(double, SITE)
    for share in (0.0, 0.3, 0.9):
        erasure = LeaceBackground(share=share, text=TEXT).fit(double, SAMPLE, SITE)
        assert_erased(before, erasure)
        assert torch.allclose(erasure.bias, before.mean(0))


def background(model: ModelHandle) -> Tensor:
    """The text's states, one row at a time, position 0 left out."""
    found = []
    for row in TEXT.rows(model).tolist():
        batch = collate([Tokens(tuple(row), len(row))], model.device)
        with torch.no_grad(), capturing(model, [SITE]) as seen:
            forward(model, batch)
        found.append(seen[SITE][0, 1:])
    return torch.cat(found)


def test_the_texts_moments_are_those_of_its_states(double: ModelHandle) -> None:
    text = background(double)
    mean, scatter = text_moments(double, SITE, TEXT)
    assert torch.allclose(mean, text.mean(0))
    assert torch.allclose(scatter, text.T @ text / len(text))


def test_no_other_map_that_erases_changes_the_mixture_less(double: ModelHandle) -> None:
    before, text, share = states(double, SITE), background(double), 0.4
    erasure = LeaceBackground(share=share, text=TEXT).fit(double, SAMPLE, SITE)
    mean = before.mean(0)
    eye = torch.eye(double.width, dtype=torch.float64)
    best = eye - erasure.proj_left @ erasure.proj_right
    cross = cross_covariance(before, LABELS)

    def cost(matrix: Tensor) -> float:
        assert (matrix @ cross).norm() < 1e-9 * cross.norm()
        own, other = (
            ((x - mean) @ (matrix - eye).T).square().sum(1).mean() for x in (before, text)
        )
        return float((1 - share) * own + share * other)

    basis = torch.linalg.qr(cross[:, :-1]).Q
    blind = eye - basis @ basis.T  # what else erases comes after it
    assert cost(blind) > cost(best)
    generator = torch.Generator().manual_seed(2)
    for scale in (1.0, 0.1, 0.01):
        for _ in range(30):
            noise = torch.randn(double.width, double.width, generator=generator).double()
            assert cost(best + scale * noise @ blind) > cost(best)


def test_the_more_the_text_weighs_the_less_it_is_changed(double: ModelHandle) -> None:
    text = background(double)
    moved = []
    for share in (0.0, 0.5, 0.95):
        erasure = LeaceBackground(share=share, text=TEXT).fit(double, SAMPLE, SITE)
        moved.append(float((erasure.erase(text) - text).square().sum()))
    assert moved[0] > moved[1] > moved[2]


def test_directions_that_nothing_moves_in_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    spread = root @ root.T  # of rank 5
    cross = root @ torch.randn(5, 2, generator=generator, dtype=torch.float64)
    affine = least_change(spread, cross, torch.zeros(8, dtype=torch.float64), 1e-9)
    assert (cross - affine.left @ (affine.right @ cross)).norm() < 1e-9 * cross.norm()
    assert affine.left.shape == (8, 2)


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(RequestError, match=r"intervene.share"):
        LeaceBackground(share=share)
