"""The localization study: per-layer moments equal dense least squares, and chance is known."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from palimpsest.study.intervals import RESAMPLES, resampling
from palimpsest.study.regression import (
    _SEED,
    PERMUTATIONS,
    Observation,
    _chance,
    _grid,
    _permuted,
    _samples,
    regress,
)

R2 = ("layer", "effect", "both", "both_additive", "increase", "increase_additive")


def observed(success, effect, relations=1) -> list[Observation]:
    """Of [facts, layers]; facts take turns in the relations."""
    return [
        Observation(f"f{fact:03}", f"P{fact % relations}", layer, float(value), float(traced))
        for fact, (values, effects) in enumerate(zip(success, effect, strict=True))
        for layer, (value, traced) in enumerate(zip(values, effects, strict=True))
    ]


def planted(facts, layers, slope, noise=1.0, seed=0):
    """Success = layer + slope · effect + noise: two times [facts, layers]."""
    generator = np.random.default_rng(seed)
    effect = generator.normal(size=(facts, layers))
    rest = noise * generator.normal(size=(facts, layers))
    return 0.5 * np.arange(layers) + slope * effect + rest, effect


def with_gaps() -> list[Observation]:
    """Twelve facts at four layers, unbalanced, with far-off layer means of the effect."""
    success, effect = planted(12, 4, 0.5)
    found = observed(success, effect + 100 * np.arange(4) ** 2, relations=3)
    return [each for index, each in enumerate(found) if index not in (1, 7, 22)]


def residual(design, success) -> float:
    coefficients = np.linalg.lstsq(design, success, rcond=None)[0]
    return float(np.sum((success - design @ coefficients) ** 2))


def dense(observations) -> dict[str, float]:
    """R² of every regression, and the F test's p, from full design matrices."""
    y = np.array([each.success for each in observations])
    x = np.array([each.effect for each in observations])
    layers = np.array([each.layer for each in observations])
    factor = np.stack([layers == layer for layer in sorted(set(layers))], axis=1).astype(float)
    counts = np.maximum(factor.sum(axis=0), 1)
    x_within = x - factor @ (x @ factor / counts)  # spans the same columns, better conditioned
    designs = {
        "layer": factor,
        "effect": np.stack([np.ones_like(x), x - x.mean()], axis=1),
        "both": np.hstack([factor, factor * x_within[:, None]]),
        "both_additive": np.hstack([factor, x_within[:, None]]),
    }
    rest = {name: residual(design, y) for name, design in designs.items()}
    total = float(np.sum((y - y.mean()) ** 2))
    r2 = {name: 1 - value / total for name, value in rest.items()}
    r2["increase"] = r2["both"] - r2["layer"]
    r2["increase_additive"] = r2["both_additive"] - r2["layer"]
    extra = np.linalg.matrix_rank(designs["both"]) - factor.shape[1]
    freedom = len(y) - factor.shape[1] - extra
    f = (rest["layer"] - rest["both"]) / extra / (rest["both"] / freedom)
    return {**r2, "p": float(stats.f.sf(f, extra, freedom))}


def repeated(observations, counts) -> list[Observation]:
    """Every fact as often as its count says, facts in order."""
    facts = sorted({each.fact_id for each in observations})
    times = dict(zip(facts, counts.astype(int), strict=True))
    return [each for each in observations for _ in range(times[each.fact_id])]


def test_r2_and_f_test_are_those_of_dense_least_squares():
    found, wanted = regress(with_gaps()), dense(with_gaps())
    for name in R2:
        assert getattr(found, name).value == pytest.approx(wanted[name], abs=1e-9)
    assert found.p == pytest.approx(wanted["p"])
    assert (found.n_facts, found.n_layers, found.n) == (12, 4, 45)


def test_intervals_are_those_of_refitting_every_resample():
    found, observations = regress(with_gaps()), with_gaps()
    weights = resampling(tuple(f"P{fact % 3}" for fact in range(12)))
    slow = [dense(repeated(observations, counts)) for counts in weights]
    for name in R2:
        wanted = np.quantile([each[name] for each in slow], [0.025, 0.975])
        estimate = getattr(found, name)
        assert (estimate.low, estimate.high) == pytest.approx(tuple(wanted), abs=1e-9)


def test_chance_is_the_mean_over_permutations_also_in_resamples():
    grid = _grid(with_gaps())
    samples = _samples(grid.relations)[:4]
    generator = np.random.default_rng(_SEED)
    slow = np.zeros(4)
    for _ in range(PERMUTATIONS):
        effect = _permuted(grid, generator).effect
        moved = [
            replace(each, effect=float(effect[int(each.fact_id[1:]), each.layer]))
            for each in with_gaps()
        ]
        for index, counts in enumerate(samples):
            again = repeated(moved, counts)
            y = np.array([each.success for each in again])
            slow[index] += dense(again)["increase"] * np.sum((y - y.mean()) ** 2)
    assert _chance(samples, grid) == pytest.approx(slow / PERMUTATIONS)


def test_chance_is_one_degree_of_freedom_for_each_slope():
    success, effect = planted(20, 30, 0.0)
    found = regress(observed(success, effect))
    assert found.chance == pytest.approx((1 - found.layer.value) / 19, rel=0.1)


def test_effects_that_explain_success_within_layers_add():
    found = regress(observed(*planted(30, 5, 0.5, noise=0.1)))
    assert found.verdict == "adds"
    assert found.both.value > 0.95
    assert found.increase.value == pytest.approx(found.both.value - found.layer.value)
    assert found.corrected.low > found.margin
    assert found.p < 1e-6
    assert "above the margin 0.03" in found.reason


