"""Runs against one of them: differences fact by fact, with paired intervals."""

import csv
import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from palimpsest.errors import RequestError
from palimpsest.record.results import Run
from palimpsest.record.row import UPSTREAM, Row
from palimpsest.study import recoverable as index
from palimpsest.study.against import COLUMNS, Against, contrasts, differences
from palimpsest.study.columns import HEADLINE, Column
from palimpsest.study.intervals import Estimate, interval
from palimpsest.study.summary import summarise
from tests.study.reading import csv_of, of, printed, write_report
from tests.study.test_localization import written
from tests.study.test_recoverable import FACTS, attack, probe, run_of, share, weak, whole

[PARAPHRASE] = [column for column in HEADLINE if column.title == "paraphrase"]
[PERPLEXITY] = [column for column in HEADLINE if column.title == "perplexity"]
INDEX = "recoverability/recoverable/model"


def said(values: dict[str, float | None], prompts: int = 1, first: int = 0) -> list[Row]:
    """Success on paraphrases, by fact, numbered from the first."""
    return [
        Row(
            scope="fact", axis="downstream", metric="paraphrase", protocol="probability",
            split="target", fact_id=fact, relation="r", prompt_id=f"paraphrase/{n}", value=value,
            note=None if value is not None else "failed",
        )
        for fact, value in values.items()
        for n in range(first, first + prompts)
    ]  # fmt: skip


def contrast(column: Column, run: Run, reference: Run) -> Estimate:
    results = of(run, reference)
    [one, other] = [next(s for s in summarise(results) if s.run is r) for r in (run, reference)]
    return differences(results, other, [one])[column.key][run.run_id]


def recoverable_beyond(run: Run, other: Run) -> Estimate:
    return index.recoverable_beyond(of(run, other), run.run_id, other.run_id)


def pair(path: Path, first: list[Row], second: list[Row]) -> tuple[Run, Run]:
    return written(path, "a", first, method="memit"), written(path, "b", second, method="rome")


# -- the numbers -----------------------------------------------------------------------------------


def test_the_interval_is_of_the_differences(tmp_path: Path) -> None:
    """Narrower than those of both means, as the facts are the same."""
    random = np.random.default_rng(0)
    one = dict(zip(FACTS, random.random(24), strict=True))
    other = {fact: value - 0.2 * random.random() for fact, value in one.items()}
    found = contrast(PARAPHRASE, *pair(tmp_path, said(one, 2), said(other, 2)))
    each = np.array([one[fact] - other[fact] for fact in FACTS])
    assert (found.low, found.high) == pytest.approx(interval(each, ("r",) * 24, kind="difference"))
    assert found.value == pytest.approx(each.mean())
    ends = [interval(np.array([*s.values()]), ("r",) * 24, kind="share") for s in (one, other)]
    assert found.high - found.low < 0.6 * min(map(np.ptp, ends))


def test_equal_methods_seldom_differ(tmp_path: Path) -> None:
    """The interval leaves out zero for about one pair in twenty whose facts succeed by chance."""
    random, apart, pairs = np.random.default_rng(1), 0, 60
    for n in range(pairs):
        sides = random.random((2, 24)) < 0.5
        rows = [said(dict(zip(FACTS, map(float, side), strict=True))) for side in sides]
        found = contrast(PARAPHRASE, *pair(tmp_path / str(n), *rows))
        apart += not found.low <= 0 <= found.high
    assert apart <= 9  # binomial: more than 9 of 60 at 7% has a chance below 1%


def test_only_facts_with_both_values_count(tmp_path: Path) -> None:
    one = {"f00": 1.0, "f01": 1.0, "f02": None, "f03": 1.0}
    other = {"f00": 0.0, "f01": 1.0, "f02": 0.0}
    found = contrast(PARAPHRASE, *pair(tmp_path, said(one), said(other)))
    assert (found.value, found.n) == (0.5, 2)
    assert found.note == "facts without a value on both sides are left out: 2"
    nothing = contrast(PARAPHRASE, *pair(tmp_path / "none", said(one), said({"f02": 0.0})))
    assert (nothing.value, nothing.note) == (None, "no fact has a value on both sides")
    missing = contrast(PARAPHRASE, *pair(tmp_path / "null", said(one), said({"f02": None})))
    assert (missing.value, missing.note) == (None, "one of the two has no value")


def test_only_prompts_with_both_values_count(tmp_path: Path) -> None:
    one = said(dict.fromkeys(FACTS, 1.0)) + said(dict.fromkeys(FACTS, 0.0), first=1)
    other = said(dict.fromkeys(FACTS, 1.0)) + said(dict.fromkeys(FACTS), first=1)
    found = contrast(PARAPHRASE, *pair(tmp_path, one, other))
    assert found.value == 0.0
    assert found.low < 0 < found.high


