"""Methods set beside each other: curves over layers, the trade-off, entailed questions."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from palimpsest.record.results import Results
from palimpsest.study.curves import Point, curves
from palimpsest.study.figures.placement import Box, offsets, spread
from palimpsest.study.figures.style import (
    FAINT,
    INK,
    NEITHER,
    NEW,
    OLD,
    Style,
    axis,
    bars,
    describe,
    escape,
    layout,
    shorten,
    styles,
)
from palimpsest.study.intervals import Estimate
from palimpsest.study.samples import measured
from palimpsest.study.study import MOST_RUNS
from palimpsest.study.summary import Summary, summarise

Curves = Mapping[tuple[Any, ...], list[Point]]
"""Probes by run id, protocol and position."""

POSITIONS = {"last_subject": "last token of the subject", "last_prompt": "last token of the prompt"}
_LETTER = 6.3
"""Width of a letter of a label, in pixels."""
_AREA = (1100.0, 390.0)
"""Width and height of the trade-off's panels together in pixels, on a page of ordinary width."""


def recoverability(results: Results) -> Any:
    """Probe accuracy for the old object by layer: a panel per position, a colour per method.

    Frozen probes are solid, shadow probes dashed; what the change cannot reach is faint.

    Returns:
        A plotly Figure, or None.
    """
    summaries, found = summarise(results), _probes(results)
    shown = [p for p in POSITIONS if any((s.run.run_id, "frozen", p) in found for s in summaries)]
    if not shown:
        return None
    looks, baselines = styles(summaries), _baselines(results)
    titles = [POSITIONS[position] for position in shown]
    figure = make_subplots(
        1, len(shown), True, True, subplot_titles=titles, horizontal_spacing=0.03
    )
    for column, position in enumerate(shown, start=1):
        _add_baselines(figure, baselines, found, position, column)
        for summary in summaries:
            _add_probes(figure, summary, looks[summary.label], found, position, column)
    _add_end_labels(figure, summaries, found, shown[-1], len(shown))
    _add_line_keys(figure)
    longest = max(len(shorten(s.label)) for s in summaries)
    _finish_curves(figure, right=40 + int(_LETTER * longest))
    return figure


def trade_off(results: Results) -> Any:
    """What was kept (accuracy on test subjects) against what can be recovered of the old object.

    Two panels: from the whole changed model, and at or after the change alone.

    Returns:
        A plotly Figure, or None where there are fewer than two points.
    """
    summaries = summarise(results)
    panels = [(title, read, _with(summaries, _KEPT, read)) for title, read in _RECOVERED]
    panels = [panel for panel in panels if len(panel[2]) > 1]
    if not panels:
        return None
    titles, looks = [title for title, *_ in panels], styles(summaries)
    figure = make_subplots(
        1, len(panels), True, True, subplot_titles=titles, horizontal_spacing=0.03
    )
    width = _AREA[0] / len(panels)
    for column, (_, read, shown) in enumerate(panels, start=1):
        for summary in shown:
            figure.add_trace(_dot(summary, looks[summary.label], _KEPT, read), 1, column)
        for label in _dot_labels(shown[:MOST_RUNS], read, looks, width):
            figure.add_annotation(label, row=1, col=column)
    figure.update_layout(layout(480, showlegend=False))
    figure.add_annotation(_corner())
    figure.update_xaxes(axis("accuracy on untouched subjects", range=[-0.04, 1.04]))
    figure.update_yaxes(axis("", range=[-0.04, 1.04]))
    figure.update_yaxes(title_text="old object recovered", col=1)
    return figure


_KEPT = "downstream/relation_accuracy/vocabulary"
_RECOVERED = (
    ("from the whole model", "recoverability/recoverable/model"),
    ("at or after the change", "recoverability/recoverable/after_change"),
)


def _with(summaries: Sequence[Summary], *keys: str) -> list[Summary]:
    """Those that have a value for each key."""
    return [s for s in summaries if all(s.values[key].value is not None for key in keys)]


def two_hop(results: Results) -> Any:
    """Stacked shares of entailed questions answered with the new, the old or another object.

    Returns:
        A plotly Figure, or None.
    """
    key = "consistency/twohop_{}/vocabulary"
    parts = (("new", NEW, "white"), ("old", OLD, "white"), ("neither", NEITHER, INK))
    summaries = summarise(results)
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


def _probes(results: Results) -> Curves:
    condition = (
        "metric = 'probe_accuracy' AND protocol IN ('frozen', 'shadow') AND split = 'target' "
        "AND budget IS NULL AND position IS NOT NULL"
    )
    return curves(results, condition, ["protocol", "position"])


