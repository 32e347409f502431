"""LEACE: the theorems, on the states that the model really has; and what is not promised."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from concept_erasure import LeaceFitter, optimal_linear_shrinkage
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.erasers import leace
from palimpsest.intervene.erasers.eraser import concept, relative_cross_covariance
from palimpsest.intervene.erasers.leace import Leace, fit_leace
from palimpsest.model.forward import forward
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from palimpsest.model.tokens import collate
from tests.intervene.concepts import ENDINGS, PLACES, SAMPLE
from tests.intervene.conftest import ARCHITECTURES, copy_of, splits

LAYER = 2
PARTS = ("residual", "mlp", "attention", "attention_norm", "mlp_norm")
POSITIONS = ("last_subject", "last_prompt")

MAJORITY = 20 / len(PLACES)
CLASSES = np.array([sorted(ENDINGS.values()).index(f.true) for f in PLACES])


@pytest.fixture(scope="module")
def doubles(handles: dict[str, ModelHandle]) -> dict[str, ModelHandle]:
    """The tiny models in double precision."""
    return {kind: copy_of(handles[kind], torch.float64) for kind in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def double(request: pytest.FixtureRequest, doubles: dict[str, ModelHandle]) -> ModelHandle:
    """Each of them in turn."""
    return doubles[request.param]


def fit(
    handle: ModelHandle, facts: Splits = SAMPLE, part: str = "residual", **options: object
) -> Erasure:
    """LEACE at one site."""
    return Leace(part, **options).fit(handle, facts, Site(LAYER, part))


def site_module(handle: ModelHandle, part: str) -> torch.nn.Module:
    """The module whose output is the site, by its name."""
    if handle.model.config.model_type == "gpt2":
        block = handle.model.transformer.h[LAYER]
        return {
            "residual": block,
            "mlp": block.mlp.c_proj,
            "attention": block.attn,
            "attention_norm": block.ln_1,
            "mlp_norm": block.ln_2,
        }[part]
    block = handle.model.model.layers[LAYER]
    return {
        "residual": block,
        "mlp": block.mlp.down_proj,
        "attention": block.self_attn,
        "attention_norm": block.input_layernorm,
        "mlp_norm": block.post_attention_layernorm,
    }[part]


def at_site(handle: ModelHandle, facts: Sequence[Fact], part: str, position: str) -> Tensor:
    """States `[n, d_model]` that a hook of one's own sees, one prompt at a time."""
    found = []
    for each in facts:
        row = handle.encode(each.prompt)
        seen: list[Tensor] = []
        hook = site_module(handle, part).register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(
                output if isinstance(output, Tensor) else output[0]
            )
        )
        try:
            with torch.no_grad():
                forward(handle, collate([row], handle.device))
        finally:
            hook.remove()
        found.append(seen[0][0, row.at(position)])
    return torch.stack(found)


def cross_covariance(states: Tensor, classes: np.ndarray) -> Tensor:
    """Cov(x, z) `[d, k]` of states and one-hot classes."""
    hot = torch.eye(int(classes.max()) + 1, dtype=torch.float64)[classes]
    return (states - states.mean(0)).T.double() @ (hot - hot.mean(0)) / len(states)


def class_means(states: Tensor, classes: np.ndarray) -> Tensor:
    """Mean state of each class, `[k, d]`."""
    return torch.stack([states[classes == c].mean(0) for c in range(int(classes.max()) + 1)])