def perplexity(value: float, n: int = 100) -> list[Row]:
    return [
        Row(
            scope="fact", axis="downstream", metric="perplexity", protocol="heldout_text",
            value=value, n=n,
        )
    ]  # fmt: skip


def test_what_is_no_single_facts_has_no_interval(tmp_path: Path) -> None:
    found = contrast(PERPLEXITY, *pair(tmp_path, perplexity(27.5), perplexity(26.0)))
    assert (found.value, found.low, found.high, found.n) == (1.5, None, None, 100)
    unlike = contrast(PERPLEXITY, *pair(tmp_path / "n", perplexity(27.5), perplexity(26.0, 90)))
    assert (unlike.value, unlike.note) == (None, "not over the same: n = 100 and 90")


def test_the_index_is_compared_fact_by_fact(tmp_path: Path) -> None:
    known = probe(share(0.5), 6)
    rows = [*weak("few_shot"), *known]
    one = run_of(tmp_path / "a", rows, attack("few_shot", share(0.75), 0.0))
    other = run_of(tmp_path / "b", rows, attack("few_shot", share(0.25), 0.0))
    found = recoverable_beyond(one, other)
    assert found.value == pytest.approx(whole(one).value - whole(other).value)
    assert found.low < found.value < found.high
    assert found.place == "few_shot, against frozen, layer 6, last_prompt"
    same = recoverable_beyond(one, one)
    assert same.value == 0.0
    assert same.low < 0 < same.high


def attacked(path: Path, *rows: Iterable[Row], lacking: str = "logit_lens") -> Run:
    """A run with weak attacks of every other family."""
    return run_of(path, weak(lacking), *rows)


def test_only_places_that_were_read_on_both_sides_are_compared(tmp_path: Path) -> None:
    """One was also read at layer 6, where all is found: that says nothing of the two methods."""
    rows = list(attack("logit_lens", share(0.5), 0.0, layer=24))
    more = attack("logit_lens", share(1.0), 0.0, layer=6)
    one, other = attacked(tmp_path / "a", rows, more), attacked(tmp_path / "b", rows)
    assert recoverable_beyond(one, other).value == 0.0


def test_states_before_the_change_count_on_both_sides(tmp_path: Path) -> None:
    """A change at layer 9 that does nothing is no better than no change."""
    below = list(attack("logit_lens", share(1.0), 0.0, layer=6, note=UPSTREAM))
    above = list(attack("logit_lens", share(0.5), 0.0, layer=24))
    untouched = [replace(row, note=UPSTREAM) for row in above]
    none = attacked(tmp_path / "a", below, untouched)
    nothing = attacked(tmp_path / "b", below, above)
    assert recoverable_beyond(nothing, none).value == 0.0


def test_two_methods_below_chance_do_not_differ(tmp_path: Path) -> None:
    one, other = (
        attacked(tmp_path / name, attack("few_shot", share(s), 0.8), lacking="few_shot")
        for name, s in (("a", 0.5), ("b", 0.25))
    )
    found = recoverable_beyond(one, other)
    assert found.value == 0.0
    assert found.low <= 0 <= found.high


def test_a_failed_fact_is_left_out_of_the_index_on_both_sides(tmp_path: Path) -> None:
    hits = share(0.5)
    rest = {fact: hits[fact] for fact in FACTS[1:]}
    one, other = (
        attacked(tmp_path / name, attack("few_shot", some, 0.0), lacking="few_shot")
        for name, some in (("a", hits), ("b", rest))
    )
    found = recoverable_beyond(one, other)
    assert (found.value, found.n) == (0.0, 23)
    assert found.note == "facts without a value on both sides are left out: 1"


def test_an_index_of_other_facts_is_not_compared(tmp_path: Path) -> None:
    hits = share(0.5)
    first, last = ({fact: hits[fact] for fact in some} for some in (FACTS[:14], FACTS[10:]))
    one, other = (
        attacked(tmp_path / name, attack("few_shot", some, 0.0), lacking="few_shot")
        for name, some in (("a", first), ("b", last))
    )
    assert recoverable_beyond(one, other).note == "fewer than 6 facts have a value on both sides"


def test_what_has_no_index_has_no_difference(tmp_path: Path) -> None:
    """A family of attacks is missing on one side: nothing is said of the other places."""
    whole_one = attacked(tmp_path / "a", attack("logit_lens", share(0.5), 0.0, layer=9))
    lacking = run_of(tmp_path / "b", attack("logit_lens", share(0.5), 0.0, layer=9))
    for pair_ in ((whole_one, lacking), (lacking, whole_one)):
        found = recoverable_beyond(*pair_)
        assert found.value is None
        assert "frozen probes: not measured" in found.note