def _baselines(results: Results) -> dict[str, Any]:
    """Of the first run that has any: majority, embedding, and shuffled labels by position."""
    names = [summary.run.run_id for summary in summarise(results)]
    found: dict[str, Any] = {}
    alone = measured(results, "metric = 'probe_baseline'", ["protocol"])
    shuffled = "metric = 'probe_baseline' AND protocol = 'shuffled'"
    lines = curves(results, shuffled, ["position"])
    for name in ("majority", "embedding"):
        found[name] = next((alone[run, name] for run in names if (run, name) in alone), None)
    first = next((run for run in names if (run, "shuffled") in alone), None)
    found["shuffled"] = {where: points for (run, where), points in lines.items() if run == first}
    return found


def _add_baselines(
    figure: Any, baselines: Mapping[str, Any], found: Curves, position: str, column: int
) -> None:
    """Thin grey lines, named at the line; taken from the unchanged model where it was run."""
    span = sorted(
        point.layer
        for (_, protocol, where), points in found.items()
        for point in points
        if (protocol, where) == ("frozen", position)
    )
    if not span:
        return
    ends = [span[0], round(0.8 * span[0] + 0.2 * span[-1]), span[-1]]
    for name, dash in (("majority", "dot"), ("embedding", "dashdot")):
        value = baselines[name].value if baselines[name] else None
        if value is not None:
            figure.add_trace(_baseline(name, ends, [value] * 3, dash), 1, column)
    if points := baselines["shuffled"].get(position):
        y = [point.estimate.value or 0.0 for point in points]
        figure.add_trace(_baseline("shuffled", [p.layer for p in points], y, "solid"), 1, column)


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


def _add_probes(
    figure: Any, summary: Summary, look: Style, found: Curves, position: str, column: int
) -> None:
    """A method's frozen (solid) and shadow (dashed) probes, faint upstream of the change."""
    frozen = found.get((summary.run.run_id, "frozen", position), [])
    shadow = found.get((summary.run.run_id, "shadow", position), [])
    for name, points, dash in (("frozen", frozen, "solid"), ("shadow", shadow, "dash")):
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


def _add_end_labels(
    figure: Any, summaries: Sequence[Summary], found: Curves, position: str, column: int
) -> None:
    """Each method's name beside the end of its frozen curve, moved apart where they would touch."""
    ends = [(s, found.get((s.run.run_id, "frozen", position))) for s in summaries]
    named = [(summary, points[-1]) for summary, points in ends if points]
    heights = [point.estimate.value or 0.0 for _, point in named]
    right, looks = max(point.layer for _, point in named), styles(summaries)
    for (summary, point), y, label_y in zip(
        named, heights, spread(heights, 0.052, 0.0, 1.0), strict=True
    ):
        look = looks[summary.label]
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
    keys = (("frozen probe", "solid", 1.0), ("shadow probe", "dash", 1.0))
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
        error_x=bars([x], look.colour),
        error_y=bars([y], look.colour),
        hovertext=[
            f"<b>{escape(summary.label)}</b><br>kept {describe(x)}<br>recovered {describe(y)}"
        ],
        hoverinfo="text",
    )


def _dot_labels(
    summaries: Sequence[Summary], read: str, looks: dict[str, Style], width: float
) -> list[dict[str, Any]]:
    """Names beside the points, with a thin line where they had to move away."""
    spots = [(s.values[_KEPT], s.values[read]) for s in summaries]
    points = [(_across(x.value, width), _down(y.value)) for x, y in spots]
    names = [escape(shorten(summary.label)) for summary in summaries]
    bars = [box for x, y in spots for box in _bar_boxes(x, y, width)]
    placed = offsets(points, [_LETTER * len(name) + 6 for name in names], bars, (width, _AREA[1]))
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


def _across(share: float | None, width: float) -> float:
    """A share's place on the x axis of a panel so many pixels wide."""
    return width * ((share or 0.0) + 0.04) / 1.08


def _down(share: float | None) -> float:
    return _AREA[1] * (1.04 - (share or 0.0)) / 1.08


def _bar_boxes(x: Estimate, y: Estimate, width: float) -> list[Box]:
    """The error bars of a point as thin boxes."""
    boxes = []
    if x.low is not None:
        ends = _across(x.low, width), _across(x.high, width)
        boxes.append((ends[0], _down(y.value) - 1, ends[1], _down(y.value) + 1))
    if y.low is not None:
        across = _across(x.value, width)
        boxes.append((across - 1, _down(y.high), across + 1, _down(y.low)))
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
