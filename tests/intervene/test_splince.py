"""SPLINCE: the concept is gone, the kept cross-covariance stays, and no map does less."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.erasers.eraser import concept, cross_covariance, states_of
from palimpsest.intervene.erasers.leace import Leace
from palimpsest.intervene.erasers.leace_background import least_change
from palimpsest.intervene.erasers.splince import Splince
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene.concepts import LABELS, SAMPLE, assert_erased, states
from tests.intervene.conftest import copy_of, fact

SITE = Site(2, "residual")


def other(subject: str, true: str, relation: str = "food") -> Fact:
    return replace(fact(subject, true, None, "They say that {} eats"), relation=relation)


KEPT = tuple(other(f"{head}{end}", food) for head, food in (("Mar", "fish"), ("Sol", "bread"),
             ("Vin", "rice")) for end in ("a", "ek", "ino", "ust"))  # fmt: skip
ALONE = tuple(other(f"Q{n}", f"dish {n}", "dish") for n in range(3))
FACTS = replace(SAMPLE, kept=(*KEPT, *ALONE), others=KEPT[::2])
FOOD = concept(KEPT, 32).labels


@pytest.fixture(scope="module")
def double(llama: ModelHandle) -> ModelHandle:
    return copy_of(llama, torch.float64)


@pytest.fixture(scope="module")
def kept(double: ModelHandle) -> Tensor:
    return states_of(double, KEPT, [SITE], "last_prompt")[0]


def moved(erasure: Erasure, kept: Tensor) -> float:
    """Relative change of the kept cross-covariance."""
    before = cross_covariance(kept, FOOD)
    assert before.norm() > 1e-3
    return float((cross_covariance(erasure.erase(kept), FOOD) - before).norm() / before.norm())


def test_the_concept_goes_and_the_other_relation_stays(double: ModelHandle, kept: Tensor) -> None:
    before = states(double, SITE)
    erasure = Splince().fit(double, FACTS, SITE)
    assert_erased(before, erasure)
    assert torch.linalg.matrix_rank(erasure.proj_left @ erasure.proj_right) == LABELS.shape[1] - 1
    assert moved(erasure, kept) < 1e-9
    assert moved(Leace().fit(double, FACTS, SITE), kept) > 1e-3


def test_no_map_with_both_properties_changes_less(double: ModelHandle, kept: Tensor) -> None:
    """Any other one differs by a map that is zero on what is erased and on what is spared."""
    before = states(double, SITE)
    erasure = Splince().fit(double, FACTS, SITE)
    centred = before - before.mean(0)
    change = -erasure.proj_left @ erasure.proj_right
    fixed = torch.cat([cross_covariance(before, LABELS), cross_covariance(kept, FOOD)], 1)
    basis = torch.linalg.svd(fixed, full_matrices=False)[0][:, :4]
    free = torch.eye(32).double() - basis @ basis.T
    generator = torch.Generator().manual_seed(0)
    least = float((centred @ change.T).square().sum())
    for _ in range(50):
        step = torch.randn(32, 32, generator=generator, dtype=torch.float64) @ free
        assert (step @ fixed).norm() < 1e-9 * step.norm() * fixed.norm()
        for size in (1e-3, 0.1, 1.0):
            rival = change + size * step * change.norm() / step.norm()
            assert float((centred @ rival.T).square().sum()) > least


def test_sparing_a_relation_costs_more_than_leace_without_shrinkage(double: ModelHandle) -> None:
    before = states(double, SITE)
    centred = before - before.mean(0)
    cross = cross_covariance(before, LABELS)
    least = least_change(centred.T @ centred / len(before), cross, before.mean(0), 1e-9)
    found = Splince().fit(double, FACTS, SITE)
    moved = [float((r - before).square().sum()) for r in (least.of(before), found.erase(before))]
    assert moved[1] > moved[0]


def test_it_reports_how_far_the_others_moved(double: ModelHandle, kept: Tensor) -> None:
    found = Splince().fit(double, FACTS, SITE).diagnostics
    rows = {r.split: r for r in found if r.metric == "cross_covariance_moved"}
    assert rows["kept"].value == pytest.approx(0, abs=1e-9)
    assert rows["kept"].n == len(KEPT)
    assert rows["others"].value is not None
    assert rows["others"].value > 1e-6
    assert {row.relation for row in rows.values()} == {"food"}


@pytest.mark.parametrize(
    ("method", "kept", "message"),
    [
        (Splince(), (), "facts of another relation with two objects.*found none among 0"),
        (Splince(), ALONE, "facts of another relation.*found none among 3"),
        (Splince(keep="foot"), KEPT, r"intervene.keep.*\(food\).*'foot'.*did you mean 'food'"),
        (
            Splince(),
            tuple(replace(f, relation="same") for f in SAMPLE.fit),
            "not a combination of the kept ones",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(
    double: ModelHandle, method: Splince, kept: tuple[Fact, ...], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        method.fit(double, replace(SAMPLE, kept=kept), SITE)
