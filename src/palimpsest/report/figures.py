"""The report's figures: pure functions of summaries. Each is None where nothing was measured."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from palimpsest.record.row import Row
from palimpsest.report.placement import Box, offsets, spread
from palimpsest.report.style import (
    FAINT,
    GRID,
    INK,
    NEITHER,
    NEW,
    OLD,
    Style,
    axis,
    describe,
    escape,
    layout,
    shorten,
    styles,
)
from palimpsest.study.columns import REFITTED, probe_rows, rows_of
from palimpsest.study.intervals import Estimate, estimate
from palimpsest.study.sequences import SHOWN, Course, Measure
from palimpsest.study.summary import Point, Summary, curve

POSITIONS = {"last_subject": "last token of the subject", "last_prompt": "last token of the prompt"}
_LETTER = 6.3
"""Width of a letter of a label, in pixels."""
_AREA = (1100.0, 390.0)
"""Width and height of the trade-off's plot in pixels, on a page of ordinary width."""


def recoverability(summaries: Sequence[Summary]) -> Any:
    """Probe accuracy for the old object by layer: a panel per position, a colour per method.

    Frozen probes are solid, re-fit ones dashed; what the change cannot reach is faint.

    Returns:
        A plotly Figure, or None.
    """
    shown = [p for p in POSITIONS if any(probe_rows(s.run, "frozen", p) for s in summaries)]
    if not shown:
        return None
    titles = [POSITIONS[position] for position in shown]
    figure = make_subplots(
        1, len(shown), True, True, subplot_titles=titles, horizontal_spacing=0.03
    )
    for column, position in enumerate(shown, start=1):
        _add_baselines(figure, summaries, position, column)
        for summary in summaries:
            _add_probes(figure, summary, styles(summaries)[summary.label], position, column)
    _add_end_labels(figure, summaries, shown[-1], len(shown))
    _add_line_keys(figure)
    longest = max(len(shorten(s.label)) for s in summaries)
    _finish_curves(figure, right=40 + int(_LETTER * longest))
    return figure


def trade_off(summaries: Sequence[Summary]) -> Any:
    """What was kept (accuracy on test subjects) against what can still be read (frozen probe).

    Returns:
        A plotly Figure, or None where there are fewer than two points.
    """
    kept, read = "downstream/relation_accuracy/vocabulary", "recoverability/probe_accuracy/frozen"
    shown = [s for s in summaries if None not in (s.values[kept].value, s.values[read].value)]
    if len(shown) < 2:
        return None
    figure = go.Figure()
    looks = styles(summaries)
    for summary in shown:
        figure.add_trace(_dot(summary, looks[summary.label], kept, read))
    figure.update_layout(
        layout(480, showlegend=False),
        xaxis=axis("accuracy on untouched subjects of the same relations", range=[-0.04, 1.04]),
        yaxis=axis("old object read by the frozen probe", range=[-0.04, 1.04]),
        annotations=[*_dot_labels(shown, kept, read, looks), _corner()],
    )
    return figure


def two_hop(summaries: Sequence[Summary]) -> Any:
    """Stacked shares of entailed questions answered with the new, the old or another object.

    Returns:
        A plotly Figure, or None.
    """
    key = "consistency/twohop_{}/vocabulary"
    parts = (("new", NEW, "white"), ("old", OLD, "white"), ("neither", NEITHER, INK))
    shown = [s for s in summaries if s.values[key.format("new")].value is not None]
    if not shown:
        return None
    figure = go.Figure(
        [_share(shown, key.format(part), part, fill, text) for part, fill, text in parts]
    )
    figure.update_layout(
        layout(96 + 30 * len(shown), barmode="stack", bargap=0.28),
        margin={"l": 24, "r": 24, "t": 40, "b": 48},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "traceorder": "normal"},
        xaxis=axis("share of entailed questions", range=[0, 1.001], tickformat=".0%"),
        yaxis={"autorange": "reversed", "automargin": True, "ticksuffix": "  "},
    )
    return figure


