"""The picture of the undertext map: two maps a method, layer by token."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from palimpsest.record.store import Run
from palimpsest.report.style import axis, escape, layout, shorten
from palimpsest.report.trace_style import NOTHING
from palimpsest.study.summary import Summary
from palimpsest.study.traces import GROUPS
from palimpsest.study.undertext import METRICS, Map, undertext

_ROW, _TOP, _GAP, _BOTTOM = 15, 58, 30, 46
"""Heights of a row of a map, above, between and below the maps, in pixels."""

_RAMP = [[0.0, "#ffffff"], [0.25, "#c6dbef"], [0.5, "#6baed6"], [0.75, "#2171b5"], [1.0, "#08306b"]]


def figure(summaries: Sequence[Summary]) -> Any:
    """A row of two maps for each method.

    Returns:
        A plotly Figure, or None where no run has a map.
    """
    drawn = [s for s in summaries if undertext(s.run, "legibility_old")]
    if not drawn:
        return None
    maps = {(s.label, m): undertext(s.run, m) for s in drawn for m in METRICS}
    groups = [g for g in GROUPS if any(g == place[0] for each in maps.values() for place in each)]
    layers = sorted({place[1] for each in maps.values() for place in each})
    height = _ROW * max(len(groups), 4)
    inside = len(drawn) * height + (len(drawn) - 1) * _GAP
    figure = make_subplots(
        len(drawn),
        len(METRICS),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=_GAP / inside if len(drawn) > 1 else 0,
        subplot_titles=[
            f"{escape(shorten(s.label))}: {heading}" for s in drawn for heading in METRICS.values()
        ],
    )
    for number, summary in enumerate(drawn, 1):
        for column, metric in enumerate(METRICS, 1):
            heat = _heat(maps[summary.label, metric], groups, layers)
            figure.add_trace(heat, number, column)
            if (layer := _begins(summary.run)) is not None:
                figure.add_vline(
                    x=layer, row=number, col=column, line={"color": "#d55e00", "width": 1.5}
                )
    _finish(figure, len(groups), inside + _TOP + _BOTTOM)
    figure.update_xaxes(title_text="layer", row=len(drawn))
    return figure


def _begins(run: Run) -> int | None:
    """The lowest layer whose states the change reaches, on the map; None if nothing is changed."""
    rows = [r for r in run.rows if r.metric == "legibility_old" and r.layer is not None]
    if not any(row.upstream for row in rows):
        return None
    return min((row.layer or 0 for row in rows if not row.upstream), default=None)


def _heat(found: Map, groups: Sequence[str], layers: Sequence[int]) -> Any:
    return go.Heatmap(
        x=list(layers),
        y=[GROUPS[group] for group in groups],
        z=[[found.get((group, layer)) for layer in layers] for group in groups],
        coloraxis="coloraxis",
        hoverongaps=False,
        hovertemplate="%{y}<br>layer %{x}<br>%{z:.2f} of the facts<extra></extra>",
    )


def _finish(figure: Any, groups: int, height: int) -> None:
    bar = {"title": {"text": "share of facts", "side": "right", "font": {"size": 12}}}
    place = {"thickness": 12, "outlinewidth": 0, "xpad": 8, "len": 200, "lenmode": "pixels"}
    figure.update_layout(
        layout(height),
        margin={"l": 56, "r": 16, "t": _TOP, "b": _BOTTOM},
        plot_bgcolor=NOTHING,
        coloraxis={
            "colorscale": _RAMP,
            "cmin": 0,
            "cmax": 1,
            "colorbar": bar | place | {"y": 1, "yanchor": "top"},
        },
    )
    figure.update_annotations(font={"size": 12})
    figure.update_xaxes(axis("", showgrid=False))
    figure.update_yaxes(
        axis("", showgrid=False, ticks="", automargin=True), range=[groups - 0.5, -0.5]
    )
