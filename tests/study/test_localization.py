"""The localization study: success as defined, matched fact by fact and layer by layer."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palimpsest.record.results import Results, Run, load_runs
from palimpsest.record.row import Row
from palimpsest.record.store import RunStore
from palimpsest.study.localization import (
    Localization,
    findings,
    restored_shares,
    success,
)
from tests.study.views import lines_of, listed, page_of

FACTS, LAYERS = 16, (2, 4, 6)
OBJECTIVES = ("inject", "erase")
PROTOCOL = "noise/mlp_window_10"


def written(directory: Path, name: str, rows: Sequence[Row], **fields: Any) -> Run:
    run = {
        "run_id": name, "model": {"fingerprint": "m"}, "facts": {"fingerprint": "f"}, "seed": 0,
        **fields,
    }  # fmt: skip
    store = RunStore.open(directory / name, run)
    store.append(rows)
    store.write_facts([])
    store.finish()
    return load_runs(directory / name)[0]


def chances(fact: int, old: float, new: float) -> Iterator[Row]:
    """Of two paraphrases, and of the fit prompt, which must not count."""
    for prompt, factor in (("paraphrase/0", 0.9), ("paraphrase/1", 1.1), ("fit", 0.0)):
        for metric, value in (("old_probability", old), ("new_probability", new)):
            yield Row(
                scope="fact", axis="downstream", metric=metric, protocol="string", split="target",
                fact_id=f"f{fact}", relation="r", prompt_id=prompt, value=value * factor,
            )  # fmt: skip


def traced(fact: int, total: float, effects: dict[int, float]) -> Iterator[Row]:
    row = {
        "scope": "fact", "axis": "localization", "split": "target", "fact_id": f"f{fact}",
        "relation": "r",
    }  # fmt: skip
    yield Row(**row, metric="total_effect", protocol="noise", value=total)
    for layer, value in effects.items():
        for position in ("last_subject", "token/3", "last_prompt"):
            yield Row(
                **row, metric="indirect_effect", protocol=PROTOCOL, layer=layer, position=position,
                value=value if position == "last_subject" else 0.77,
            )  # fmt: skip


@pytest.fixture
def shares() -> np.ndarray:
    """Restored shares `[facts, layers]`."""
    return np.random.default_rng(0).uniform(0, 1, size=(FACTS, len(LAYERS)))


@pytest.fixture
def sweep(tmp_path: Path, shares: np.ndarray) -> list[Run]:
    """Edits whose success is the share at their layer (inject), or the layer's alone (erase)."""
    directory = tmp_path / "localization"
    noise = np.random.default_rng(1).normal(0, 0.02, size=(FACTS, len(LAYERS)))
    rows = [
        row
        for fact in range(FACTS)
        for row in traced(fact, 0.5, dict(zip(LAYERS, 0.5 * shares[fact], strict=True)))
    ]
    rows += traced(99, 0.01, dict.fromkeys(LAYERS, 0.01))
    runs = [written(directory, "trace", rows, method="trace", config={})]
    before = [row for fact in range(FACTS) for row in chances(fact, 0.5, 0.0)]
    runs.append(written(directory, "none", before, method="none", config={"intervene": {}}))
    for objective in OBJECTIVES:
        for column, layer in enumerate(LAYERS):
            config = {"intervene": {"protocol": "independent", "search": {"objective": objective}}}
            after = []
            for fact in range(FACTS):
                share = shares[fact, column] if objective == "inject" else 0.3 + 0.1 * column
                reached = 0.9 * share + noise[fact, column]
                if objective == "inject":
                    after += chances(fact, 0.5, reached)
                else:
                    after += chances(fact, 0.5 * (1 - reached), 0.0)
            name = f"{objective}{layer}"
            site = {"layer": layer, "part": "mlp"}
            runs.append(written(directory, name, after, method="rome", config=config, site=site))
    return runs


def by_name(runs: Sequence[Run]) -> dict[str, Run]:
    return {run.run_id: run for run in runs}