def ranks(summaries: Sequence[Summary], fact_id: str) -> Any:
    """One fact's old and new object: rank under the logit lens by layer, rank 1 on top.

    Returns:
        A plotly Figure, or None.
    """
    looks = styles(summaries)
    figure = make_subplots(
        1,
        2,
        shared_yaxes=True,
        subplot_titles=("old object", "new object"),
        horizontal_spacing=0.03,
    )
    highest = 1.0
    for column, metric in enumerate(("lens_rank_old", "lens_rank_new"), start=1):
        for summary in summaries:
            points = curve(rows_of(metric, "logit_lens", fact_id=fact_id)(summary.run))
            if points:
                named = any(trace.legendgroup == escape(summary.label) for trace in figure.data)
                trace = _rank_line(summary, looks[summary.label], points, named)
                figure.add_trace(trace, 1, column)
                highest = max(highest, *trace.y)
    if not figure.data:
        return None
    _finish_ranks(figure, highest, len(summaries))
    return figure


def along(shown: Sequence[Course], summaries: Sequence[Summary]) -> dict[str, Any]:
    """What holds along a sequence of edits: a plotly Figure for each measure that is shown.

    Edits so far are on a logarithmic axis; a stage without a value is a gap in the line.

    Args:
        shown: the runs that were measured along their edits.
        summaries: all runs of the report, for their looks.

    Returns:
        figures by the measures' metrics; none of a measure without any value.
    """
    looks = styles(summaries)
    made = {}
    for measure in SHOWN:
        if any(s.values[measure.key].value is not None for c in shown for s in c.stages):
            lines = [_course_line(c, looks[c.summary.label], measure) for c in shown]
            made[measure.metric] = go.Figure(lines)
            _finish_course(made[measure.metric], measure, max(c.stages[-1].step for c in shown))
    return made


def _add_baselines(figure: Any, summaries: Sequence[Summary], position: str, column: int) -> None:
    """Thin grey lines, named at the line; taken from the unchanged model where it was run."""
    layers = [r.layer for s in summaries for r in probe_rows(s.run, "frozen", position)]
    span = sorted(layer for layer in layers if layer is not None)
    if not span:
        return
    ends = [span[0], round(0.8 * span[0] + 0.2 * span[-1]), span[-1]]
    for name, dash in (("majority", "dot"), ("embedding", "dashdot")):
        value = estimate(_first_rows(summaries, "probe_baseline", name)).value
        if value is not None:
            figure.add_trace(_baseline(name, ends, [value] * 3, dash), 1, column)
    rows = _first_rows(summaries, "probe_baseline", "shuffled")
    points = curve([row for row in rows if row.position == position])
    if points:
        y = [point.estimate.value or 0.0 for point in points]
        figure.add_trace(_baseline("shuffled", [p.layer for p in points], y, "solid"), 1, column)


def _first_rows(summaries: Sequence[Summary], metric: str, protocol: str) -> list[Row]:
    """The rows of the first run that has any."""
    found = (summary.run.select(metric, protocol) for summary in summaries)
    return next((rows for rows in found if rows), [])


def _baseline(name: str, x: list[int], y: list[float], dash: str) -> Any:
    """A grey line with its name above one of its points."""
    place = len(x) // 2
    text = [""] * len(x)
    text[place] = {"shuffled": "shuffled labels", "embedding": "embedding alone"}.get(name, name)
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers+text",
        marker={"size": 7, "opacity": 0},
        text=text,
        textposition="bottom center" if name == "shuffled" else "top center",
        textfont={"size": 10, "color": FAINT},
        line={"color": FAINT, "width": 1, "dash": dash},
        name=f"baseline: {name}",
        hoverinfo="name+y",
        showlegend=False,
    )


