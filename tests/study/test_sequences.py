"""What holds along a sequence of edits, against values worked out by hand."""

import csv
import json
import re

import pytest

from palimpsest.record.results import Results
from palimpsest.record.row import Row
from palimpsest.study.figures import along as figures
from palimpsest.study.figures.style import styles
from palimpsest.study.sequences import columns, courses, gaps, heading
from palimpsest.study.summary import summarise
from tests.study.reading import of, printed, sweep_of, write_report

CAUSE = "the search came to no finite loss"
EFFICACY = "downstream/efficacy/probability"
RETENTION = "downstream/retention/first_10"
NEIGHBORHOOD = "downstream/neighborhood/probability"
PERPLEXITY = "downstream/perplexity/heldout_text"
MODEL = {"name": "tiny", "fingerprint": "f1"}


def asked(step, *values, metric="efficacy", protocol="probability", prompt="fit"):
    """One row a fact, `f00` first; None is a fact that the method failed on."""
    about = {"scope": "fact", "axis": "downstream", "split": "target", "relation": "P36"}
    return [
        Row(
            **about,
            metric=metric,
            protocol=protocol,
            fact_id=f"f{place:02d}",
            prompt_id=prompt,
            step=step,
            value=value,
            n=int(value is not None),
            note=CAUSE if value is None else None,
        )
        for place, value in enumerate(values)
    ]


def near(step, prompt, *values):
    return asked(step, *values, metric="neighborhood", prompt=f"neighbor/{prompt}")


def perplexity(step, value, note=None):
    about = {"scope": "fact", "axis": "downstream", "metric": "perplexity"}
    return Row(**about, protocol="heldout_text", step=step, value=value, n=9, note=note)


def twelve():
    """Twelve edits: at the end six of the first ten hold, and both of the others."""
    return [
        *asked(1, 1.0),
        *asked(2, 1.0, 0.0),
        *asked(5, *[1.0] * 4, 0.0),
        *asked(10, *[1.0] * 9, 0.0),
        *asked(12, *[1.0] * 6, *[0.0] * 4, 1.0, 1.0),
        *asked(None, *[1.0] * 6, *[0.0] * 4, 1.0, 1.0),
        *(perplexity(step, 20.0 + step) for step in (1, 2, 5, 10, 12)),
        perplexity(None, 32.0),
    ]


@pytest.fixture
def pair(write_run):
    """The unchanged model and a sequence of twelve edits."""
    values = [1.0, 0.0, 0.0, *[1.0] * 9]
    write_run(
        *asked(None, *values),
        *near(None, 0, *values),
        perplexity(None, 19.0),
        method="none",
        run_id="ab0000000000",
        model=MODEL,
    )
    run = write_run(*twelve(), model=MODEL)
    return sweep_of(run)


def drawn(results):
    return figures.along(courses(results), summarise(results))


def along(course, key):
    return [(stage.step, stage.values[key].value) for stage in course.stages]


def test_efficacy_is_over_all_edits_so_far_and_retention_over_the_first_ten(write_run):
    [course] = courses(of(write_run(*twelve())))
    assert along(course, EFFICACY) == [(1, 1.0), (2, 0.5), (5, 0.8), (10, 0.9), (12, 8 / 12)]
    assert along(course, RETENTION) == [(1, 1.0), (2, 0.5), (5, 0.8), (10, 0.9), (12, 0.6)]
    assert [stage.values[RETENTION].n for stage in course.stages] == [1, 2, 5, 10, 10]
    assert [stage.values[EFFICACY].n for stage in course.stages] == [1, 2, 5, 10, 12]
    assert along(course, PERPLEXITY) == [(1, 21.0), (2, 22.0), (5, 25.0), (10, 30.0), (12, 32.0)]


def test_a_facts_prompts_are_averaged_first_and_its_fitted_one_is_left_out(write_run):
    gone = {"metric": "suppression", "protocol": "candidates"}
    run = write_run(
        *asked(2, 1.0, 1.0),
        *near(2, 0, 1.0, 1.0),
        *near(2, 1, 0.0),
        *asked(2, 1.0, 1.0, **gone),
        *asked(2, 0.0, 1.0, **gone, prompt="paraphrase/0"),
    )
    [course] = courses(of(run))
    assert along(course, NEIGHBORHOOD) == [(2, 0.75)]
    assert along(course, "downstream/suppression/candidates") == [(2, 0.5)]


def test_the_headline_stays_what_was_measured_after_the_last_edit(write_run):
    run = write_run(*asked(1, 0.0), *asked(2, 0.0, 0.0), *asked(None, 1.0, 0.0))
    [summary] = summarise(of(run))
    assert (summary.values[EFFICACY].value, summary.values[EFFICACY].n) == (0.5, 2)


