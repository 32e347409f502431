"""The study of erasers: layers compared by what tracing finds there and what erasing brings."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from palimpsest.record.results import Run, load_runs
from palimpsest.record.row import Row
from palimpsest.study.erasing import Agreement, Erasing, agreements, correlated
from palimpsest.study.intervals import STEADY
from tests.study.reading import csv_of, of, printed, write_report
from tests.study.test_localization import traced, written

LAYERS = (2, 4, 6, 8, 10)
FACTS = 12
PROTOCOL = "noise/mlp_window_10"
ASKED = {"facts": {"limit": FACTS}}


def held_out(read: float, said: float, elsewhere: float, scope: str = "relation") -> Iterator[Row]:
    """What is measured of fresh facts; probes of other layers and positions must not count."""
    for fact in range(FACTS):
        row = {"scope": scope, "fact_id": f"t{fact}", "relation": "r"}
        jitter = 0.01 * (fact - (FACTS - 1) / 2)
        for layer, position, value in (
            (29, "last_prompt", read + jitter),
            (29, "last_subject", 0.123),
            (3, "last_prompt", 0.456),
        ):
            yield Row(
                **row, axis="recoverability", metric="probe_accuracy", protocol="retrained",
                split="test", layer=layer, position=position, value=value,
            )  # fmt: skip
        for metric, split, value in (
            ("relation_accuracy", "test", said),
            ("other_accuracy", "others", elsewhere),
        ):
            yield Row(
                **row, axis="downstream", metric=metric, protocol="vocabulary", split=split,
                value=value - jitter,
            )  # fmt: skip


def erased(directory: Path, layer: int, rows: Sequence[Row], **fields: Any) -> Run:
    site = {"layer": layer, "part": "residual"}
    given = {"method": "leace", "config": ASKED, "site": site, **fields}
    return written(directory, f"{given['method']}{layer}", rows, **given)


@pytest.fixture
def sweep(tmp_path: Path) -> list[Run]:
    """Effects rise with the layer at the subject; so does what is read, and cost falls."""
    rows = [
        row
        for fact in range(FACTS)
        for row in traced(fact, 0.5, {n: 0.02 * n + 0.002 * fact for n in LAYERS})
    ]
    written(tmp_path, "trace", rows, method="trace", config={})
    other = {"facts": {"limit": 1000}}
    before = list(held_out(0.9, 0.9, 0.9, "fact"))
    written(tmp_path, "a-none", list(held_out(0.1, 0.1, 0.1, "fact")), method="none", config=other)
    written(tmp_path, "none", before, method="none", config=ASKED)
    for n in LAYERS:
        erased(tmp_path, n, list(held_out(0.9 - 0.05 * n, 0.7, 0.5 + 0.02 * n)))
        erased(tmp_path, n, before, method="leace_shuffled", imitates=f"leace{n}")
    return load_runs(tmp_path)


def found(runs: Sequence[Run], position: str, outcome: str) -> Agreement:
    [one] = [a for a in agreements(of(*runs)) if (a.position, a.outcome) == (position, outcome)]
    return one


def test_layers_are_ranked_by_what_was_planted(sweep: list[Run]) -> None:
    removed = found(sweep, "last_subject", "probe removed")
    assert removed.correlation.value == pytest.approx(1.0)
    assert removed.correlation.n == len(LAYERS)
    assert removed.p == pytest.approx(2 / 120)  # the order itself, and its reverse
    assert removed.outcomes == pytest.approx({n: 0.05 * n for n in LAYERS})
    assert removed.effects == pytest.approx({n: 0.02 * n + 0.011 for n in LAYERS})
    cost = found(sweep, "last_subject", "cost elsewhere")
    assert cost.correlation.value == pytest.approx(-1.0)


def test_what_does_not_vary_has_no_correlation(sweep: list[Run]) -> None:
    for position, outcome in (
        ("last_subject", "answers removed"),
        ("last_prompt", "probe removed"),
    ):
        flat = found(sweep, position, outcome)
        assert (flat.correlation.value, flat.p) == (None, None)
        assert flat.correlation.note == "the same value at every layer"


def test_controls_and_runs_of_other_facts_are_left_out(sweep: list[Run]) -> None:
    assert {each.method for each in agreements(of(*sweep))} == {"leace"}
    strangers = [run for run in sweep if run.run_id != "none"]
    assert agreements(of(*strangers)) == []


def test_too_few_layers_say_nothing(sweep: list[Run]) -> None:
    few = [run for run in sweep if run.run_id not in ("leace2", "leace4")]
    assert agreements(of(*few)) == []


def random_table(seed: int, layers: int) -> dict[int, Mapping[str, float]]:
    values = np.random.default_rng(seed).normal(size=(layers, FACTS))
    return {n: {f"f{i}": float(v) for i, v in enumerate(row)} for n, row in enumerate(values)}


@pytest.mark.parametrize("layers", [5, 9])
def test_the_correlation_is_scipys_and_p_its_permutation_test(layers: int) -> None:
    one, other = random_table(0, layers), random_table(1, layers)
    value, p = correlated(one, other)
    means = [[np.mean(list(table[n].values())) for n in range(layers)] for table in (one, other)]
    wanted = spearmanr(*means).statistic
    assert value.value == pytest.approx(wanted)
    assert value.low <= wanted <= value.high
    draws = np.random.default_rng(9)
    others = [spearmanr(means[0], draws.permutation(means[1])).statistic for _ in range(3000)]
    assert p == pytest.approx(np.mean(np.abs(others) >= abs(wanted) - 1e-9), abs=0.04)


def test_a_fact_that_lacks_a_layer_is_left_out() -> None:
    one, other = random_table(0, 5), random_table(1, 5)
    lacking = {n: dict(values) for n, values in one.items()}
    lacking[3].pop("f0")
    without = {n: {f: v for f, v in values.items() if f != "f0"} for n, values in one.items()}
    assert correlated(lacking, other) == correlated(without, other)


def test_under_the_null_p_is_below_a_twentieth_about_that_often() -> None:
    hits = [correlated(random_table(s, 6), random_table(s + 500, 6))[1] < 0.05 for s in range(120)]
    assert 0 <= np.mean(hits) <= 0.12


def test_every_view_shows_it(sweep: list[Run], tmp_path: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_of(Erasing().read(of(*sweep))))))
    whole = [line for line in lines if line["p"]]
    assert {(line["method"], line["layers"]) for line in whole} == {("leace", "5")}
    assert {line["layer"] for line in lines} == {"", *map(str, LAYERS)}
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Does localization tell where to erase?" in page
    assert (tmp_path / "erasing.csv").is_file()
    assert "probe removed" in printed(of(*sweep), 140)


def test_layers_that_every_resample_orders_alike_have_no_interval():
    """The bootstrap said 1.0 to 1.0 of five layers; p, over layers, is 2 of 120."""
    table = {layer: {f"f{n}": layer + n / 100 for n in range(20)} for layer in range(5)}
    found, p = correlated(table, table)
    assert (found.value, found.low, found.high) == (pytest.approx(1.0), None, None)
    assert found.note == STEADY
    assert p == pytest.approx(2 / 120)
