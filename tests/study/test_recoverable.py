"""The index: what the strongest attack finds beyond chance, chosen on other facts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from palimpsest.record.results import Run
from palimpsest.record.row import IN_SAMPLE, UPSTREAM, Row
from palimpsest.study import recoverable as index
from palimpsest.study.intervals import Estimate
from palimpsest.study.recoverable import (
    FAMILIES,
    FITTED,
    ZONES,
    cross_fitted,
    families,
    profiles,
)
from tests.study.reading import of
from tests.study.test_localization import written

FACTS = [f"f{n:02}" for n in range(24)]
Hits = Mapping[str, float]


def attack(
    protocol: str, hits: Hits, chance: float, layer: int | None = None, note: str | None = None
) -> Iterator[Row]:
    position = None if layer is None else "last_prompt"
    for fact, hit in hits.items():
        row = {
            "scope": "fact", "axis": "recoverability", "split": "target", "fact_id": fact,
            "relation": "r", "protocol": protocol, "layer": layer, "position": position,
            "note": note,
        }  # fmt: skip
        for budget in (1, 20):
            found = hit if budget == 20 else 0.0
            yield Row(**row, metric="attack_success", budget=budget, value=found)
            yield Row(**row, metric="attack_baseline", budget=budget, value=chance)


def probe(
    hits: Hits, layer: int, note: str | None = None, protocol: str = "frozen"
) -> Iterator[Row]:
    for fact, hit in hits.items():
        yield Row(
            scope="fact", axis="recoverability", split="target", fact_id=fact, relation="r",
            metric="probe_accuracy", protocol=protocol, layer=layer, position="last_prompt",
            value=hit, note=note,
        )  # fmt: skip
    yield Row(
        scope="fact", axis="recoverability", split="target", metric="probe_baseline",
        protocol="majority", value=0.25, relation="r", n=len(FACTS),
    )  # fmt: skip


def run_of(directory: Path, *rows: Iterator[Row]) -> Run:
    flat = {row: None for some in rows for row in some}
    return written(directory.parent, directory.name, list(flat), method="rome")


def whole(run: Run) -> Estimate:
    return index.recoverable(of(run))[run.run_id]


def after(run: Run) -> Estimate:
    return index.recoverable_after(of(run))[run.run_id]


def weak(*lacking: str, layer: int = 3) -> Iterator[Row]:
    """An attack of each family that finds nothing, but of those that a test brings itself."""
    for protocol, place in (("frozen", layer), ("shadow", layer)):
        if protocol not in lacking:
            yield from probe(share(0.0), place, protocol=protocol)
    if "logit_lens" not in lacking:
        yield from attack("logit_lens", share(0.0), 0.0, layer)
    if "few_shot" not in lacking:
        yield from attack("few_shot", share(0.0), 0.0)


def profile(run: Run) -> dict[str, Estimate]:
    return profiles(of(run)).get(run.run_id, {})


def share(part: float) -> Hits:
    """Hits for so many of the facts, spread."""
    return {fact: float(n % 4 < part * 4) for n, fact in enumerate(FACTS)}


def test_the_strongest_attack_counts_beyond_its_own_chance(tmp_path: Path) -> None:
    found = whole(
        run_of(
            tmp_path,
            weak("few_shot"),
            attack("logit_lens", share(0.25), 0.0, layer=9),
            attack("few_shot", share(0.75), 0.25),
            attack("rephrasing", share(1.0), 1.0),  # finds whatever is asked for
        )
    )
    assert found.value == pytest.approx((0.75 - 0.25) / (1 - 0.25))
    assert found.n == 24
    assert found.place == "few_shot (of 1 frozen probes, 1 shadow probes, 2 lenses, 2 prompts)"
    assert found.low < found.value < found.high


def test_probes_count_beyond_the_most_common_object(tmp_path: Path) -> None:
    found = whole(run_of(tmp_path, weak("frozen"), probe(share(0.75), 6)))
    assert found.value == pytest.approx((0.75 - 0.25) / 0.75)
    assert found.place.startswith("frozen, layer 6, last_prompt (")


@pytest.mark.parametrize("protocol", ["shadow", "frozen_mlp"])
def test_the_best_place_may_be_a_probe_of_any_kind(tmp_path: Path, protocol: str) -> None:
    linear, other = probe(share(0.5), 6), probe(share(1.0), 9, protocol=protocol)
    found = whole(run_of(tmp_path, weak(), linear, other))
    assert found.value == 1.0
    assert found.place.startswith(f"{protocol}, layer 9, last_prompt (")


def test_probes_that_not_every_method_can_have_do_not_count(tmp_path: Path) -> None:
    rows = probe(share(1.0), 9, protocol="retrained")
    assert whole(run_of(tmp_path, weak(), rows)).value == 0.0


# -- facts are dropped, and not places -------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["frozen", "shadow", "logit_lens"])
def test_a_null_of_one_fact_drops_the_fact_and_is_counted(tmp_path: Path, protocol: str) -> None:
    """One lens or probe without a value once took all probes, or all lenses, out of the index."""
    hits = dict.fromkeys(FACTS[1:], 1.0)
    kind = attack(protocol, hits, 0.0, layer=9) if protocol == "logit_lens" else None
    found = whole(run_of(tmp_path, weak(), kind or probe(hits, 9, protocol=protocol)))
    assert (found.value, found.n) == (1.0, 23)
    assert found.note == "facts without a value at some place are left out: 1"
    assert f"{protocol}, layer 9" in found.place


def test_a_place_with_few_values_takes_no_facts_with_it(tmp_path: Path) -> None:
    few = attack("tuned_lens", dict.fromkeys(FACTS[:5], 1.0), 0.0, layer=9)
    found = whole(run_of(tmp_path, weak(), attack("logit_lens", share(0.5), 0.0, 6), few))
    assert (found.n, found.note) == (24, None)
    assert "2 lenses" in found.place


def test_a_family_with_values_for_few_facts_leaves_no_index(tmp_path: Path) -> None:
    few = probe(dict.fromkeys(FACTS[:5], 1.0), 9, protocol="shadow")
    found = whole(run_of(tmp_path, weak("shadow"), few))
    assert (found.value, found.note) == (None, "shadow probes: not measured")


@pytest.mark.parametrize(
    ("lacking", "family"),
    zip(("frozen", "shadow", "logit_lens", "few_shot"), FAMILIES, strict=True),
)
def test_a_family_that_was_not_measured_leaves_no_index(
    tmp_path: Path, lacking: str, family: str
) -> None:
    run = run_of(tmp_path, weak(lacking))
    assert (whole(run).value, whole(run).note) == (None, f"{family}: not measured")
    assert set(families(of(run))[run.run_id]) == {*FAMILIES} - {family}


def test_a_family_of_nulls_leaves_no_index_and_its_cause(tmp_path: Path) -> None:
    null = Row(
        scope="fact", axis="recoverability", split="target", fact_id="f00", relation="r",
        metric="probe_accuracy", protocol="shadow", value=None, n=0, note="too few subjects",
    )  # fmt: skip
    found = whole(run_of(tmp_path, weak("shadow"), iter([null])))
    assert (found.value, found.note) == (None, "shadow probes: too few subjects")


def test_other_budgets_lose_no_attack_in_silence(tmp_path: Path) -> None:
    rows = [row for row in weak() if row.budget != 20]
    found = whole(run_of(tmp_path, iter(rows)))
    told = "no attack at B = 20, only at 1"
    assert (found.value, found.note) == (None, f"lenses: {told}; prompts: {told}")


def test_facts_that_a_method_was_fitted_on_have_no_index(tmp_path: Path) -> None:
    rows = [replace(row, split=IN_SAMPLE) if row.split else row for row in weak()]
    found = whole(run_of(tmp_path, iter(rows)))
    assert (found.value, found.note) == (None, FITTED)


# -- the whole model, and what is after the change -------------------------------------------------


def test_the_whole_model_is_told_beside_what_is_after_the_change(tmp_path: Path) -> None:
    before = attack("logit_lens", share(1.0), 0.0, layer=1, note=UPSTREAM)
    later = attack("logit_lens", share(0.5), 0.0, layer=9)
    run = run_of(tmp_path, weak("logit_lens", layer=9), before, later)
    assert whole(run).value == 1.0
    assert after(run).value == pytest.approx(0.5)


def test_the_last_output_at_the_subject_is_read_by_nothing(tmp_path: Path) -> None:
    rows = [replace(row, position="last_subject") for row in probe(share(1.0), 9)]
    last = attack("logit_lens", share(0.0), 0.0, layer=9)
    assert whole(run_of(tmp_path, weak(), iter(rows), last)).value == 0.0


def test_without_a_change_all_states_count(tmp_path: Path) -> None:
    rows = [replace(r, note=UPSTREAM) if r.layer is not None else r for r in weak("logit_lens")]
    lens = attack("logit_lens", share(1.0), 0.0, layer=1, note=UPSTREAM)
    run = run_of(tmp_path, iter(rows), lens)
    assert whole(run).value == after(run).value == 1.0


# -- chosen on other facts -------------------------------------------------------------------------


def simulated(truth: float, places: int, runs: int = 200) -> np.ndarray:
    """Means over facts of what cross-fitting tells of independent places of the same truth."""
    random, owners = np.random.default_rng(0), ("r",) * 24
    means = []
    for _ in range(runs):
        table = (random.random((places, 24)) < truth).astype(float)
        chosen = cross_fitted(table, np.zeros(places), owners)
        means.append(table[chosen, np.arange(24)].mean())
    return np.array(means)


@pytest.mark.parametrize("truth", [0.2, 0.6, 0.9])
def test_being_the_best_of_many_gains_nothing(truth: float) -> None:
    """The best of 132 places on its own facts would be far above the truth."""
    means = simulated(truth, 132)
    assert means.mean() == pytest.approx(truth, abs=4 * means.std() / len(means) ** 0.5 + 0.002)


def test_no_fact_has_a_say_in_its_own_place() -> None:
    random, owners = np.random.default_rng(0), ("a", "b", "c") * 8
    table = (random.random((40, 24)) < 0.5).astype(float)
    chosen = cross_fitted(table, np.zeros(40), owners)
    for fact in range(24):
        other = table.copy()
        other[:, fact] = 1 - other[:, fact]
        assert (cross_fitted(other, np.zeros(40), owners)[:, fact] == chosen[:, fact]).all()


def test_each_relation_is_spread_over_the_folds() -> None:
    """The place of a fold is chosen on facts of every relation: one that knows b alone loses."""
    owners = ("a",) * 12 + ("b",) * 12
    knows_b = np.array([float(owner == "b") for owner in owners])
    table = np.stack([knows_b, np.full(24, 0.6)])
    assert set(cross_fitted(table, np.zeros(2), owners).ravel()) == {1}


def test_of_two_that_find_all_the_one_that_finds_little_by_chance_is_chosen() -> None:
    table = np.ones((2, 24))
    assert set(cross_fitted(table, np.array([0.95, 0.25]), ("r",) * 24).ravel()) == {1}


def test_what_finds_less_than_chance_is_zero(tmp_path: Path) -> None:
    rows = attack("logit_lens", share(0.0), 0.5, layer=9)
    assert whole(run_of(tmp_path, weak(), rows)).value == 0.0


def test_without_attacks_or_facts_there_is_no_index(tmp_path: Path) -> None:
    assert "frozen probes: not measured" in whole(run_of(tmp_path / "a")).note
    few = [row for row in weak() if row.fact_id is None or row.fact_id in FACTS[:4]]
    found = whole(run_of(tmp_path / "b", iter(few)))
    assert (found.value, found.note) == (None, "fewer than 6 facts with a value")


def test_the_profile_tells_zones_apart(tmp_path: Path) -> None:
    """Below the change all is as it was; at its site little is left, above all is back."""
    run = run_of(
        tmp_path,
        probe(share(1.0), 3, UPSTREAM),
        probe(share(0.25), 6),
        probe(share(1.0), 9),
        attack("few_shot", share(0.5), 0.0),
    )
    found = profile(run)
    assert list(found) == list(ZONES)
    values = [each.value for each in found.values()]
    assert values == pytest.approx([1.0, 0.0, 1.0, 0.5])
    assert found["at the site"].place.startswith("frozen, layer 6, last_prompt")


def test_an_unchanged_model_has_no_profile(tmp_path: Path) -> None:
    assert profile(run_of(tmp_path, probe(share(1.0), 3, UPSTREAM))) == {}