def test_failed_facts_are_counted_and_leave_gaps(write_run):
    run = write_run(
        *asked(1, None),
        *asked(2, None, 1.0),
        *asked(3, None, 1.0, 0.0),
        *asked(None, None, 1.0, 0.0),
        perplexity(1, 21.0),
        perplexity(2, 22.0),
        perplexity(3, None, "812 nats a token: no finite perplexity"),
    )
    [course] = courses(of(run))
    assert along(course, RETENTION) == [(1, None), (2, 1.0), (3, 0.5)]
    found = course.stages[1].values[EFFICACY]
    assert (found.n, found.note) == (1, f"1 of 2 values missing: {CAUSE}")
    assert gaps([course]) == [
        f"rome: no efficacy, retention after 1 edit: {CAUSE}.",
        "rome: no neighborhood after 1, 2, 3 edits: not measured.",
        "rome: no perplexity after 3 edits: 812 nats a token: no finite perplexity.",
    ]
    assert (course.summary.failed, course.summary.n_facts) == ({"f00": CAUSE}, 3)
    assert course.summary.failure.startswith(f"1 of 3 facts failed ({CAUSE})")


def test_a_fact_with_one_missing_value_has_not_failed(write_run):
    rows = [*asked(None, None, 1.0), *near(None, 0, 1.0, 1.0)]
    [summary] = summarise(of(write_run(*rows)))
    assert (summary.failed, summary.failure) == ({}, "")


def test_the_unchanged_model_is_asked_of_the_same_facts(pair):
    beside, edited = courses(pair)
    assert (beside.reference, edited.reference) == (True, False)
    shares = [(1, 1.0), (2, 1 / 2), (5, 3 / 5), (10, 8 / 10), (12, 10 / 12)]
    assert along(beside, NEIGHBORHOOD) == along(beside, EFFICACY) == shares
    assert along(beside, RETENTION) == [*shares[:4], (12, 8 / 10)]
    assert {value for _, value in along(beside, PERPLEXITY)} == {19.0}


def test_the_unchanged_model_of_other_facts_shows_its_perplexity_alone(write_run):
    write_run(
        *asked(None, 1.0), perplexity(None, 19.0), method="none", run_id="0" * 12, model=MODEL
    )
    edited = write_run(*asked(2, 1.0, 1.0), perplexity(2, 22.0), model=MODEL)
    beside, _ = courses(sweep_of(edited))
    assert along(beside, EFFICACY) == [(2, None)]
    assert along(beside, PERPLEXITY) == [(2, 19.0)]


def test_another_unchanged_model_is_left_out(write_run):
    write_run(*asked(None, 1.0), method="none", run_id="0" * 12, model={"fingerprint": "f2"})
    edited = write_run(*asked(1, 1.0), model=MODEL)
    found = courses(sweep_of(edited))
    assert [course.summary.method for course in found] == ["rome"]


def test_tables_show_powers_of_ten_and_the_last_edit(write_run):
    short = write_run(*asked(1, 1.0), *asked(10, *[1.0] * 10), *asked(20, *[1.0] * 20))
    ten = write_run(*asked(1, 1.0), *asked(10, *[1.0] * 10), run_id="b" * 12)
    one, both = courses(of(short)), courses(of(short, ten))
    assert [heading(step, one) for step in columns(one)] == ["1", "10", "20"]
    assert [heading(step, both) for step in columns(both)] == ["1", "10", "last"]
    last = courses(of(ten))
    assert [heading(step, last) for step in columns(last)] == ["1", "10"]
    assert (last[0].at(None).step, last[0].at(5)) == (10, None)


def test_the_figure_never_joins_over_a_gap(write_run):
    run = write_run(
        *asked(1, 1.0),
        *asked(2, 1.0, 1.0),
        *asked(3, 1.0, 1.0, 1.0),
        perplexity(1, 20.0),
        perplexity(2, None, "812 nats a token"),
        perplexity(3, 30.0),
    )
    results = of(run)
    made = drawn(results)
    assert list(made) == ["efficacy", "retention", "perplexity"]
    [line] = made["perplexity"].data
    assert (line.x, line.y, line.connectgaps) == ((1, 2, 3), (20.0, None, 30.0), False)
    assert "812 nats a token" in line.hovertext[1]
    assert made["perplexity"].layout.yaxis.type == made["efficacy"].layout.xaxis.type == "log"


