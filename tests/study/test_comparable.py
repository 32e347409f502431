"""One rule says which runs, and which values, may be compared."""

from pathlib import Path

import pytest

from palimpsest.record.results import Results, Run, load_runs
from palimpsest.record.row import Row
from palimpsest.record.store import RunStore
from palimpsest.study.against import contrasts
from palimpsest.study.comparable import alike, asked, chosen_keys, compared, shown_keys
from palimpsest.study.recoverable import UNLIKE
from palimpsest.study.summary import summarise
from tests.study.reading import of, write_report
from tests.study.test_recoverable import attack, weak

KEY = "downstream/paraphrase/probability"
INDEX = "recoverability/recoverable/model"


def said(value: float) -> list[Row]:
    return [
        Row(
            scope="fact", axis="downstream", metric="paraphrase", protocol="probability",
            split="target", fact_id=f"f{n:02}", relation="r", prompt_id="paraphrase/0",
            value=float(n < value * 12),
        )
        for n in range(12)
    ]  # fmt: skip


def begun(directory: Path, name: str, **by_key: float) -> RunStore:
    run = {"run_id": name, "method": name, "model": {"fingerprint": "m"}, "seed": 0}
    store = RunStore.open(directory / name, run)
    for key, value in by_key.items():
        store.append(said(value), measure="downstream", measure_key=key)
    return store


def measured(directory: Path, name: str, **by_key: float) -> Run:
    """A run whose paraphrases were measured under some keys."""
    begun(directory, name, **by_key).finish()
    return load_runs(directory / name)[0]


def tried(directory: Path, name: str, key: str, found: float, **by_key: float) -> None:
    """A run that was attacked too, under a key; the attack finds a share of the objects."""
    store = begun(directory, name, **by_key)
    hits = {f"f{n:02}": float(n < found * 12) for n in range(12)}
    rows = [*weak("few_shot"), *attack("few_shot", hits, 0.0)]
    rows = [r for r in dict.fromkeys(rows) if r.fact_id is None or r.fact_id in hits]
    store.append(rows, measure="attacks", measure_key=key)
    store.finish()


def test_the_key_that_most_runs_share_is_chosen() -> None:
    rows = [("a", "m", "k1", 5), ("b", "m", "k1", 5), ("b", "m", "k0", 90), ("c", "m", "k0", 1)]
    assert chosen_keys([*rows, ("d", "m", "k1", 1)]) == {"m": "k1"}
    assert chosen_keys(rows) == {"m": "k0"}  # of as many runs, the one with most rows
    assert chosen_keys([("a", "m", "k2", 5), ("b", "m", "k1", 5)]) == {"m": "k1"}
    assert shown_keys([*rows, ("d", "m", "k9", 1), ("d", "m", "k8", 1)]) == {
        ("a", "m"): "k1", ("b", "m"): "k0", ("c", "m"): "k0", ("d", "m"): "k8",
    }  # fmt: skip


def test_a_run_measured_further_counts_once(tmp_path: Path) -> None:
    measured(tmp_path, "rome", old=0.25, new=0.75)
    measured(tmp_path, "memit", new=0.5)
    results = Results.open(tmp_path)
    compared(results)
    assert results.query("SELECT count(*) FROM rows") == [(36,)]
    assert results.query("SELECT count(*), bool_and(alike) FROM compared") == [(24, True)]
    found = {s.method: s.values[KEY].value for s in summarise(results)}
    assert found == {"rome": 0.75, "memit": 0.5}


def test_what_was_measured_otherwise_is_told_and_left_out_sharepairs(tmp_path: Path) -> None:
    measured(tmp_path, "rome", new=0.75)
    measured(tmp_path, "memit", new=0.5)
    measured(tmp_path, "emmet", old=0.25)
    results = Results.open(tmp_path)
    found = {summary.method: summary.values[KEY] for summary in summarise(results)}
    assert found["emmet"].value == 0.25
    assert "measured differently from most runs here (downstream)" in str(found["emmet"].note)
    assert (found["rome"].note, found["memit"].note) == (None, None)
    lines = {line.summary.method: line.values[KEY] for line in contrasts(results, "rome").lines}
    assert lines["memit"].value == pytest.approx(-0.25)
    assert (lines["emmet"].value, lines["emmet"].note) == (None, UNLIKE)
    assert "<li>measured differently" in write_report(tmp_path).read_text()


def test_what_was_measured_otherwise_is_no_reference_either(tmp_path: Path) -> None:
    for name, key, value in (("rome", "new", 0.75), ("memit", "new", 0.5), ("emmet", "old", 0.25)):
        measured(tmp_path, name, **{key: value})
    for line in contrasts(Results.open(tmp_path), "emmet").lines:
        assert (line.values[KEY].value, line.values[KEY].note) == (None, UNLIKE)


def test_an_index_shareother_attacks_has_a_note_and_no_pair(tmp_path: Path) -> None:
    for name, key, share in (("rome", "k1", 0.5), ("memit", "k1", 0.75), ("emmet", "k2", 1.0)):
        tried(tmp_path, name, key, share)
    results = Results.open(tmp_path)
    notes = {summary.method: summary.values[INDEX].note for summary in summarise(results)}
    assert notes == {"rome": None, "memit": None, "emmet": UNLIKE}
    lines = {line.summary.method: line.values[INDEX] for line in contrasts(results, "rome").lines}
    assert lines["memit"].value == pytest.approx(0.25)
    assert (lines["emmet"].value, lines["emmet"].note) == (None, UNLIKE)


def test_another_key_shareone_measure_leaves_the_others_comparable(tmp_path: Path) -> None:
    tried(tmp_path, "rome", "k1", 0.5, new=0.75)
    tried(tmp_path, "memit", "k1", 0.75, old=0.5)
    measured(tmp_path, "emmet", new=0.25)
    [line] = [
        line
        for line in contrasts(Results.open(tmp_path), "rome").lines
        if line.summary.method == "memit"
    ]
    assert line.values[INDEX].value == pytest.approx(0.25)
    assert line.values[KEY].note == UNLIKE


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"fingerprint": "other"}},
        {"config": {"model": {"prefix": "x"}}},
        {"facts": {"fingerprint": "other"}},
        {"config": {"facts": {"test": 9}}},
        {"seed": 1},
    ],
)
def test_runs_that_were_asked_something_else_are_not_alike(change: dict, write_run) -> None:
    one = write_run(*said(0.5), model={"fingerprint": "m"}, seed=0)
    other = write_run(
        *said(0.5), run_id="1" * 12, **{"model": {"fingerprint": "m"}, "seed": 0, **change}
    )
    assert asked(one) != asked(other)
    assert alike(of(one, other), one) == {one.run_id}


def test_rulers_paths_and_methods_do_not_tell_runs_apart(write_run) -> None:
    settings = {"facts": {"path": "here"}, "evaluate": {"stride": 1}, "intervene": {"steps": 2}}
    one = write_run(*said(0.5), config=settings)
    other = write_run(*said(0.2), run_id="1" * 12, config={"facts": {"path": "there"}})
    fewer = write_run(*said(0.5)[1:], run_id="2" * 12, config=settings)
    assert alike(of(one, other, fewer), one) == {one.run_id, other.run_id}