# -- the runs --------------------------------------------------------------------------------------


def test_every_other_run_has_a_line_with_every_number(runs: list[Run]) -> None:
    found = contrasts(of(*runs), "memit")
    assert found.reference.method == "memit"
    assert len(found.lines) == len(runs) - 1
    assert not found.unlike
    for line in found.lines:
        assert set(line.values) == {column.key for column in COLUMNS}
    assert INDEX in found.lines[0].values


def test_runs_that_were_asked_something_else_are_left_out(tmp_path: Path) -> None:
    rows = said(share(0.5))
    runs = [
        written(tmp_path, "a", rows, method="rome"),
        written(tmp_path, "b", rows, method="memit"),
        written(tmp_path, "c", rows, method="emmet", seed=1),
        written(tmp_path, "d", rows, method="r_rome", model={"fingerprint": "other"}),
        written(tmp_path, "e", rows, method="ft", config={"facts": {"test": 9}}),
        written(tmp_path, "f", rows[1:], method="ft_l"),
        written(tmp_path, "g", rows, method="alphaedit", facts={"fingerprint": "other"}),
        written(tmp_path, "h", rows, method="scrub", config={"model": {"prefix": "x"}}),
    ]
    found = contrasts(of(*runs), "rome")
    assert [line.summary.method for line in found.lines] == ["memit"]
    assert sorted(found.unlike) == ["alphaedit", "emmet", "ft", "ft_l", "r_rome", "scrub"]
    alone = runs[1:3]
    with pytest.raises(RequestError, match="expected other runs that were asked the same as memit"):
        contrasts(of(*alone), "memit")


def test_of_traces_alone_nothing_is_compared() -> None:
    with pytest.raises(RequestError, match="found 'rome'; only traces are here"):
        contrasts(of(), "rome")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("roem", "expected --against to name one of the runs, found 'roem'"),
        ("rome", r"expected one run in --against, found 2; name it: 'rome \[variant"),
    ],
)
def test_a_reference_that_is_no_run_is_refused(runs: list[Run], name: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        contrasts(of(*runs), name)


# -- the views -------------------------------------------------------------------------------------


def test_csv_has_a_line_a_number(runs: list[Run]) -> None:
    found = contrasts(of(*runs), "rome [variant=plain]")
    lines = list(
        csv.DictReader(io.StringIO(csv_of(Against("rome [variant=plain]").read(of(*runs)))))
    )
    assert len(lines) == len(found.lines) * len(COLUMNS)
    assert {line["against"] for line in lines} == {found.reference.run.run_id}
    [memit] = [x for x in lines if x["method"] == "memit" and x["number"] == PARAPHRASE.key]
    wanted = contrast(PARAPHRASE, *[r for r in runs if r.run_id == memit["run_id"]],
                      found.reference.run)  # fmt: skip
    assert float(memit["value"]) == wanted.value


def test_the_page_sets_runs_against_the_named_one(sweep: Path) -> None:
    page = write_report(sweep, "memit").read_text()
    assert "Against memit, fact by fact" in page
    assert (sweep / "against.csv").is_file()
    assert 'fact by fact</h2>\n<p class="caption">Each run' not in write_report(sweep).read_text()


def lines_of(runs: list[Run], name: str) -> list[str]:
    return printed(of(*runs), 110, name).splitlines()


def test_the_terminal_stars_what_differs(tmp_path: Path) -> None:
    sides = (
        said(dict.fromkeys(FACTS, 1.0)) + perplexity(36.5),
        said(share(0.5)) + perplexity(26.0),
    )
    other = written(tmp_path, "c", perplexity(1.0), method="emmet", seed=1)
    lines = lines_of([*pair(tmp_path, *sides), other], "rome")
    [head] = [line for line in lines if line.startswith("less rome")]
    [memit] = [line for line in lines[lines.index(head) :] if line.startswith("memit")]
    assert head.split()[2:] == [column.short for column in COLUMNS]
    assert memit.split()[1 + COLUMNS.index(PARAPHRASE)] == "+.50*"
    assert memit.split()[1 + COLUMNS.index(PERPLEXITY)] == "+10.5"
    assert max(map(len, lines)) <= 110
    assert lines[-1].endswith("seed: emmet.")


def test_the_reference_is_named_by_its_whole_label(tmp_path: Path) -> None:
    rows = said(share(0.5))
    runs = [
        written(tmp_path, name, rows, method="rome", config={"intervene": {"variant": name}})
        for name in ("plain", "[/b]")
    ]
    for run in summarise(of(*runs)):
        assert f"Against {run.label}, fact by fact" in lines_of(runs, run.label)