def probe(states: Tensor, classes: np.ndarray) -> float:
    """Accuracy of a linear probe on the sample that it is trained on."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=100.0, max_iter=2000))
    values = states.numpy()
    return float(model.fit(values, classes).score(values, classes))


# -- the guarantee, in the model -------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("position", POSITIONS)
def test_nothing_linear_is_left_on_the_fit_sample(
    double: ModelHandle, part: str, position: str
) -> None:
    eraser = fit(double, part=part, position=position)
    before = at_site(double, PLACES, part, position)
    assert probe(before, CLASSES) > 0.95
    with eraser.applied(double):
        after = at_site(double, PLACES, part, position)
    assert after.dtype == torch.float64
    left, there = (cross_covariance(x, CLASSES).norm() for x in (after, before))
    assert left < 1e-9 * there
    means = class_means(after, CLASSES)
    assert float((means - means.mean(0)).norm()) < 1e-9 * float(before.norm())
    assert probe(after, CLASSES) == pytest.approx(MAJORITY)


@pytest.mark.parametrize("part", PARTS)
def test_single_precision_leaves_only_rounding(model: ModelHandle, part: str) -> None:
    eraser = fit(model, part=part)
    before = at_site(model, PLACES, part, "last_prompt")
    with eraser.applied(model):
        after = at_site(model, PLACES, part, "last_prompt")
    left, there = (cross_covariance(x, CLASSES).norm() for x in (after, before))
    assert left < 1e-5 * there
    assert (after - before).norm() > 0.01 * before.norm()


def test_the_mean_stays_where_it_was(double: ModelHandle) -> None:
    before = at_site(double, PLACES, "residual", "last_prompt")
    torch.testing.assert_close(fit(double).erase(before).mean(0), before.mean(0))


@pytest.mark.parametrize("part", PARTS)
def test_erasing_twice_is_erasing_once(double: ModelHandle, part: str) -> None:
    eraser = fit(double, part=part)
    states = torch.randn(50, double.width, generator=torch.Generator().manual_seed(0)).double() * 9
    once = eraser.erase(states)
    assert not torch.allclose(once, states)
    torch.testing.assert_close(eraser.erase(once), once, rtol=1e-9, atol=1e-9)


def rank(eraser: Erasure) -> int:
    """Dimensions that are erased."""
    return int(torch.linalg.matrix_rank(eraser.proj_left @ eraser.proj_right))


def test_fewer_dimensions_are_erased_than_there_are_classes(double: ModelHandle) -> None:
    eraser = fit(double)
    assert rank(eraser) == len(ENDINGS) - 1
    (row,) = [row for row in eraser.diagnostics if row.metric == "rank"]
    assert row.value == rank(eraser)


def test_diagnostics_tell_sample_and_residual(double: ModelHandle) -> None:
    rows = fit(double).diagnostics
    found = {row.metric: row for row in rows if row.split == "fit"}
    assert 0 <= found["residual_cross_covariance"].value < 1e-9
    assert found["n_over_d"].value == len(PLACES) / double.width
    assert found["classes"].value == len(ENDINGS)
    assert {(row.n, row.layer, row.relation) for row in found.values()} == {(len(PLACES), 2, "L")}
    [fresh] = [row for row in rows if row.split == "test"]
    assert (fresh.value, fresh.n, fresh.protocol) == (None, 0, "held_out")


def test_fit_alone_leaves_the_targets_out(double: ModelHandle) -> None:
    apart = splits(PLACES[::6], tuple(f for i, f in enumerate(PLACES) if i % 6))
    alone = fit(double, apart)
    states = at_site(double, apart.fit, "residual", "last_prompt")
    torch.testing.assert_close(alone.bias, states.mean(0))
    everything = at_site(double, PLACES, "residual", "last_prompt")
    both = fit(double, apart, fit_on="target+fit")
    torch.testing.assert_close(both.bias, everything.mean(0))
    assert not torch.allclose(alone.bias, everything.mean(0))
    assert (alone.change.fitted_on, both.change.fitted_on) == (("fit",), ("target", "fit"))


def test_an_eraser_is_fitted_where_it_acts(double: ModelHandle) -> None:
    eraser = Leace("mlp").fit(double, SAMPLE, Site(LAYER))
    assert eraser.change.part == "mlp"
    assert torch.equal(eraser.bias, fit(double, part="mlp").bias)


def test_what_lies_below_the_site_is_untouched_and_what_lies_above_feels_it(
    model: ModelHandle,
) -> None:
    batch = collate([model.encode(f.prompt) for f in PLACES[:5]], model.device)
    eraser = fit(model)

    def final() -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        with model.hooked([(model.blocks[LAYER - 1], lambda state: seen.append(state))]):
            return forward(model, batch), seen[0]

    with torch.no_grad():
        last, below = final()
        with eraser.applied(model):
            erased_last, erased_below = final()
    assert torch.equal(below, erased_below)
    assert not torch.allclose(last, erased_last, atol=0.01)


# -- the guarantee, on numbers ---------------------------------------------------------------------


def gaussian(
    n: int, d: int, k: int, seed: int, spread: float = 1.5
) -> tuple[Tensor, np.ndarray, Callable[[int], tuple[Tensor, np.ndarray]]]:
    """Correlated Gaussian classes, and a function that draws fresh ones from the same."""
    generator = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(k, d, generator=generator, dtype=torch.float64)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) * d**-0.5

    def draw(count: int) -> tuple[Tensor, np.ndarray]:
        classes = np.arange(count) % k
        noise = torch.randn(count, d, generator=generator, dtype=torch.float64)
        return means[classes] + noise @ mix + 0.3 * noise + 5, classes

    return *draw(n), draw


def hot(classes: np.ndarray) -> Tensor:
    """One-hot labels."""
    return torch.eye(int(classes.max()) + 1, dtype=torch.float64)[classes]


def test_no_other_affine_map_that_erases_changes_less() -> None:
    states, classes, _ = gaussian(4000, 10, 4, seed=1)
    fitted = fit_leace(states, hot(classes), 1e-6)
    best = torch.eye(10, dtype=torch.float64) - fitted.left @ fitted.right
    centred = states - fitted.bias
    xcov = cross_covariance(states, classes)
    basis = torch.linalg.svd(xcov)[0][:, :3]  # the class means' directions
    blind = torch.eye(10, dtype=torch.float64) - basis @ basis.T  # what else erases, comes after it

    def cost(matrix: Tensor) -> float:
        assert (matrix @ xcov).norm() < 1e-9 * xcov.norm()
        return float((centred @ (matrix - torch.eye(10, dtype=torch.float64)).T).square().mean())

    assert cost(blind) > cost(best) * 1.01
    generator = torch.Generator().manual_seed(2)
    for scale in (1.0, 0.1, 0.03):
        for _ in range(50):
            noise = torch.randn(10, 10, generator=generator, dtype=torch.float64)
            assert cost(best + scale * noise @ blind) > cost(best)
    for _ in range(50):
        noise = torch.randn(10, 10, generator=generator, dtype=torch.float64)
        assert cost(noise @ blind) > cost(best)


def test_one_hot_labels_bring_every_pair_of_classes_together() -> None:
    states, classes, _ = gaussian(600, 12, 3, seed=3)
    scale = float(class_means(states, classes).std(0).norm())

    def gaps(labels: Tensor) -> list[float]:
        means = class_means(fit_leace(states, labels, 1e-6).of(states), classes)
        return [float((means[a] - means[b]).norm()) / scale for a, b in ((0, 1), (0, 2), (1, 2))]

    assert max(gaps(hot(classes))) < 1e-9
    assert max(gaps(torch.tensor(classes, dtype=torch.float64)[:, None])) > 0.1  # the trap


def test_labels_are_one_hot_true_objects() -> None:
    labels = concept(PLACES, 32).labels
    assert labels.dtype == torch.float64
    assert labels.tolist() == hot(CLASSES).tolist()


def test_a_fitted_eraser_is_not_the_fitters(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LeaceFitter] = []

    class Spy(LeaceFitter):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(leace, "LeaceFitter", Spy)
    states, classes, draw = gaussian(300, 8, 3, seed=4)
    fitted = fit_leace(states, hot(classes), 1e-6)
    own = (fitted.left, fitted.right, fitted.bias)
    before = [tensor.clone() for tensor in own]
    more, labels = draw(300)
    eraser = made[0].eraser
    made[0].update(more * 3, hot(labels))
    assert not torch.equal(made[0].mean_x, before[2])
    assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))
    parts = (eraser.proj_left, eraser.proj_right, eraser.bias)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(own, parts, strict=True))


@pytest.mark.parametrize("outlier", [1.0, 3000.0])
def test_many_rare_classes_and_outlying_dimensions_are_erased_too(outlier: float) -> None:
    states, classes, _ = gaussian(500, 64, 40, seed=5)
    states[:, 3] = states[:, 3] * 20 + outlier
    erased = fit_leace(states, hot(classes), 1e-6).of(states)
    assert relative_cross_covariance(states, erased, hot(classes)) < 1e-9


def test_relative_cross_covariance_is_what_it_says() -> None:
    states, classes, _ = gaussian(200, 6, 3, seed=6)
    assert relative_cross_covariance(states, states + 7, hot(classes)) == pytest.approx(1.0)
    assert relative_cross_covariance(states, states / 4, hot(classes)) == pytest.approx(0.25)


def test_an_incomplete_erasure_is_a_failure(
    gpt2: ModelHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match=r"cross-covariance below .*lower intervene.svd"):
        fit(gpt2, svd_tol=10.0)


# -- what is not promised --------------------------------------------------------------------------


def readable(states: Tensor, classes: np.ndarray) -> float:
    """Accuracy on one half of a least-squares classifier trained on the other half."""
    half = len(states) // 2
    ones = torch.ones(len(states), 1, dtype=torch.float64)
    design = torch.cat([states - states.mean(0), ones], 1)
    weights = torch.linalg.lstsq(design[:half], hot(classes)[:half]).solution
    return float(((design[half:] @ weights).argmax(1).numpy() == classes[half:]).mean())


def test_leakage_on_fresh_subjects_falls_with_n_over_d() -> None:
    d, k = 24, 4
    covariance, accuracy = np.zeros(4), np.zeros(4)
    for seed in range(20):
        states, classes, draw = gaussian(5 * d, d, k, seed)
        fresh, labels = draw(2000)
        for index, n in enumerate((d // 2, d, 2 * d, 5 * d)):
            eraser = fit_leace(states[:n], hot(classes[:n]), 1e-6)
            erased = eraser.of(fresh)
            covariance[index] += relative_cross_covariance(fresh, erased, hot(labels)) / 20
            accuracy[index] += readable(erased, labels) / 20
    assert (np.diff(covariance) < -0.01).all(), covariance
    assert (np.diff(accuracy) < -0.01).all(), accuracy
    assert accuracy[-1] > 1 / k + 0.02  # and is not gone yet


# -- the shuffled control --------------------------------------------------------------------------


def test_the_control_has_the_rank_and_whitening_and_spares_the_concept(
    double: ModelHandle,
) -> None:
    real, control = fit(double), fit(double, shuffled=True, seed=1)
    assert rank(control) == rank(real)
    assert torch.equal(control.bias, real.bias)
    states = at_site(double, PLACES, "residual", "last_prompt")
    centred = states - states.mean(0)
    sigma = optimal_linear_shrinkage(centred.T @ centred / len(states), len(states))
    for eraser in (real, control):  # both are whitened by sigma: R Σ Rᵀ = 1 and L = Σ Rᵀ
        kept = eraser.proj_right.norm(dim=1) > 0
        right, left = eraser.proj_right[kept], eraser.proj_left[:, kept]
        eye = torch.eye(len(right), dtype=torch.float64)
        torch.testing.assert_close(right @ sigma @ right.T, eye, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(left, sigma @ right.T, rtol=1e-6, atol=1e-6)
    assert probe(control.erase(states), CLASSES) > 0.9
    assert probe(real.erase(states), CLASSES) == pytest.approx(MAJORITY)


def test_the_control_is_seeded_and_names_what_it_imitates(double: ModelHandle) -> None:
    first, again, other = (fit(double, shuffled=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.proj_right, again.proj_right)
    assert not torch.allclose(first.proj_right, other.proj_right)
    assert Leace("mlp", shuffled=True, seed=3).imitates == Leace("mlp", seed=3)
    assert Leace().imitates is None


# -- requests that cannot be met -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (PLACES[:4], "at least two classes.*found 1 over 4 facts; raise facts.fit"),
        (
            (*PLACES, replace(PLACES[0], relation="P36")),
            r"facts of one relation.*found 2 \(L, P36.*facts.relations",
        ),
        (
            tuple(replace(PLACES[0], true=f"C{i}") for i in range(33)),
            "fewer classes than the model's 32 dimensions.*found 33; set intervene.rare=merge",
        ),
        (
            tuple(replace(PLACES[0], true=f"C{i}") for i in range(32)),
            "fewer classes than the model's 32 dimensions.*found 32; set intervene.rare=merge",
        ),
        (
            tuple(replace(PLACES[0], true=f"C{i}") for i in range(7)),
            "more subjects than classes.*found 7 subjects of 7 objects.*raise facts.fit",
        ),
    ],
)
def test_facts_that_cannot_be_erased_are_refused(
    gpt2: ModelHandle, facts: tuple[Fact, ...], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        fit(gpt2, splits((), facts))


def test_as_many_classes_as_fit_are_accepted() -> None:
    facts = tuple(replace(PLACES[0], true=f"C{i % 31}") for i in range(32))
    assert concept(facts, 32).labels.shape == (32, 31)


def test_states_that_are_not_finite_are_refused(gpt2: ModelHandle, empty_cache: Path) -> None:
    def ruined(states: torch.Tensor) -> torch.Tensor:
        return states.masked_fill(states == states.max(), torch.inf)

    message = r"finite states at layer 2, residual, found \d+ of 48 facts.*model.dtype=float32"
    with (
        gpt2.hooked([(gpt2.blocks[1], ruined)]),
        pytest.raises(RequestError, match=message),
    ):
        fit(gpt2, SAMPLE)


@pytest.mark.parametrize(
    ("options", "bare", "message"),
    [
        ({"position": "last_subject"}, "fit", r"last_subject, found 1 without \(first: .*land"),
        ({"policy": "last_subject"}, "target", "found none: it would erase nothing"),
    ],
)
def test_tokens_that_no_prompt_has_are_refused(
    gpt2: ModelHandle, options: dict[str, str], bare: str, message: str
) -> None:
    def without(facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
        return tuple(replace(f, prompt=replace(f.prompt, span=None)) for f in facts)

    some = (*without(SAMPLE.fit[:1]), *SAMPLE.fit[1:])
    changed = {"fit": some} if bare == "fit" else {"target": without(SAMPLE.target)}
    with pytest.raises(RequestError, match=message):
        Leace(**options).fit(gpt2, replace(SAMPLE, **changed), Site(2, "residual"))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"part": "residuals"}, "intervene.part.*residual, mlp, attention.*did you mean 'resid"),
        ({"position": "subject_last"}, "intervene.position.*last_subject, last_prompt, found 'su"),
        ({"policy": "al_but_sink"}, "intervene.policy.*all_but_sink, all, found.*did you mean"),
        ({"fit_on": "all"}, r"intervene.fit_on.*target\+fit, fit, found 'all'"),
    ],
)
def test_an_unknown_choice_is_refused(mistake: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Leace(**mistake)
