"""Causal tracing is told as it was measured, and text from outside is never markup in it."""

import csv
import dataclasses
import io
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from palimpsest.record.results import Results, Run, load_runs
from palimpsest.record.row import Row
from palimpsest.record.store import RunStore
from palimpsest.report.csv import to_csv
from palimpsest.report.pictures import write_pictures
from palimpsest.study.figures import tracing as trace_figures
from palimpsest.study.figures.trace_style import colour_stops, fact_title, limits, token_text
from palimpsest.study.headline import Headline
from palimpsest.study.study import Picture
from palimpsest.study.traces import (
    average_map,
    band,
    hidden_facts,
    is_trace,
    kind_text,
    peak,
    traced_facts,
    views,
)
from palimpsest.study.tracing import Tracing
from tests.study.reading import csv_of, of, printed, write_report

LAYERS = (0, 2, 5)
KINDS = ("residual", "mlp_window_10", "attention_window_10")
CAUSE = "no other subject in the data set"
TOKENS = ["<|endoftext|>", "<script>", " $x$", " {}", " is", "\n"]
EVIL = {"subject": "<script>alert(3)</script>", "true": "$y$ <b>{}\\frac", "prompt": "<i>$x$ {}"}
PLACES = ("first_subject", "middle_subject", "last_subject", "first_subsequent", "last_prompt")


def effect(fact: int, token: int, layer: int, kind: str) -> float:
    """The indirect effect of the synthetic run; largest at token 3, layer 2, of the MLP."""
    near = 0.1 * (token == 3) * (3 - abs(layer - 2) / 3)
    return near * (1 + 0.1 * fact) + 0.01 * KINDS.index(kind) * (1 if kind != KINDS[2] else -1)


def fact_rows(fact: int, corruption: str, named: bool, layers: Sequence[int]) -> list[Row]:
    about = {"scope": "fact", "axis": "localization", "split": "target"}
    about |= {"fact_id": f"fact-{fact:02d}", "relation": f"P{fact % 2}"}
    chances = {"clean_probability": 0.8, "corrupted_probability": 0.1 * fact}
    chances["total_effect"] = chances["clean_probability"] - chances["corrupted_probability"]
    rows = [Row(**about, metric=m, protocol=corruption, value=v) for m, v in chances.items()]
    for kind, layer in itertools.product(KINDS, layers):
        place = {"metric": "indirect_effect", "protocol": f"{corruption}/{kind}", "layer": layer}
        for token, group in enumerate(PLACES, start=1):
            value = effect(fact, token, layer, kind)
            rows.append(Row(**about, **place, position=group, value=value, n=10))
            if not named:
                rows.append(Row(**about, **place, position=f"token/{token}", value=value, n=10))
    return rows


def write_view(run: Run, folder: Path) -> list[Path]:
    blocks = Tracing().read(of(run))
    return write_pictures([block for block in blocks if isinstance(block, Picture)], folder)


def null(row: Row) -> Row:
    return dataclasses.replace(row, value=None, n=0, note=CAUSE)


def trace_run(
    directory: Path,
    run_id: str = "dd0000000001",
    facts: int = 4,
    corruption: str = "noise",
    named: bool = False,
    layers: Sequence[int] = LAYERS,
) -> Run:
    """A finished run of `palimpsest trace`, whose last fact could not be traced."""
    config = {"tracing": {"corruption": corruption}}
    run = {"run_id": run_id, "method": "trace", "config": config}
    store = RunStore.open(directory / run_id, run)
    for fact in range(facts):
        rows = fact_rows(fact, corruption, named, layers)
        store.append(map(null, rows) if fact == facts - 1 else rows)
    told = {"relation": "P0", "new": "Rome", "tokens": TOKENS, "subject_tokens": [1, 3], **EVIL}
    store.write_facts([{"fact_id": f"fact-{k:02d}", **told} for k in range(facts)])
    store.finish()
    return load_runs(directory / run_id)[0]


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Run:
    return trace_run(tmp_path_factory.mktemp("traces"))


@pytest.fixture(scope="module")
def view(traced):
    return views(of(traced))[0]