def test_slopes_of_opposite_sign_add_only_with_a_slope_for_each_layer():
    _, effect = planted(30, 4, 0.0)
    found = regress(observed(effect * [1, -1, 1, -1], effect))
    assert found.both.value == pytest.approx(1)
    assert found.both_additive.value < 0.2


def test_noise_beside_layers_that_explain_all_adds_nothing_that_matters():
    found = regress(observed(*planted(40, 6, 0.0, noise=0.2)))
    assert found.verdict == "adds nothing that matters"
    assert found.layer.value > 0.9
    assert found.increase.value == pytest.approx(found.chance, abs=0.005)
    assert found.corrected.low < 0 < found.corrected.high < found.margin
    assert found.p > 0.01
    assert "below the margin 0.03" in found.reason


def test_the_margin_is_the_callers():
    observations = observed(*planted(40, 6, 0.0, noise=0.2))
    found = regress(observations, margin=1e-6)
    assert (found.verdict, found.margin) == ("undecided", 1e-6)
    assert "on both sides of the margin" in found.reason


def test_at_the_ceiling_nothing_is_decided():
    success, effect = planted(20, 5, 0.0)
    success = np.where(success < -0.8, 0.0, 1.0)
    found = regress(observed(success, effect))
    assert found.ceiling == np.mean(success >= 0.98) >= 0.9
    assert found.spread == pytest.approx(success.std())
    assert found.verdict == "undecided"
    assert "at the ceiling" in found.reason


def test_without_spread_nothing_is_decided():
    success, effect = planted(20, 5, 0.0, noise=0.1)
    found = regress(observed(0.5 + 0.001 * success, effect))
    assert (found.verdict, found.ceiling) == ("undecided", 0)
    assert "hardly varies" in found.reason


def test_constant_success_has_no_values():
    _, effect = planted(12, 3, 0.0)
    found = regress(observed(np.full((12, 3), 0.1), effect))
    assert {getattr(found, name).value for name in R2} == {None}
    assert found.layer.note == "the same success everywhere"
    assert (found.p, found.chance, found.corrected.value) == (None, None, None)
    assert found.verdict == "undecided"
    assert found.correlations[0].note == "the same success for all facts"


def test_a_layer_of_constant_effect_has_no_slope():
    success, effect = planted(15, 4, 0.5)
    effect[:, 2] = 0.1
    found, wanted = regress(observed(success, effect)), dense(observed(success, effect))
    assert found.both.value == pytest.approx(wanted["both"])
    assert found.p == pytest.approx(wanted["p"])  # three slopes, not four
    assert found.correlations[2].value is None
    assert found.correlations[2].note == "the same effect for all facts"


def test_constant_effects_decide_nothing():
    success, _ = planted(15, 4, 0.0)
    found = regress(observed(success, np.full((15, 4), 0.1)))
    assert (found.increase.value, found.effect.value, found.p) == (0, 0, None)
    assert found.verdict == "undecided"
    assert "effect is the same" in found.reason


def test_few_facts_decide_nothing():
    found = regress(observed(*planted(9, 5, 0.9, noise=0.1)))
    assert found.verdict == "undecided"
    assert found.reason.startswith("9 facts")


def test_correlations_are_spearmans_with_ties():
    generator = np.random.default_rng(0)
    effect = generator.integers(0, 6, size=(20, 3)).astype(float)
    success = effect + generator.integers(0, 6, size=(20, 3))
    found = regress(observed(success, effect)).correlations
    weights = resampling(("P0",) * 20).astype(int)
    for layer in range(3):
        x, y = effect[:, layer], success[:, layer]
        assert found[layer].value == pytest.approx(stats.spearmanr(x, y).statistic)
        assert (found[layer].n, found[layer].place) == (20, f"layer {layer}")
    again = [stats.spearmanr(np.repeat(x, w), np.repeat(y, w)).statistic for w in weights]
    wanted = tuple(np.quantile(again, [0.025, 0.975]))
    assert (found[2].low, found[2].high) == pytest.approx(wanted)


def test_order_and_repetition_do_not_matter():
    observations = with_gaps()
    shuffled = [observations[i] for i in np.random.default_rng(1).permutation(len(observations))]
    assert regress(observations) == regress(observations) == regress(shuffled)


def test_from_ten_relations_on_whole_relations_are_resampled():
    success, effect = planted(60, 4, 0.0, noise=0.2)
    success += np.random.default_rng(2).normal(size=10)[np.arange(60) % 10, None]
    one, ten = (regress(observed(success, effect, relations=n)) for n in (1, 10))
    assert ten.layer.value == pytest.approx(one.layer.value)
    assert ten.layer.high - ten.layer.low > 1.2 * (one.layer.high - one.layer.low)
    samples = _samples(tuple(f"P{fact % 10}" for fact in range(60)))
    assert samples.shape == (1 + RESAMPLES, 60)
    assert (samples[:, :10] == samples[:, 50:]).all()


def test_single_facts_of_few_relations_have_no_interval():
    found = regress(observed(*planted(9, 3, 0.5), relations=9))
    assert found.both.value is not None
    assert (found.both.low, found.correlations[0].low) == (None, None)


def test_what_cannot_be_regressed_is_refused():
    success, effect = planted(3, 2, 0.0)
    observations = observed(success, effect)
    assert regress(observations).n_facts == 3
    with pytest.raises(ValueError, match="at least 3 facts and 2 layers, found 2 and 2"):
        regress(observations[:4])
    with pytest.raises(ValueError, match="found 3 and 1"):
        regress(observations[::2])
    with pytest.raises(ValueError, match="found 0 and 0"):
        regress([])
    with pytest.raises(ValueError, match="found more: average them"):
        regress([*observations, observations[0]])
    with pytest.raises(ValueError, match=r"found Observation\(.*nan.*: leave it out"):
        regress([replace(observations[0], success=float("nan")), *observations[1:]])