def _add_probes(figure: Any, summary: Summary, look: Style, position: str, column: int) -> None:
    """A method's frozen (solid) and re-fit (dashed) probes, faint upstream of the change."""
    frozen = curve(probe_rows(summary.run, "frozen", position))
    refit = _refit_curve(summary, position)
    for name, points, dash in (("frozen", frozen, "solid"), ("re-fit", refit, "dash")):
        if points and all(point.upstream for point in points):
            figure.add_trace(_probe_line(summary, look, name, points, dash, 1.0), 1, column)
            continue
        first = next((k for k, point in enumerate(points) if not point.upstream), len(points))
        figure.add_traces(
            [
                _probe_line(summary, look, name, part, dash, opacity)
                for part, opacity in ((points[: first + 1], 0.25), (points[first:], 1.0))
                if part and not (opacity < 1 and first == 0)
            ],
            1,
            column,
        )


def _refit_curve(summary: Summary, position: str) -> list[Point]:
    """At each layer the retrained probe, or the adaptive one where that has no value."""
    found: dict[int, Point] = {}
    for protocol in reversed(REFITTED):
        found |= {p.layer: p for p in curve(probe_rows(summary.run, protocol, position))}
    return [found[layer] for layer in sorted(found)]


def _probe_line(
    summary: Summary, look: Style, probe: str, points: list[Point], dash: str, opacity: float
) -> Any:
    label = escape(summary.label)
    text = [
        f"<b>{label}</b><br>{probe} probe, layer {p.layer}<br>{describe(p.estimate)}"
        + ("<br>unchanged by construction" if p.upstream else "")
        for p in points
    ]
    return go.Scatter(
        x=[p.layer for p in points],
        y=[p.estimate.value for p in points],
        mode="lines+markers" if dash == "solid" else "lines",
        line={
            "color": look.colour,
            "width": 1.2 if look.control or dash == "dash" else 2,
            "dash": dash,
        },
        marker={"symbol": look.marker, "size": 6},
        opacity=opacity * (0.75 if look.control else 1),
        hovertext=text,
        hoverinfo="text",
        legendgroup=label,
        showlegend=False,
    )


def _add_end_labels(figure: Any, summaries: Sequence[Summary], position: str, column: int) -> None:
    """Each method's name beside the end of its frozen curve, moved apart where they would touch."""
    ends = [(s, curve(probe_rows(s.run, "frozen", position))) for s in summaries]
    named = [(summary, points[-1]) for summary, points in ends if points]
    heights = [point.estimate.value or 0.0 for _, point in named]
    right = max(point.layer for _, point in named)
    for (summary, point), y, label_y in zip(
        named, heights, spread(heights, 0.052, 0.0, 1.0), strict=True
    ):
        look = styles(summaries)[summary.label]
        figure.add_trace(
            go.Scatter(
                x=[point.layer, right + 1.2],
                y=[y, label_y],
                mode="lines+text",
                text=["", escape(shorten(summary.label))],
                textposition="middle right",
                textfont={"size": 11, "color": look.colour},
                line={"color": look.colour, "width": 0.6},
                cliponaxis=False,
                hoverinfo="skip",
                showlegend=False,
            ),
            1,
            column,
        )


def _add_line_keys(figure: Any) -> None:
    """Legend entries that explain the kinds of line; colours are named at the curves."""
    keys = (("frozen probe", "solid", 1.0), ("re-fit probe", "dash", 1.0))
    upstream = ("upstream: unchanged by construction", "solid", 0.25)
    for name, dash, opacity in (*keys, upstream):
        figure.add_trace(
            go.Scatter(
                x=[None],
                y=[None],
                mode="lines",
                name=name,
                legendgroup=name,
                opacity=opacity,
                line={"color": INK, "width": 2, "dash": dash},
            ),
            1,
            1,
        )


def _course_line(course: Course, look: Style, measure: Measure) -> Any:
    found = [stage.values[measure.key] for stage in course.stages]
    label = escape(course.summary.label)
    about = "<br>the unchanged model, same facts" if course.reference else ""
    text = [
        f"<b>{label}</b>{about}<br>{measure.title} at {stage.step:,} edits<br>{describe(e)}"
        + (f"<br>{escape(e.note)}" if e.note else "")
        for stage, e in zip(course.stages, found, strict=True)
    ]
    return go.Scatter(
        x=[stage.step for stage in course.stages],
        y=[e.value for e in found],
        error_y=_bars([] if course.reference else found, look.colour),
        mode="lines+markers",
        line={
            "color": look.colour,
            "width": 1.2 if course.reference or look.control else 2,
            "dash": "dot" if course.reference else "solid",
        },
        marker={"symbol": look.marker, "size": 3 if course.reference else 6},
        connectgaps=False,
        hovertext=text,
        hoverinfo="text",
        name=label,
    )


