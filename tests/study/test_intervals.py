"""Estimates: facts are the unit, prompts are averaged first, intervals are reproducible."""

from itertools import count

import numpy as np
import pytest
from scipy.stats import binomtest, t

from benchmarks import simulate
from palimpsest.record.row import Row
from palimpsest.study.intervals import (
    Estimate,
    Sample,
    _medians,
    estimates,
    interval,
    intervals,
    resampling,
)
from palimpsest.study.samples import picked, samples
from tests.study.reading import of


def row(value, fact=None, relation="P36", **more) -> Row:
    about = {"scope": "fact", "axis": "downstream", "metric": "m", "protocol": "p"}
    return Row(**about, value=value, fact_id=fact, relation=relation, **more)


@pytest.fixture
def estimate(write_run):
    """The estimate of some rows, by way of a run's file."""
    runs = count()

    def made(rows, center="mean", place=None) -> Estimate:
        run = write_run(*rows, run_id=f"{next(runs):012d}")
        found = samples(of(run), picked("true"))
        empty = Sample(np.empty(0), (), ())
        sample = next(iter(found.values()), empty)
        return estimates({0: sample}, center, {0: place})[0]

    return made


def test_prompts_are_averaged_before_facts(estimate):
    rows = [row(1.0, "a", prompt_id=str(i)) for i in range(3)] + [row(0.0, "b")]
    found = estimate(rows)
    assert (found.value, found.n) == (0.5, 2)


def test_median_over_facts(estimate):
    rows = [
        row(v, f, prompt_id=str(v)) for v, f in ((1.0, "a"), (3.0, "a"), (50.0, "b"), (4.0, "c"))
    ]
    assert estimate(rows, "median").value == 4.0


# -- intervals -------------------------------------------------------------------------------------

ONE = ("P36",) * 24


def test_no_interval_is_a_point(estimate):
    """All facts alike: a share has Clopper and Pearson's interval, a number has none."""
    low, high = interval(np.ones(24), ONE, kind="share")
    assert (low, high) == (pytest.approx(0.025 ** (1 / 24)), 1.0)
    assert low == pytest.approx(0.858, abs=1e-3)
    assert interval(np.zeros(24), ONE, kind="share") == (0.0, pytest.approx(1 - low))
    same = interval(np.zeros(24), ONE, kind="difference")
    assert same == (pytest.approx(-same[1]), pytest.approx(0.1125, abs=1e-3))
    found = estimate([row(0.1, str(i)) for i in range(7)])
    assert (found.value, found.low, found.high) == (pytest.approx(0.1), None, None)


@pytest.mark.parametrize("hits", range(25))
def test_independent_hits_of_one_relation_have_clopper_and_pearsons_interval(hits):
    values = np.array([1.0] * hits + [0.0] * (24 - hits))
    exact = binomtest(hits, 24).proportion_ci(0.95, "exact")
    assert interval(values, ONE, kind="share") == pytest.approx((exact.low, exact.high))


def test_relations_that_differ_are_strata_below_ten():
    """What differs between relations and not within them is no uncertainty of their mean."""
    values = np.repeat([0.0, 1.0], 12) * 0.9 + 0.05
    narrow = interval(values, ("P36",) * 12 + ("P37",) * 12, kind="share", trials=240)
    wide = interval(values, ONE, kind="share", trials=240)
    assert narrow[1] - narrow[0] < 0.4 * (wide[1] - wide[0])


def test_more_prompts_a_fact_tell_no_more_than_they_can():
    """Facts whose prompts agree count once; prompts that are independent count each."""
    random = np.random.default_rng(0)
    prompts = (random.random((24, 5)) < 0.5).astype(float)
    independent = interval(prompts.mean(1), ONE, kind="share", trials=120)
    agreeing = interval(prompts[:, 0], ONE, kind="share", trials=120)
    assert independent[1] - independent[0] < 0.7 * (agreeing[1] - agreeing[0])
    assert agreeing == pytest.approx(interval(prompts[:, 0], ONE, kind="share"))


def test_paired_differences_are_narrower_than_two_intervals_apart():
    random = np.random.default_rng(0)
    one = (random.random(96) < 0.6).astype(float)
    other = np.where(random.random(96) < 0.9, one, 1 - one)
    ends = interval(one - other, ("r",) * 96, kind="difference")
    apart = [np.ptp(interval(each, ("r",) * 96, kind="share")) for each in (one, other)]
    assert ends[0] <= np.mean(one - other) <= ends[1]
    assert np.ptp(ends) < min(apart)


def test_a_number_of_one_relation_has_the_expanded_percentile_interval():
    """About as wide as by t, where the plain percentile interval is narrower by a tenth."""
    values = np.random.default_rng(0).normal(size=12)
    low, high = interval(values, ("P36",) * 12)
    exact = t.interval(0.95, 11, np.mean(values), np.std(values, ddof=1) / 12**0.5)
    assert high - low == pytest.approx(exact[1] - exact[0], rel=0.06)
    assert interval(values, ("P36",) * 12) == (low, high)


