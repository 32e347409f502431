"""ROME: the batched search equals a literal one; joint deltas meet every equation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.editors.solving import Inverse
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.intervene.moments import GivenMoments
from palimpsest.model.forward import keys
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene import literal_rome
from tests.intervene.conftest import (
    CONTEXTS,
    ENDING,
    SPEAK,
    TARGETS,
    fact,
    relative,
    splits,
    values_of,
)

Moments = Callable[[ModelHandle], GivenMoments]

SHORT = ValueSearch(steps=10)

STOPPING = ValueSearch(steps=12, stop_below=6.0, weight_decay=0.1)
"""Some of `ENDING` come below 6 nats at different steps, others do not."""

CLAMPED = ValueSearch(steps=10, clamp=0.75)
"""Every δ comes to its bound."""


def fit(
    model: ModelHandle,
    moments: Moments,
    layer: int = 1,
    target: tuple[Fact, ...] = TARGETS,
    **options: object,
) -> WeightDeltas:
    """ROME with the contexts and moments that the literal one gets."""
    method = Rome(prefixes=GivenPrefixes(list(CONTEXTS)), moments=moments(model), **options)
    return method.fit(model, splits(target), Site(layer, "mlp"))


def literal(
    model: ModelHandle,
    moments: Moments,
    layer: int,
    variant: str,
    search: ValueSearch,
    target: tuple[Fact, ...] = TARGETS,
) -> list[literal_rome.Edit]:
    """The slow one, for each target."""
    matrix = moments(model).given[layer].double() if variant == "moments" else None
    return [literal_rome.edit(model, f, layer, CONTEXTS, matrix, search) for f in target]


def assert_equal(deltas: WeightDeltas, expected: list[literal_rome.Edit]) -> None:
    """Every fact's ΔW and final loss."""
    errors = [relative(deltas.matrix(i), edit.change) for i, edit in enumerate(expected)]
    assert max(errors) < 1e-4, errors
    assert values_of(deltas, "value_loss") == pytest.approx([e.loss for e in expected], rel=1e-4)


# -- one batch equals one fact at a time -----------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "variant", "search"),
    [(0, "moments", SHORT), (1, "moments", ValueSearch()), (2, "plain", SHORT)],
)
def test_a_batch_of_facts_is_fitted_like_the_literal_rome(
    model: ModelHandle, moments: Moments, layer: int, variant: str, search: ValueSearch
) -> None:
    expected = literal(model, moments, layer, variant, search)
    assert_equal(fit(model, moments, layer, variant=variant, search=search), expected)


@pytest.mark.parametrize("variant", ["moments", "plain"])
def test_the_last_layer_is_fitted_like_the_literal_rome(
    model: ModelHandle, moments: Moments, variant: str
) -> None:
    expected = literal(model, moments, 3, variant, SHORT, ENDING)
    assert_equal(fit(model, moments, 3, ENDING, variant=variant, search=SHORT), expected)


def test_each_fact_stops_at_its_own_step(model: ModelHandle, moments: Moments) -> None:
    expected = literal(model, moments, 1, "moments", STOPPING, ENDING)
    stops = [edit.evaluations for edit in expected if edit.stopped_early]
    assert len(set(stops)) > 1
    assert len(stops) < len(expected)
    assert_equal(fit(model, moments, 1, ENDING, search=STOPPING), expected)


def test_delta_is_projected_to_its_bound(model: ModelHandle, moments: Moments) -> None:
    expected = literal(model, moments, 1, "moments", CLAMPED)
    assert any(edit.clamped for edit in expected)
    deltas = fit(model, moments, search=CLAMPED)
    assert_equal(deltas, expected)
    start = keys(model, [model.encode(f.prompt) for f in TARGETS], 1)[1]
    assert (deltas.right[:, 0].norm(dim=1) <= CLAMPED.clamp * start.norm(dim=1) * (1 + 1e-6)).all()