def _finish_course(figure: Any, measure: Measure, last: int) -> None:
    """Axes of one measure along up to `last` edits."""
    leads = (1, 2, 5) if last <= 50 else (1,)
    round_ones = {k * 10**power for power in range(len(str(last))) for k in leads}
    ticks = sorted({tick for tick in round_ones if 2 * tick <= last} | {last})
    share = {"range": [-0.04, 1.04]}
    scale = share if measure.style == "share" else _log_scale(figure)
    figure.update_layout(
        layout(290, showlegend=False, title={"text": measure.title, "font": {"size": 13}}),
        title={"x": 0, "xref": "paper", "y": 0.97, "yanchor": "top"},
        margin={"l": 44, "r": 12, "t": 30, "b": 46},
        xaxis=axis(
            "edits so far",
            type="log",
            range=[math.log10(0.88), math.log10(last * 1.14)],
            tickvals=ticks,
            ticktext=[f"{tick:,}" for tick in ticks],
        ),
        yaxis=axis("", exponentformat="power", **scale),
    )


def _log_scale(figure: Any) -> dict[str, Any]:
    """A logarithmic axis over all values, and over a factor of two at least."""
    logs = [math.log10(y) for line in figure.data for y in line.y if y is not None]
    middle, half = (max(logs) + min(logs)) / 2, (max(logs) - min(logs)) / 2
    reach = 1.06 * max(half, math.log10(2) / 2)
    return {"type": "log", "nticks": 6, "range": [middle - reach, middle + reach]}


def _finish_curves(figure: Any, right: int) -> None:
    figure.update_layout(
        layout(470),
        margin={"l": 56, "r": right, "t": 36, "b": 84},
        legend={"orientation": "h", "x": 0, "y": -0.17, "yanchor": "top", "itemclick": False},
    )
    figure.update_xaxes(axis("layer"))
    figure.update_yaxes(axis("", range=[-0.02, 1.04]))
    figure.update_yaxes(title_text="probe accuracy, old object", col=1)
    figure.update_annotations(font={"size": 13})


def _dot(summary: Summary, look: Style, kept: str, read: str) -> Any:
    x, y = summary.values[kept], summary.values[read]
    return go.Scatter(
        x=[x.value],
        y=[y.value],
        mode="markers",
        marker={
            "symbol": look.marker,
            "size": 11,
            "color": look.colour,
            "line": {"width": 1.5, "color": look.colour},
        },
        error_x=_bars([x], look.colour),
        error_y=_bars([y], look.colour),
        hovertext=[
            f"<b>{escape(summary.label)}</b><br>kept {describe(x)}<br>recovered {describe(y)}"
        ],
        hoverinfo="text",
    )


def _bars(found: Sequence[Estimate], colour: str) -> dict[str, Any]:
    """Error bars from each value to both ends of its interval; none without an interval."""
    if all(estimate.low is None for estimate in found):
        return {"visible": False}
    faded = "rgba({},{},{},0.35)".format(*(int(colour[k : k + 2], 16) for k in (1, 3, 5)))
    ends = {
        "array": [_reach(e.value, e.high) for e in found],
        "arrayminus": [_reach(e.low, e.value) for e in found],
    }
    return {"symmetric": False, "thickness": 1, "width": 0, "color": faded, **ends}


def _reach(low: float | None, high: float | None) -> float:
    """The length of one end of an error bar."""
    return 0.0 if low is None or high is None else max(high - low, 0.0)