@pytest.fixture(scope="module")
def page(traced) -> str:
    return write_report(traced.path).read_text()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, sweep) -> Path:
    """Two runs of tracing beside the ordinary sweep, with their report."""
    directory = tmp_path_factory.mktemp("mixed") / "demo"
    shutil.copytree(sweep, directory, ignore=shutil.ignore_patterns("report.*"))
    trace_run(directory, facts=2)
    trace_run(directory, "dd0000000002", facts=2, corruption="other_subject", named=True)
    write_report(directory)
    return directory


def test_only_runs_of_tracing_are_viewed(traced, runs):
    assert [is_trace(run) for run in (traced, runs[0])] == [True, False]
    [found] = views(of(runs[0], traced, runs[1]))
    assert found.run is traced
    assert found.protocols == tuple(f"noise/{kind}" for kind in KINDS)
    assert (found.layers, found.groups) == (LAYERS, PLACES)


def test_effects_are_means_over_the_facts_that_were_traced(view):
    found = {metric: view.effects[metric, "noise"] for metric, _ in view.effects}
    assert found["clean_probability"].value == pytest.approx(0.8)
    assert found["corrupted_probability"].value == pytest.approx(0.1)
    assert found["total_effect"].value == pytest.approx(0.7)
    assert found["total_effect"].n == 3
    assert found["total_effect"].note == f"1 of 4 values missing: {CAUSE}"


def test_average_map_and_peak(view):
    found = average_map(view, "noise/mlp_window_10")
    assert found.shape == (5, 3)
    assert found[2] == pytest.approx([0.1 * 7 / 3 * 1.1 + 0.01, 0.34, 0.1 * 2 * 1.1 + 0.01])
    assert found[[0, 1, 3, 4]] == pytest.approx(0.01)
    top = peak(view, "noise/mlp_window_10")
    assert (top.group, top.layer, top.estimate.n) == ("last_subject", 2, 3)
    assert top.estimate.value == pytest.approx(0.34)
    assert top.estimate.low < 0.34 < top.estimate.high
    assert peak(view, "noise/residual", "first_subject").estimate.value == 0
    assert peak(view, "noise/residual", "further") is None


def test_a_curve_has_the_interval_of_each_of_its_layers(view):
    curve = view.curves["noise/mlp_window_10"]["last_subject"]
    layers, lows, highs = band(curve)
    assert layers == list(LAYERS)
    assert all(a < e.value < b for a, b, e in zip(lows, highs, curve.values(), strict=True))


def test_the_map_of_a_fact_has_gaps_where_nothing_was_restored(view):
    facts = traced_facts(view)
    assert [fact.fact["fact_id"] for fact in facts] == ["fact-00", "fact-01", "fact-02"]
    found = facts[2].maps["noise/attention_window_10"]
    assert found.shape == (6, 3)
    assert np.isnan(found[0]).all()
    assert found[3] == pytest.approx([effect(2, 3, layer, KINDS[2]) for layer in LAYERS])
    assert (facts[2].clean, facts[2].corrupted) == (0.8, {"noise": 0.2})


def test_a_missing_value_is_a_gap(tmp_path, write_run):
    run = trace_run(tmp_path, facts=2)
    gone = {("token/3", 2), ("last_subject", 2)}
    rows = [null(row) if (row.position, row.layer) in gone else row for row in run.rows]
    gappy = write_run(*rows, method="trace")
    shutil.copy(run.path / "facts.json", gappy.path)
    [found] = views(of(gappy))
    [fact] = traced_facts(found)
    assert np.isnan(fact.maps["noise/residual"][3]).tolist() == [False, True, False]
    assert np.isnan(average_map(found, "noise/residual")[2]).tolist() == [False, True, False]
    cells = json.loads(trace_figures.fact(found, fact).to_json())["data"][0]["z"]
    assert [value is None for value in cells[3]] == [False, True, False]


def test_only_the_first_facts_have_a_map(tmp_path):
    [found] = views(of(trace_run(tmp_path, facts=15, layers=(2,))))
    assert len(traced_facts(found)) == 12
    assert hidden_facts(found) == 2


