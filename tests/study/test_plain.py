"""Numbers made in SQL and by one matrix product are those worked out row by row."""

import pytest

from palimpsest.record.results import Run
from palimpsest.record.row import Row
from palimpsest.study.against import COLUMNS, contrasts
from palimpsest.study.intervals import Estimate
from palimpsest.study.summary import details, summarise
from tests.study import plain
from tests.study.reading import of
from tests.study.test_recoverable import attack, share


def same(found: Estimate, wanted: Estimate) -> None:
    for name in ("value", "low", "high"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert one == (None if other is None else pytest.approx(other, abs=1e-9)), name
    assert (found.n, found.note, found.place) == (wanted.n, wanted.note, wanted.place)


def test_the_headline(runs: list[Run]) -> None:
    for summary in summarise(of(*runs)):
        wanted = plain.headline(summary.run)
        assert summary.values.keys() == wanted.keys()
        for key, found in summary.values.items():
            same(found, wanted[key])


def test_every_quantity(runs: list[Run]) -> None:
    results = of(*runs)
    summaries = summarise(results)
    wanted = {s.run.run_id: plain.details(s.run) for s in summaries}
    zones = {s.run.run_id: plain.profile(s.run) for s in summaries}
    shown = details(results)
    assert len(shown) > 20
    for detail in shown:
        key = (detail.axis, detail.metric, detail.protocol, detail.place)
        for summary, found in zip(summaries, detail.values, strict=True):
            run = summary.run.run_id
            slow = zones[run].get(key[3]) if key[1] == "recoverable_old" else wanted[run].get(key)
            assert (found is None) == (slow is None)
            if found is not None and slow is not None:
                same(found, slow)


def test_differences(runs: list[Run]) -> None:
    found = contrasts(of(*runs), "memit")
    assert len(found.lines) == len(runs) - 1
    for line in found.lines:
        for column in COLUMNS:
            wanted = plain.contrast(column, line.summary.run, found.reference.run)
            same(line.values[column.key], wanted)


def test_steps_gaps_and_attacks(write_run) -> None:
    about = {
        "scope": "fact", "axis": "downstream", "metric": "efficacy", "protocol": "probability",
        "split": "target", "relation": "r",
    }  # fmt: skip
    rows = [Row(**about, fact_id=f"f{n:02}", prompt_id="fit", step=s, value=float(n % s == 0))
            for s in (1, 2) for n in range(9)]  # fmt: skip
    rows += [
        Row(**about, fact_id="gone", prompt_id="fit", step=2, value=None, n=0, note="diverged")
    ]
    rows += [*attack("few_shot", share(0.75), 0.25), *attack("rephrasing", share(0.75), 0.25)]
    run = write_run(*rows)
    [summary] = summarise(of(run))
    wanted = plain.headline(run)
    for key, found in summary.values.items():
        same(found, wanted[key])
    assert (
        summary.values["downstream/efficacy/probability"].note == "1 of 10 values missing: diverged"
    )
    assert summary.values["recoverability/recoverable/index"].place == "few_shot"
