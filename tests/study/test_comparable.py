"""Values are compared only if they were measured alike, and what is not is told."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from palimpsest.record.results import Results, Run, load_runs
from palimpsest.record.row import Row
from palimpsest.record.store import RunStore
from palimpsest.study.against import differences
from palimpsest.study.comparable import chosen_keys, compared, shown_keys
from palimpsest.study.headline import table
from palimpsest.study.recoverable import UNLIKE
from palimpsest.study.summary import Summary, summarise
from tests.study.test_recoverable import FACTS, attack, share

PARAPHRASE = "downstream/paraphrase/probability"
INDEX = "recoverability/recoverable/index"
FOOTNOTE = "measured differently from most runs here (downstream): not comparable with theirs"

Measured = Callable[..., Run]


def said(of: float) -> Iterator[Row]:
    for fact, value in share(of).items():
        yield Row(
            scope="fact", axis="downstream", metric="paraphrase", protocol="probability",
            split="target", fact_id=fact, relation="r", prompt_id="paraphrase/0", value=value,
        )  # fmt: skip


@pytest.fixture
def measured(tmp_path: Path) -> Measured:
    """Write a run of a method, with the rows of each measure and key."""

    def write(run_id: str, *taken: tuple[str, str, Iterator[Row]]) -> Run:
        about = {"run_id": run_id, "method": f"method_{run_id}", "seed": 0}
        store = RunStore.open(tmp_path / run_id, about)
        for measure, key, rows in taken:
            store.append(rows, None, measure, key)
        store.finish()
        return load_runs(tmp_path / run_id)[0]

    return write


def by_run(results: Results) -> dict[str, Summary]:
    return {summary.run.run_id: summary for summary in summarise(results)}


# -- which key -------------------------------------------------------------------------------------


def test_the_key_of_most_runs_is_chosen_whatever_rows_it_has() -> None:
    found = [("a", "m", "k1", 5), ("b", "m", "k1", 5), ("c", "m", "k2", 900)]
    assert chosen_keys(found) == {"m": "k1"}


def test_of_keys_of_as_many_runs_the_one_with_most_rows_is_chosen_then_the_smallest() -> None:
    assert chosen_keys([("a", "m", "k1", 5), ("b", "m", "k2", 6)]) == {"m": "k2"}
    assert chosen_keys([("a", "m", "k2", 5), ("b", "m", "k1", 5)]) == {"m": "k1"}


def test_each_measure_has_a_key_of_its_own() -> None:
    found = [("a", "m", "k1", 5), ("a", "o", "k7", 5), ("b", "o", "k8", 6)]
    assert chosen_keys(found) == {"m": "k1", "o": "k8"}


def test_a_run_shows_the_chosen_key_else_its_own_with_most_rows() -> None:
    found = [
        ("a", "m", "k1", 5), ("b", "m", "k1", 5), ("b", "m", "k2", 900),
        ("c", "m", "k3", 4), ("c", "m", "k4", 6), ("d", "m", "k6", 4), ("d", "m", "k5", 4),
    ]  # fmt: skip
    shown = {run: key for (run, _), key in shown_keys(found).items()}
    assert shown == {"a": "k1", "b": "k1", "c": "k4", "d": "k5"}


# -- what follows from it --------------------------------------------------------------------------


def test_of_a_measure_under_two_keys_one_is_read(measured: Measured) -> None:
    runs = [
        measured("a", ("downstream", "k1", said(0.5)), ("downstream", "k2", said(0.25))),
        measured("b", ("downstream", "k1", said(0.75))),
    ]
    results = Results.of(runs)
    values = {run: s.values[PARAPHRASE] for run, s in by_run(results).items()}
    assert {run: (e.value, e.n, e.note) for run, e in values.items()} == {
        "a": (0.5, len(FACTS), None), "b": (0.75, len(FACTS), None),
    }  # fmt: skip
    compared(results)
    assert results.query("SELECT count(*), bool_and(alike) FROM compared") == [(48, True)]
    assert results.query("SELECT count(*) FROM rows") == [(72,)]


def test_a_run_of_another_key_alone_has_a_footnote_and_no_difference(measured: Measured) -> None:
    runs = [
        measured("a", ("downstream", "k1", said(0.5))),
        measured("b", ("downstream", "k1", said(0.75))),
        measured("c", ("downstream", "k2", said(0.25))),
    ]
    results = Results.of(runs)
    found = by_run(results)
    assert {run: s.values[PARAPHRASE].note for run, s in found.items()} == {
        "a": None, "b": None, "c": FOOTNOTE,
    }  # fmt: skip
    assert found["c"].values[PARAPHRASE].value == 0.25
    notes = [cell.note for line in table(summarise(results)).lines for cell in line.cells
             if getattr(cell, "note", None) == FOOTNOTE]  # fmt: skip
    assert notes == [FOOTNOTE]
    made = differences(results, found["a"], [found["b"], found["c"]])[PARAPHRASE]
    assert (made["b"].value, made["b"].note) == (0.25, None)
    assert (made["c"].value, made["c"].note) == (None, UNLIKE)
    other = differences(results, found["c"], [found["a"]])[PARAPHRASE]
    assert (other["a"].value, other["a"].note) == (None, UNLIKE)


def test_an_index_of_another_key_has_a_note_and_no_difference(measured: Measured) -> None:
    def tried(key: str, of: float) -> tuple[str, str, Iterator[Row]]:
        return "attacks", key, attack("few_shot", share(of), 0.0)

    shapes = (("a", "k1", 0.5), ("b", "k1", 0.75), ("c", "k2", 1.0))
    runs = [measured(run, tried(key, of)) for run, key, of in shapes]
    results = Results.of(runs)
    found = by_run(results)
    assert {run: s.values[INDEX].note for run, s in found.items()} == {
        "a": None, "b": None, "c": UNLIKE,
    }  # fmt: skip
    made = differences(results, found["a"], [found["b"], found["c"]])[INDEX]
    assert made["b"].value == pytest.approx(0.25)
    assert (made["c"].value, made["c"].note) == (None, UNLIKE)


def test_another_key_of_one_measure_leaves_the_others_comparable(measured: Measured) -> None:
    rows = ("attacks", "k9", attack("few_shot", share(0.5), 0.0))
    runs = [
        measured("a", ("downstream", "k1", said(0.5)), rows),
        measured("b", ("downstream", "k1", said(0.5))),
        measured("c", ("downstream", "k2", said(0.25)),
                 ("attacks", "k9", attack("few_shot", share(0.75), 0.0))),
    ]  # fmt: skip
    results = Results.of(runs)
    found = by_run(results)
    made = differences(results, found["a"], [found["c"]])
    assert made[INDEX]["c"].value == pytest.approx(0.25)
    assert made[PARAPHRASE]["c"].note == UNLIKE
