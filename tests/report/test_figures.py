"""Figures hold what was measured, and text from outside is never markup in them."""

import itertools
import json

import pytest

from palimpsest.study.figures import methods as figures
from palimpsest.study.figures.placement import offsets, spread
from palimpsest.study.figures.ranks import rank_curves, ranks
from palimpsest.study.figures.style import escape, shorten, styles
from palimpsest.study.summary import summarise
from tests.study.reading import of


@pytest.fixture(scope="module")
def results(runs):
    return of(*runs)


@pytest.fixture(scope="module")
def summaries(results):
    return summarise(results)


def drawn(results, fact_id):
    return ranks(results, rank_curves(results, [fact_id]), fact_id)


INDEX, AFTER = (f"recoverability/recoverable/{name}" for name in ("model", "after_change"))


def test_recoverability_shows_all_methods_at_both_positions(results, summaries):
    figure = figures.recoverability(results)
    named = {trace.legendgroup for trace in figure.data if trace.hovertext}
    assert named == {summary.label for summary in summaries}
    assert {trace.xaxis for trace in figure.data if trace.hovertext} == {"x", "x2"}
    dashes = {trace.line.dash for trace in figure.data if trace.hovertext}
    assert dashes == {"solid", "dash"}


def test_upstream_values_are_faint_and_say_so(results, summaries):
    figure = figures.recoverability(results)
    faint = [t for t in figure.data if t.hovertext and t.opacity < 0.5]
    assert {t.legendgroup for t in faint} == {s.label for s in summaries} - {"none"}
    assert all("unchanged by construction" in text for t in faint for text in t.hovertext[:-1])


def test_shadow_probes_are_dashed(results, summaries):
    figure = figures.recoverability(results)
    dashed = [
        t
        for t in figure.data
        if t.legendgroup == "rome [variant=plain]" and t.line.dash == "dash" and t.opacity == 1
    ]
    assert [min(t.x) for t in dashed] == [15, 15]


def test_trade_off_names_every_point(results, summaries):
    figure = figures.trade_off(results)
    titles, names = [], []
    for note in figure.layout.annotations[:-1]:
        (names if note.showarrow else titles).append(note.text)
    assert titles == ["from the whole model", "at or after the change"]
    assert set(names) == {s.label for s in summaries if s.values[INDEX].value is not None}
    values = [s.values[key].value for s in summaries for key in (INDEX, AFTER)]
    assert len(names) == sum(value is not None for value in values)
    assert len(names) > len(summaries)
    assert all(trace.error_x.array[0] >= 0 for trace in figure.data)


def test_two_hop_shares_add_up(results, summaries):
    figure = figures.two_hop(results)
    assert [trace.name for trace in figure.data] == ["new", "old", "neither"]
    for shares in zip(*(trace.x for trace in figure.data), strict=True):
        assert sum(shares) == pytest.approx(1)


def test_ranks_are_upside_down_and_logarithmic(results, summaries):
    figure = drawn(results, "fact-03")
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.autorange == "reversed"
    assert len([t for t in figure.data if t.showlegend]) == len(summaries)


def test_nothing_measured_is_no_figure(results, write_run):
    empty = of(write_run())
    made = (figures.recoverability(empty), figures.trade_off(empty), figures.two_hop(empty))
    assert made == (None, None, None)
    assert drawn(results, "fact-05") is None


def test_labels_are_escaped_in_figures(runs, write_run):
    config = runs[1].run["config"]
    evil = {"intervene": {"variant": "<a href='x'>&lt;"}, "locate": config["locate"]}
    first, second = (
        write_run(*runs[1].rows, run_id=str(i) * 12, config=c) for i, c in enumerate((evil, config))
    )
    found = of(first, second)
    made = [figures.recoverability(found), figures.trade_off(found), figures.two_hop(found)]
    made.append(drawn(found, "fact-03"))
    for figure in made:
        text = json.dumps(figure.to_plotly_json())
        assert "<a href" not in text
        assert "&lt;a href" in text


def test_controls_take_the_colour_of_what_they_imitate(results, summaries):
    looks = styles(summaries)
    assert looks["random_delta"].colour == looks["rome [variant=plain]"].colour
    assert looks["random_delta"].marker.endswith("-open")
    plain = [looks[s.label].colour for s in summaries if not s.imitates]
    assert len(set(plain)) == len(plain)


def test_escape_and_shorten():
    assert escape("<b>&amp;</b>") == "&lt;b&gt;&amp;amp;&lt;/b&gt;"
    assert len(shorten("x" * 99)) == 38


def test_spread_keeps_distance_order_and_bounds():
    placed = spread([0.5, 0.5, 0.49, 0.99, 1.0], 0.05, 0.0, 1.0)
    ordered = [placed[k] for k in (2, 0, 1, 3, 4)]
    gaps = [b - a for a, b in itertools.pairwise(ordered)]
    assert min(gaps) >= 0.05 - 1e-9
    assert max(placed) <= 1.0
    assert spread([0.2, 0.8], 0.05, 0.0, 1.0) == [0.2, 0.8]
    crowded = spread([1.0] * 50, 0.05, 0.0, 1.0)
    assert (min(crowded), max(crowded)) == pytest.approx((0.0, 1.0))
    assert spread([], 0.1, 0.0, 1.0) == []


def test_labels_of_equal_points_do_not_cover_each_other():
    points = [(500.0, 200.0)] * 6
    boxes = []
    for (x, y), (left, down) in zip(
        points, offsets(points, [100.0] * 6, [], (1000, 400)), strict=True
    ):
        boxes.append((x + left, y + down - 8, x + left + 100, y + down + 8))
    for place, one in enumerate(boxes):
        for other in boxes[:place]:
            apart = one[2] <= other[0] or other[2] <= one[0]
            assert apart or one[3] <= other[1] or other[3] <= one[1]
