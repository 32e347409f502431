"""Estimates: facts are the unit, prompts are averaged first, intervals are reproducible."""

from itertools import count

import numpy as np
import pytest

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


def test_constant_samples_have_no_width(estimate):
    found = estimate([row(0.1, str(i)) for i in range(7)])
    assert (found.low, found.high) == (0.1, 0.1)
    assert found.value == pytest.approx(0.1)


def test_interval_of_one_relation_is_the_binomial_one():
    values = np.array([0.0, 1.0] * 12)
    low, high = interval(values, ("P36",) * 24)
    assert low == pytest.approx(7 / 24, abs=1 / 24)  # binomial quantiles: 7 and 17 of 24
    assert high == pytest.approx(17 / 24, abs=1 / 24)
    assert interval(values, ("P36",) * 24) == (low, high)


def test_below_ten_relations_facts_are_resampled_within_them():
    values = np.repeat([0.0, 1.0], 12)
    assert interval(values, ("P36",) * 12 + ("P37",) * 12) == (0.5, 0.5)


def test_from_ten_relations_on_whole_relations_are_resampled():
    values = np.repeat([0.0, 1.0] * 5, 20)
    names = tuple(f"P{i}" for i in range(10) for _ in range(20))
    low, high = interval(values, names)
    assert (low, high) == pytest.approx((0.2, 0.8), abs=0.1)  # ten units, not two hundred


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


def test_many_quantities_at_once_have_the_intervals_of_each():
    random = np.random.default_rng(0)
    values = np.vstack([random.random((6, 24)), np.full(24, 0.1)])
    relations = ("a", "b", "b") * 8
    for center in ("mean", "median"):
        wanted = [interval(row, relations, center) for row in values]
        np.testing.assert_allclose(intervals(values, relations, center), wanted, rtol=1e-12)