def test_success_is_a_share_of_what_could_be_gained(tmp_path: Path) -> None:
    before = written(tmp_path, "a", list(chances(0, 0.5, 0.2)), method="none")
    after = written(tmp_path, "b", list(chances(0, 0.3, 0.6)), method="rome")
    written_share = np.mean([(0.6 * f - 0.2 * f) / (1 - 0.2 * f) for f in (0.9, 1.1)])
    both = Results.of([after, before])
    assert success(both, after, before, "inject") == {("f0", "r"): pytest.approx(written_share)}
    for objective in ("erase", "trace_reversal"):
        assert success(both, after, before, objective) == {("f0", "r"): pytest.approx(0.4)}
        assert success(both, before, after, objective) == {("f0", "r"): 0.0}  # it rose
    for objective in ("amplify", "force"):
        rise = np.mean([(0.5 * f - 0.3 * f) / (1 - 0.3 * f) for f in (0.9, 1.1)])
        assert success(both, before, after, objective) == {("f0", "r"): pytest.approx(rise)}


def test_shares_are_read_at_the_subject_and_small_effects_left_out(sweep: list[Run]) -> None:
    found, left_out = restored_shares(Results.of(sweep), [by_name(sweep)["trace"]], PROTOCOL)
    assert left_out == {"f99"}
    assert len(found) == FACTS * len(LAYERS)
    assert all(0 <= share <= 1 for share in found.values())


def test_an_effect_that_tells_of_success_is_found_and_another_is_not(sweep: list[Run]) -> None:
    erase, inject = findings(Results.of(sweep))
    assert [(f.method, f.objective, f.protocol) for f in (erase, inject)] == [
        ("rome", "erase", PROTOCOL), ("rome", "inject", PROTOCOL),
    ]  # fmt: skip
    assert inject.study is not None
    assert erase.study is not None
    assert inject.study.n_facts == FACTS
    assert inject.study.verdict == "adds"
    assert inject.study.effect.value > 0.9  # type: ignore[operator]
    assert min(e.value for e in inject.study.correlations.values()) > 0.9  # type: ignore[type-var]
    assert erase.study.verdict != "adds"
    assert erase.study.layer.value > 0.9  # type: ignore[operator]


def test_without_no_change_or_traces_or_a_second_layer_there_is_nothing(sweep: list[Run]) -> None:
    for left_out in ("none", "trace"):
        assert findings(Results.of([run for run in sweep if run.run_id != left_out])) == []
    few = [by_name(sweep)[name] for name in ("trace", "none", "inject2")]
    assert findings(Results.of(few)) == []


def test_other_models_and_batches_do_not_count(sweep: list[Run], tmp_path: Path) -> None:
    other = {"fingerprint": "another"}
    rows = list(traced(0, 0.5, dict.fromkeys(LAYERS, 0.1)))
    foreign = written(tmp_path, "x", rows, method="trace", config={}, model=other)
    rest = [run for run in sweep if run.run_id != "trace"]
    assert findings(Results.of([foreign, *rest])) == []
    for run in rest:
        if run.method == "rome":
            run.run["config"]["intervene"]["protocol"] = "batch"
    assert findings(Results.of(sweep)) == []


def test_too_few_facts_are_told(sweep: list[Run], tmp_path: Path) -> None:
    rows = list(traced(0, 0.5, dict.fromkeys(LAYERS, 0.1)))
    few = written(tmp_path, "y", rows, method="trace", config={})
    results = Results.of([few, *[run for run in sweep if run.run_id != "trace"]])
    found = findings(results)
    assert {f.note for f in found} == {"1 facts and 3 layers were both traced and edited"}
    assert all("both traced and edited" in line["note"] for line in listed(Localization(), results))


def test_every_view_tells_it(sweep: list[Run], tmp_path: Path) -> None:
    directory = tmp_path / "localization"
    assert "Does localization inform editing?" in page_of(directory, Localization())
    assert (directory / "localization.csv").is_file()
    lines = listed(Localization(), Results.of(sweep))
    assert {line["quantity"] for line in lines} >= {"r2_layer", "r2_effect", "rank_correlation"}
    assert {line["verdict"] for line in lines if line["objective"] == "inject"} == {"adds"}
    assert "beyond chance" in "\n".join(lines_of(directory, Localization(), width=140))
