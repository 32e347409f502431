"""The index: what the strongest attack finds beyond chance, chosen on other facts."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from palimpsest.record.results import Results, Run
from palimpsest.record.row import UPSTREAM, Row
from palimpsest.study.intervals import Estimate, resampling
from palimpsest.study.recoverable import (
    ZONES,
    optimism,
    profiles,
    readings,
    recoverable,
)
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
        protocol="majority", value=0.25, relation="r", n=len(hits),
    )  # fmt: skip


def run_of(directory: Path, *rows: Iterator[Row]) -> Run:
    flat = {row: None for some in rows for row in some}
    return written(directory, "run", list(flat), method="rome")


def index(run: Run) -> Estimate:
    """What is recoverable of one run."""
    return recoverable(Results.of([run]))[run.run_id]


def profile(run: Run) -> Mapping[str, Estimate]:
    return profiles(Results.of([run])).get(run.run_id, {})


def share(of: float) -> Hits:
    """Hits for so many of the facts, spread."""
    return {fact: float(n % 4 < of * 4) for n, fact in enumerate(FACTS)}


def test_the_strongest_attack_counts_beyond_its_own_chance(tmp_path: Path) -> None:
    found = index(
        run_of(
            tmp_path,
            attack("logit_lens", share(0.25), 0.0, layer=9),
            attack("few_shot", share(0.75), 0.5),
            attack("rephrasing", share(1.0), 1.0),  # finds whatever is asked for
        )
    )
    assert found.value == pytest.approx((0.75 - 0.5) / (1 - 0.5), abs=0.03)
    assert (found.n, found.place) == (24, "few_shot")
    assert found.low < found.value < found.high


def test_probes_count_beyond_the_most_common_object(tmp_path: Path) -> None:
    found = index(run_of(tmp_path, probe(share(0.75), 6)))
    assert found.value == pytest.approx((0.75 - 0.25) / 0.75)
    assert found.place == "frozen, layer 6, last_prompt"


@pytest.mark.parametrize("protocol", ["retrained", "adaptive", "frozen_mlp", "retrained_mlp"])
def test_the_best_place_may_be_a_probe_of_any_kind(tmp_path: Path, protocol: str) -> None:
    linear, other = probe(share(0.5), 6), probe(share(1.0), 9, protocol=protocol)
    found = index(run_of(tmp_path, linear, other))
    assert found.value == 1.0
    assert found.place == f"{protocol}, layer 9, last_prompt"


def test_states_before_the_change_do_not_count(tmp_path: Path) -> None:
    before = attack("logit_lens", share(1.0), 0.0, layer=1, note=UPSTREAM)
    after = attack("logit_lens", share(0.5), 0.0, layer=9)
    found = index(run_of(tmp_path, before, after))
    assert found.value == pytest.approx(0.5)


def test_without_a_change_all_states_count(tmp_path: Path) -> None:
    found = index(run_of(tmp_path, attack("logit_lens", share(1.0), 0.0, layer=1, note=UPSTREAM)))
    assert found.value == 1.0


def test_a_maximum_over_many_attacks_on_noise_is_no_discovery(tmp_path: Path) -> None:
    """Sixty attacks that hit by chance: the best on its own facts looks good, the index not."""
    draws = np.random.default_rng(0).random((60, 24)) < 0.2
    rows = [
        attack("logit_lens", dict(zip(FACTS, map(float, hits), strict=True)), 0.2, layer=layer)
        for layer, hits in enumerate(draws)
    ]
    run = run_of(tmp_path, *rows)
    best = max(reading.success.mean() for reading in readings(Results.of([run]))[run.run_id])
    assert (best - 0.2) / 0.8 > 0.15
    assert index(run).value < 0.1


def test_many_attacks_that_each_miss_other_facts_are_no_weaker_for_it(tmp_path: Path) -> None:
    """A place chosen on some facts and told of others would be the one that misses those."""
    rows = [
        attack("logit_lens", {f: float(n // 3 != layer) for n, f in enumerate(FACTS)}, 0.0, layer)
        for layer in range(8)
    ]
    found = index(run_of(tmp_path, *rows))
    assert 0.75 < found.value <= 0.875


def test_what_always_finds_has_no_optimism(tmp_path: Path) -> None:
    rows = [attack("logit_lens", share(1.0 if n == 5 else 0.75), 0.0, layer=n) for n in range(9)]
    assert index(run_of(tmp_path, *rows)).value == 1.0


def test_optimism_is_what_a_literal_bootstrap_says() -> None:
    table = np.random.default_rng(1).random((5, 12))
    relations = ("r",) * 12
    gains = []
    for weights in resampling(relations):
        picked = np.repeat(np.arange(12), weights.astype(int))
        means = [row[picked].mean() for row in table]
        best = int(np.argmax(means))
        gains.append(means[best] - table[best].mean())
    assert optimism(table, relations) == pytest.approx(np.mean(gains), rel=0.1)
    assert np.mean(gains) > 0.02
    assert optimism(table[:1], relations) == pytest.approx(0, abs=1e-9)


def test_what_finds_less_than_chance_is_zero(tmp_path: Path) -> None:
    found = index(run_of(tmp_path, attack("logit_lens", share(0.0), 0.5, layer=9)))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_without_attacks_or_facts_there_is_no_index(tmp_path: Path) -> None:
    assert index(run_of(tmp_path / "a")).note == "no attacks were measured"
    few = attack("logit_lens", dict.fromkeys(FACTS[:4], 1.0), 0.0, layer=9)
    assert index(run_of(tmp_path / "b", few)).note == "fewer than 6 facts with a value"


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
    assert found["downstream"].value == index(run).value
    assert found["at the site"].place == "frozen, layer 6, last_prompt"


def test_an_unchanged_model_has_no_profile(tmp_path: Path) -> None:
    assert profile(run_of(tmp_path, probe(share(1.0), 3, UPSTREAM))) == {}