def test_named_positions_alone_make_no_maps_of_facts(tmp_path):
    run = trace_run(tmp_path, facts=2, named=True, layers=(3,))
    [found] = views(of(run))
    assert traced_facts(found) == []
    assert {path.name for path in write_view(run, tmp_path / "figures")} == {
        f"{name}.{kind}" for name in ("aie", "average") for kind in ("png", "pdf")
    }


def test_nothing_traced_is_nothing_shown(tmp_path, write_run):
    failed = trace_run(tmp_path, facts=1)
    for run in (failed, write_run(method="trace")):
        [found] = views(of(run))
        assert (found.protocols, found.layers, found.groups) == ((), (), ())
        assert (trace_figures.average(found), trace_figures.curves(found)) == (None, None)
        assert write_view(run, run.path / "figures") == []
        assert "Causal tracing" in write_report(run.path).read_text()


def test_csv_has_a_line_for_each_cell(traced):
    lines = list(csv.DictReader(io.StringIO(csv_of(Tracing().read(of(traced))))))
    assert len(lines) == len(KINDS) * len(PLACES) * len(LAYERS)
    [line] = [
        x
        for x in lines
        if (x["kind"], x["position"], x["layer"]) == (KINDS[1], "last_subject", "2")
    ]
    assert (line["corruption"], line["n"]) == ("noise", "3")
    assert float(line["low"]) < float(line["value"]) < float(line["high"])
    assert float(line["value"]) == pytest.approx(0.34)


def test_figures_share_a_scale_and_mark_the_subject(view):
    fact = traced_facts(view)[1]
    figure = trace_figures.fact(view, fact)
    assert len(figure.data) == 3
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    assert figure.layout.coloraxis.cmax == pytest.approx(effect(1, 3, 2, KINDS[1]))
    assert figure.layout.coloraxis.cmin == pytest.approx(-0.02)
    labels = figure.layout.yaxis.ticktext
    assert labels[:2] == ("&lt;|endoftext|&gt;", "<b>&lt;script&gt; *</b>")
    assert labels[-1] == "↵"
    assert [label.endswith("*</b>") for label in labels] == [False, True, True, True, False, False]
    assert "probability 0.8 clean, 0.1 corrupted by noise" in figure.layout.title.text


def test_curves_have_a_line_and_a_band_for_each_group(view):
    figure = trace_figures.curves(view)
    lines = [trace for trace in figure.data if trace.hovertext]
    assert len(lines) == len(KINDS) * len(PLACES)
    assert len([line for line in lines if line.showlegend]) == len(PLACES)
    assert len({line.line.color for line in lines}) == len(PLACES)
    assert len([trace for trace in figure.data if trace.fill == "toself"]) == len(lines)


def test_text_of_a_data_set_is_escaped_in_figures(view):
    text = trace_figures.fact(view, traced_facts(view)[0]).to_json()
    assert "<script" not in text
    assert "<b>{}" not in text
    assert "$y$ &lt;b&gt;{}" in json.loads(text)["layout"]["title"]["text"]


def test_tokens_in_labels():
    assert token_text(" Paris") == "Paris"
    assert token_text("\n\n") == "↵↵"
    assert token_text("  ") == "␣␣"
    assert token_text("a\tb\u2028\x00\ud800") == "a⇥b␣\ufffd\ufffd"
    assert len(token_text("x" * 99)) == 28


def test_kinds_in_words():
    assert kind_text("mlp_window_10") == "MLP output, window of 10"
    assert kind_text("residual_mlp_severed") == "hidden state, MLPs severed"
    assert kind_text("something_new") == "something new"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.1, 0.5), (-0.3, 0.0)])
def test_zero_is_white_on_a_scale_from_end_to_end(low, high):
    stops = colour_stops(low, high)
    places = [place for place, _ in stops]
    assert (places[0], places[-1]) == (0, 1)
    assert places == sorted(places)
    assert len(set(places)) == len(places)
    white = [place for place, colour in stops if colour == "#ffffff"]
    assert white == pytest.approx([-low / (high - low)])


def test_limits_reach_zero():
    assert limits([np.array([[0.2, math.nan]]), np.array([[0.5]])]) == (0, 0.5)
    assert limits([np.array([[-0.2, -0.1]])]) == (-0.2, 0)
    assert limits([np.array([[0.0]])]) == (0, 1)