def test_the_figure_has_the_looks_and_intervals_of_the_others(pair):
    made = drawn(pair)
    beside, edited = made["retention"].data
    assert (beside.line.dash, edited.line.dash) == ("dot", "solid")
    assert edited.line.color == styles(summarise(pair))["rome"].colour
    last = courses(pair)[1].stages[-1].values[RETENTION]
    assert edited.error_y.array[-1] == pytest.approx(last.high - 0.6)
    assert edited.error_y.arrayminus[-1] == pytest.approx(0.6 - last.low)


def test_a_small_drift_of_the_perplexity_does_not_fill_its_panel(write_run):
    rows = [*asked(1, 1.0), *asked(2, 1.0, 1.0), perplexity(1, 40.0), perplexity(2, 41.0)]
    results = of(write_run(*rows))
    axis = drawn(results)["perplexity"].layout.yaxis
    low, high = (10**end for end in axis.range)
    assert high / low >= 2
    assert low < 40.0 < 41.0 < high


def test_labels_and_causes_are_escaped(write_run):
    for k, variant in enumerate(("<a href='x'>", "plain")):
        write_run(
            *asked(1, 1.0),
            perplexity(1, 20.0),
            *asked(2, 1.0, 1.0),
            perplexity(2, None, "<img src=x>"),
            run_id=str(k) * 12,
            config={"intervene": {"variant": variant}},
        )
    directory = write_run(run_id="2" * 12).path.parent
    results = Results.open(directory)
    for figure in drawn(results).values():
        text = json.dumps(figure.to_plotly_json())
        assert "<a href" not in text
        assert "<img" not in text
        assert "&lt;a href" in text
    html = write_report(directory).read_text()
    own = re.sub(r"<script[^>]*>.*?</script>", "", html, flags=re.DOTALL)
    assert "<img" not in own
    assert "&lt;img src=x&gt;" in own


def test_without_steps_there_is_nothing(runs, sweep):
    results = of(*runs)
    assert courses(results) == []
    assert figures.along([], summarise(results)) == {}
    assert "Along a sequence of edits" not in write_report(sweep).read_text()
    assert not (sweep / "sequence.csv").exists()


def test_the_page_shows_the_sequence_and_tells_its_gaps(pair):
    html = write_report(pair.runs[0].path.parent).read_text()
    assert "Along a sequence of edits" in html
    assert 'data-chart="along-retention"' in html
    assert 'data-chart="along-neighborhood"' in html
    assert "rome: no neighborhood after 1, 2, 5, 10, 12 edits: not measured." in html
    assert 'title="after 12 edits; n = 10"' in html


def test_sequence_csv_holds_every_step(pair):
    directory = pair.runs[0].path.parent
    write_report(directory)
    with (directory / "sequence.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    [found] = [
        line
        for line in lines
        if (line["method"], line["step"], line["metric"]) == ("rome", "12", "retention")
    ]
    assert (float(found["value"]), found["n"], found["protocol"]) == (0.6, "10", "first_10")
    assert float(found["low"]) < 0.6 < float(found["high"])
    assert {line["step"] for line in lines} == {"1", "2", "5", "10", "12"}


def test_report_tells_how_many_facts_failed(write_run):
    run = write_run(
        *asked(None, None, 1.0, 0.0), *near(None, 0, None, 1.0, 0.0), *near(None, 1, None, 1.0)
    )
    html = write_report(run.path).read_text()
    note = f"rome: 1 of 3 facts failed ({CAUSE})"
    assert html.count(note) == 1
    assert 'title="n = 2; 1 of 3 values missing' in html
    assert "<li>1 of 3 values missing" not in html
    with (run.path / "report.csv").open(newline="") as file:
        [line] = csv.DictReader(file)
    assert (line["n_facts"], line["n_failed"], line[f"{EFFICACY}/n"]) == ("3", "1", "2")


def test_the_terminal_shows_the_sequence_and_the_failed_facts(pair, write_run):
    write_run(*asked(1, 1.0), *asked(2, 1.0, None), *asked(None, 1.0, None), run_id="c" * 12)
    text = printed(Results.open(pair.runs[0].path.parent))
    lines = [line.split() for line in text.splitlines()]
    assert ["along", "the", "edits", "after", "edits", "1", "10", "last"] in lines
    assert any(line[:4] == ["retention,", "first", "10", "1.0"] for line in lines)
    assert any(line[3:4] == ["1.0"] and ".60" in line for line in lines)
    assert ["perplexity", "21.0", "30.0", "32.0"] in lines
    assert any(line[2:7] == ["1", "of", "2", "facts", "failed"] for line in lines)