def test_a_fact_that_needs_no_search_keeps_a_delta_of_zero(
    gpt2: ModelHandle, moments: Moments
) -> None:
    deltas = fit(gpt2, moments, search=replace(SHORT, stop_below=1e9))
    assert not deltas.right.any()


def test_a_fact_goes_the_same_way_alone_and_in_company(
    model: ModelHandle, moments: Moments
) -> None:
    together = fit(model, moments, search=SHORT)
    for index in (1, 4):
        alone = fit(model, moments, target=TARGETS[index : index + 1], search=SHORT)
        assert relative(alone.matrix(0), together.matrix(index)) < 1e-4


def test_the_search_lowers_the_loss(model: ModelHandle, moments: Moments) -> None:
    losses = []
    for steps in (1, 20):
        deltas = fit(model, moments, 1, ENDING, search=ValueSearch(steps, weight_decay=0.0))
        losses.append(values_of(deltas, "value_loss"))
    assert all(after < before - 0.1 for before, after in zip(*losses, strict=True))


def test_what_was_searched_once_is_not_searched_again(
    gpt2: ModelHandle, moments: Moments, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit(gpt2, moments, search=SHORT)
    with monkeypatch.context() as patch:
        patch.delattr(ValueSearch, "optimise")
        again = fit(gpt2, moments, search=SHORT)
        with pytest.raises(AttributeError, match="optimise"):
            fit(gpt2, moments, search=replace(SHORT, lr=0.4))
    assert torch.equal(first.right, again.right)


def test_sampled_contexts_and_moments_serve_by_default(model: ModelHandle) -> None:
    method = Rome(search=replace(SHORT, steps=2))
    deltas = method.fit(model, splits(TARGETS[:2]), Site(1, "mlp"))
    assert deltas.left.isfinite().all()
    assert deltas.right.any()


# -- the equation ----------------------------------------------------------------------------------


def bare_keys(model: ModelHandle, target: tuple[Fact, ...], layer: int = 1) -> Tensor:
    """k of each fact, `[F, d_mlp]`."""
    return keys(model, [model.encode(f.prompt) for f in target], layer)[0]


def searched(model: ModelHandle, target: tuple[Fact, ...], layer: int = 1) -> Tensor:
    """δ of each fact, `[F, d_model]`."""
    return SHORT.find(model, target, Site(layer, "mlp"), CONTEXTS).delta


@pytest.mark.parametrize("variant", ["moments", "plain"])
def test_a_delta_turns_its_key_into_the_value_found(
    model: ModelHandle, moments: Moments, variant: str
) -> None:
    deltas = fit(model, moments, variant=variant, search=SHORT)
    delta = searched(model, TARGETS)
    for index, key in enumerate(bare_keys(model, TARGETS)):
        torch.testing.assert_close(deltas.matrix(index) @ key, delta[index], rtol=1e-4, atol=1e-5)


def test_the_variants_differ_in_the_direction_alone(model: ModelHandle, moments: Moments) -> None:
    with_moments, plain = (
        fit(model, moments, variant=variant, search=SHORT) for variant in ("moments", "plain")
    )
    assert torch.equal(with_moments.right, plain.right)
    cosine = torch.cosine_similarity(with_moments.left[:, 0], plain.left[:, 0])
    assert (cosine < 0.9).all()


@pytest.mark.parametrize("variant", ["moments", "plain"])
def test_one_joint_delta_meets_every_facts_equation(
    model: ModelHandle, moments: Moments, variant: str
) -> None:
    joint = fit(model, moments, protocol="batch", variant=variant, search=SHORT)
    assert not joint.change.independent
    assert joint.left.shape[:2] == joint.right.shape[:2] == (1, len(TARGETS))
    found = bare_keys(model, TARGETS) @ joint.matrix(0).T
    torch.testing.assert_close(found, searched(model, TARGETS), rtol=1e-4, atol=1e-4)


def test_a_joint_delta_of_one_fact_is_rome(model: ModelHandle, moments: Moments) -> None:
    for target in (TARGETS[:1], TARGETS[2:3]):
        joint, single = (
            fit(model, moments, target=target, protocol=protocol, search=SHORT)
            for protocol in ("batch", "independent")
        )
        assert relative(joint.matrix(0), single.matrix(0)) < 1e-6


def test_a_joint_delta_is_not_a_sum_of_single_ones(model: ModelHandle, moments: Moments) -> None:
    joint = fit(model, moments, protocol="batch", search=SHORT)
    single = fit(model, moments, search=SHORT)
    total = sum(single.matrix(i) for i in range(len(TARGETS)))
    assert relative(joint.matrix(0), total) > 0.01


@pytest.mark.parametrize("variant", ["moments", "plain"])
@pytest.mark.parametrize(
    "template",
    [
        SPEAK,
        "The people of {} say it is",
        "The people of {} are in the north, and the language of the people there is",
    ],
)
def test_facts_that_share_a_key_have_no_joint_delta(
    model: ModelHandle, moments: Moments, variant: str, template: str
) -> None:
    twice = (*TARGETS, fact(TARGETS[0].subject, "French", "Italian", template))
    with pytest.raises(RequestError, match=r"keys are linearly.*over 6 facts.*drop"):
        fit(model, moments, target=twice, protocol="batch", variant=variant, search=SHORT)
    assert len(fit(model, moments, target=twice, variant=variant, search=SHORT).left) == 6


def test_the_multiplier_at_position_0_is_recorded(llama: ModelHandle, moments: Moments) -> None:
    deltas = fit(llama, moments, search=SHORT)
    newline = llama.encode(Prompt("sink", "x"))
    sink = keys(llama, [replace(newline, subject=(0, 0))], 1)[0][0]
    expected = (deltas.left[:, 0] @ sink).tolist()
    assert values_of(deltas, "sink_multiplier") == pytest.approx(expected, rel=1e-4)


# -- requests that cannot be met -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"variant": "momnets"}, "intervene.variant.*moments, plain.*'momnets'.*did you mean"),
        ({"protocol": "joint"}, "intervene.protocol.*independent, batch.*'joint'"),
    ],
)
def test_an_unknown_choice_is_refused(mistake: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Rome(**mistake)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (replace(TARGETS[0], new=None), "without a new object"),
        (replace(TARGETS[0], new=""), "without a new object"),
        (
            replace(TARGETS[0], prompt=Prompt("fit", "They speak")),
            "without a subject in its prompt",
        ),
    ],
)
def test_a_fact_that_cannot_be_edited_is_named(
    gpt2: ModelHandle, moments: Moments, broken: Fact, message: str
) -> None:
    with pytest.raises(RequestError, match=f"found fact {broken.id} {message}"):
        fit(gpt2, moments, target=(*TARGETS, broken))


@pytest.mark.parametrize("missing", [1, 2, 64, 127])
def test_singular_moments_name_the_tokens_needed(missing: int) -> None:
    generator = torch.Generator().manual_seed(missing)
    samples = torch.randn(128 - missing, 128, generator=generator, dtype=torch.float64)
    with pytest.raises(RequestError, match=r"full rank 128.*moments.tokens to at least 1280"):
        Inverse.of(samples.T @ samples)


def test_a_solution_solves() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(400, 128, generator=generator, dtype=torch.float64)
    samples *= torch.logspace(-4, 4, 128, dtype=torch.float64)  # badly scaled is not singular
    moments, rows = samples.T @ samples / 400, samples[:3]
    torch.testing.assert_close(Inverse.of(moments.clone()).apply(rows) @ moments, rows)


def test_a_factor_takes_the_place_of_its_matrix() -> None:
    samples = torch.randn(400, 128, generator=torch.Generator().manual_seed(0)).double()
    moments = samples.T @ samples
    expected = torch.linalg.cholesky(moments)
    factor = Inverse.of(moments).factor
    assert factor.data_ptr() == moments.data_ptr()
    torch.testing.assert_close(factor, expected)