def test_numbers_below_ten_relations_are_resampled_within_them():
    values = np.repeat([0.0, 1.0], 12)
    assert interval(values, ("P36",) * 12 + ("P37",) * 12) == (None, None)
    values = values + np.random.default_rng(0).normal(scale=0.01, size=24)
    low, high = interval(values, ("P36",) * 12 + ("P37",) * 12)
    assert 0 < high - low < 0.02


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(
    ("p", "facts", "relations", "alike"),
    [
        (0.02, 12, 1, 0.0), (0.98, 24, 1, 0.0), (0.95, 24, 3, 0.1), (0.5, 12, 3, 0.0),
        (0.98, 96, 12, 0.3), (0.9, 384, 12, 0.3), (0.5, 120, 10, 0.1), (0.05, 24, 12, 0.0),
        (0.1, 384, 10, 0.3), (0.85, 384, 10, 0.3),
    ],
)  # fmt: skip
def test_intervals_of_shares_hold_the_truth(p, facts, relations, alike, equal):
    """The short form of `make simulate`; 4,000 samples have a standard error of .004 at .93."""
    world = simulate.World(p, facts, relations, alike, equal=equal)
    assert simulate.coverage(world, samples=4000, seed=1) >= 0.93 - 2 * (0.93 * 0.07 / 4000) ** 0.5


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(
    ("p", "changed", "facts", "relations", "alike"),
    [
        (0.5, 0.0, 24, 1, 0.0), (0.9, 0.1, 24, 3, 0.1), (0.7, 0.3, 96, 1, 0.0),
        (0.9, 0.02, 384, 10, 0.3), (0.98, 0.98, 384, 10, 0.3), (0.9, 0.3, 96, 12, 0.1),
    ],
)  # fmt: skip
def test_intervals_of_differences_hold_the_truth(p, changed, facts, relations, alike, equal):
    """Effects that differ between relations included: without a design effect .57 were held."""
    world = simulate.World(p, facts, relations, alike, equal=equal)
    held = simulate.paired_coverage(world, changed, samples=4000, seed=1)
    assert held >= 0.93 - 2 * (0.93 * 0.07 / 4000) ** 0.5


def test_from_ten_relations_on_whole_relations_are_resampled():
    values = np.repeat([0.0, 1.0] * 5, 20)
    names = tuple(f"P{i}" for i in range(10) for _ in range(20))
    for kind in ("share", "number"):
        low, high = interval(values, names, kind=kind)
        assert (low, high) == pytest.approx((0.15, 0.85), abs=0.1)  # ten units, not two hundred


def test_single_facts_of_few_relations_have_no_interval(estimate):
    assert interval(np.array([0.0, 1.0]), ("a", "b")) == (None, None)
    assert estimate([row(1.0, "a")]).low is None


def test_resamples_keep_each_relations_size():
    weights = resampling(("a", "b", "a", "b", "b"))
    assert (weights[:, [0, 2]].sum(axis=1) == 2).all()
    assert (weights.sum(axis=1) == 5).all()


def test_medians_of_resamples_equal_medians_of_the_repeated_values():
    values = np.array([5.0, 1.0, 9.0, 1.0, 4.0, 7.0])
    weights = resampling(("a",) * 6)[:200]
    wanted = [np.median(np.repeat(values, w.astype(int))) for w in weights]
    assert _medians(values, weights) == pytest.approx(wanted)


def test_aggregates_have_a_value_and_no_interval(estimate):
    found = estimate([row(2.0, n=1), row(5.0, n=3, relation="P37")])
    assert (found.value, found.low, found.n) == (4.25, None, 4)


def test_missing_values_tell_their_cause(estimate):
    assert estimate([]).note == "not measured"
    gone = [row(None, "a", note="no probe"), row(None, "b", note="no probe")]
    assert (estimate(gone).value, estimate(gone).note) == (None, "no probe")
    some = estimate([*gone[:1], row(1.0, "b"), row(0.0, "c")], place="layer 3")
    assert some.value == 0.5
    assert some.n == 2
    assert (some.note, some.place) == ("1 of 3 values missing: no probe", "layer 3")


@pytest.mark.parametrize("kind", ["share", "difference", "number"])
@pytest.mark.parametrize("center", ["mean", "median"])
def test_many_quantities_at_once_have_the_intervals_of_each(kind, center):
    random = np.random.default_rng(0)
    values, relations = random.random((6, 24)), ("a", "b", "b") * 8
    wanted = [interval(row, relations, center, kind) for row in values]
    np.testing.assert_allclose(intervals(values, relations, center, kind), wanted, rtol=1e-12)