def test_pictures_are_whole_and_named_by_place(tmp_path):
    before = dict(matplotlib.rcParams)
    paths = write_view(trace_run(tmp_path, facts=3), tmp_path / "figures")
    names = ["aie", "average", "fact-0", "fact-1"]
    assert [path.name for path in paths] == [
        f"{n}.{kind}" for n in names for kind in ("png", "pdf")
    ]
    assert sorted(paths) == sorted((tmp_path / "figures").iterdir())
    for path in paths:
        if path.suffix == ".png":
            assert matplotlib.image.imread(path).std() > 0
        else:
            content = path.read_bytes()
            assert content.startswith(b"%PDF")
            assert b"/FontFile2" in content
            assert b"/Type3" not in content
    assert dict(matplotlib.rcParams) == before


def test_the_title_of_a_picture_says_what_it_is_of(view):
    assert fact_title(traced_facts(view)[1]) == (
        "$y$ <b>{}\\frac: probability 0.8 clean, 0.1 corrupted by noise"
    )


def test_a_report_of_tracing_alone(traced, page):
    assert "Causal tracing" in page
    assert "What is left, what was lost" not in page
    assert not {"report.csv", "report.tex"} & {path.name for path in traced.path.iterdir()}
    assert (traced.path / "trace.csv").is_file()
    assert (traced.path / "figures" / "fact-2.pdf").is_file()
    assert EVIL["subject"] not in page
    assert "&lt;script&gt;alert(3)" in page
    assert f"1 of 4 values missing: {CAUSE}" in page


def test_the_summary_table_reads_without_scripts(page):
    table = page[page.index("Causal tracing") : page.index("data-chart")]
    for text in ("MLP output, window of 10", "last subject token", ">0.34<", ">0.7<", "noise"):
        assert text in table


def test_a_mixed_report_keeps_them_apart(mixed, runs):
    html = (mixed / "report.html").read_text()
    assert html.index("What is left, what was lost") < html.index("<h2>Causal tracing</h2>")
    assert (mixed / "report.csv").read_text() == to_csv(Headline().read(of(*runs))[0])
    assert "trace" not in (mixed / "report.tex").read_text()
    folders = {path.name: path for path in (mixed / "figures").iterdir()}
    assert folders.keys() == {"dd0000000001", "dd0000000002"}
    assert (folders["dd0000000001"] / "fact-0.png").is_file()
    assert not (folders["dd0000000002"] / "fact-0.png").exists()
    with (mixed / "trace.csv").open(newline="") as file:
        labels = {line["label"] for line in csv.DictReader(file)}
    assert labels == {"trace [corruption=noise]", "trace [corruption=other_subject]"}
    for label in labels:
        assert f"<h3>{label}</h3>" in html


def test_an_ordinary_report_says_nothing_of_tracing(runs):
    path = write_report(runs[1].path)
    assert "Causal tracing" not in path.read_text()
    assert not (path.parent / "trace.csv").exists()
    assert not (path.parent / "figures").exists()


def test_the_charts_of_the_page_are_json(mixed):
    html = (mixed / "report.html").read_text()
    raw = html.split('<script type="application/json" id="charts">')[1].split("</script>")[0]
    charts = json.loads(raw, parse_constant=pytest.fail)
    assert {
        "trace-dd0000000001-aie",
        "trace-dd0000000001-fact-0",
        "recoverability",
    } <= charts.keys()


@pytest.mark.parametrize("width", [100, 120])
def test_the_terminal_shows_both_kinds_of_run(mixed, width):
    text = printed(Results.open(mixed), width)
    assert "downstream: eff" in text
    assert "trace [corruption=other_subject], corrupted by another subject" in text
    assert "MLP output, window of 10" in text
    assert max(map(len, text.splitlines())) <= width


def test_the_terminal_shows_tracing_alone(traced):
    text = printed(of(traced))
    assert text.startswith("trace, corrupted by noise\nrestored")
    assert "clean probability 0.80" in text
    assert f"1 of 4 values missing: {CAUSE}." in text
    assert "downstream" not in text