def _dot_labels(
    summaries: Sequence[Summary], kept: str, read: str, looks: dict[str, Style]
) -> list[dict[str, Any]]:
    """Names beside the points, with a thin line where they had to move away."""
    spots = [(s.values[kept], s.values[read]) for s in summaries]
    points = [(_across(x.value), _down(y.value)) for x, y in spots]
    names = [escape(shorten(summary.label)) for summary in summaries]
    bars = [box for x, y in spots for box in _bar_boxes(x, y)]
    placed = offsets(points, [_LETTER * len(name) + 6 for name in names], bars, _AREA)
    colours = [looks[summary.label].colour for summary in summaries]
    return [
        {
            "x": x.value,
            "y": y.value,
            "ax": left,
            "ay": down,
            "text": name,
            "xanchor": "left",
            "yanchor": "middle",
            "showarrow": True,
            "arrowhead": 0,
            "arrowwidth": 0.6,
            "standoff": 6,
            "arrowcolor": colour,
            "font": {"size": 11.5, "color": colour},
        }
        for (x, y), name, colour, (left, down) in zip(spots, names, colours, placed, strict=True)
    ]


def _across(share: float | None) -> float:
    """A share's place on the trade-off's x axis, in pixels of a page of ordinary width."""
    return _AREA[0] * ((share or 0.0) + 0.04) / 1.08


def _down(share: float | None) -> float:
    return _AREA[1] * (1.04 - (share or 0.0)) / 1.08


def _bar_boxes(x: Estimate, y: Estimate) -> list[Box]:
    """The error bars of a point as thin boxes."""
    boxes = []
    if x.low is not None:
        boxes.append((_across(x.low), _down(y.value) - 1, _across(x.high), _down(y.value) + 1))
    if y.low is not None:
        boxes.append((_across(x.value) - 1, _down(y.high), _across(x.value) + 1, _down(y.low)))
    return boxes


def _corner() -> dict[str, Any]:
    return {
        "text": "better: kept elsewhere, unreadable here ↘",
        "xref": "paper",
        "yref": "paper",
        "x": 1,
        "y": 0,
        "xanchor": "right",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 11, "color": FAINT},
    }


def _share(shown: Sequence[Summary], key: str, part: str, fill: str, ink: str) -> Any:
    found = [summary.values[key] for summary in shown]
    labels = [escape(shorten(summary.label, 44)) for summary in shown]
    return go.Bar(
        y=labels,
        x=[e.value for e in found],
        name=part,
        orientation="h",
        marker={"color": fill},
        text=[f"{e.value:.0%}" if e.value is not None and e.value >= 0.05 else "" for e in found],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        textfont={"color": ink, "size": 11},
        hovertext=[
            f"<b>{n}</b><br>{part}: {describe(e)}" for n, e in zip(labels, found, strict=True)
        ],
        hoverinfo="text",
    )


def _rank_line(summary: Summary, look: Style, points: list[Point], named: bool) -> Any:
    return go.Scatter(
        x=[p.layer for p in points],
        y=[p.estimate.value for p in points],
        mode="lines+markers",
        name=escape(shorten(summary.label)),
        legendgroup=escape(summary.label),
        showlegend=not named,
        line={"color": look.colour, "width": 1 if look.control else 1.8},
        marker={"symbol": look.marker, "size": 5},
        hoverinfo="x+y+name",
    )


def _finish_ranks(figure: Any, highest: float, methods: int) -> None:
    decades = [10**k for k in range(len(str(int(highest))) + 1)]
    reversed_log = axis("", type="log", tickvals=decades, ticktext=[f"{d:,}" for d in decades])
    figure.update_layout(
        layout(max(330, 90 + 21 * methods)),
        margin={"l": 64, "r": 16, "t": 30, "b": 44},
        legend={"font": {"size": 11}, "tracegroupgap": 0},
    )
    figure.update_xaxes(axis("layer"))
    figure.update_yaxes(reversed_log, autorange="reversed", gridcolor=GRID)
    figure.update_yaxes(title_text="rank (1 = top)", col=1)
    figure.update_annotations(font={"size": 12})
