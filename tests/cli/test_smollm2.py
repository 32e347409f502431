"""The real model and real facts: ROME and LEACE do what their papers say they do."""

from statistics import fmean

import pytest

from palimpsest.cli import main
from palimpsest.record.results import load_runs

pytestmark = [pytest.mark.model, pytest.mark.slow]

SMALL = [
    "facts.limit=8",
    "facts.test=32",
    "facts.fit=96",
    "facts.probe=80",
    "facts.dev=0",
    "facts.others=12",
    "contexts=1",
    "evaluate=quick",
    "record=local",
]


METHODS = {
    "none": [],
    "rome": ["locate.depth=early", "intervene.moments.tokens=3000"],
    "leace": ["locate.depth=late"],
}


def mean(run, metric, protocol, **equal):
    return fmean(
        row.value for row in run.select(metric, protocol, **equal) if row.value is not None
    )


@pytest.fixture(scope="module")
def runs(smollm2_dir, tmp_path_factory):
    """None, ROME and LEACE on the same eight facts of the world."""
    home = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(home / "cache"))
        for name, words in METHODS.items():
            same = [f"intervene={name}", f"model.path={smollm2_dir}", f"record.dir={home / name}"]
            assert main(["run", *same, *words, *SMALL]) == 0
    return {name: load_runs(home / name)[0] for name in METHODS}


def test_rome_writes_the_new_object_and_keeps_the_neighbors(runs):
    before, after = runs["none"], runs["rome"]
    assert mean(before, "efficacy", "probability") <= 0.2
    assert mean(after, "efficacy", "probability") >= 0.9
    kept = mean(before, "neighborhood", "probability")
    assert mean(after, "neighborhood", "probability") >= 0.9 * kept


def test_the_probe_worked_before_leace_and_fails_more_often_after(runs):
    place = {"split": "test", "layer": 24, "position": "last_prompt"}
    before = mean(runs["none"], "probe_accuracy", "retrained", **place)
    after = mean(runs["leace"], "probe_accuracy", "retrained", **place)
    assert before >= 0.8
    assert after <= before - 0.1


def test_leace_is_exact_on_its_own_sample(runs):
    assert mean(runs["leace"], "residual_cross_covariance", "fit_sample") < 1e-9
