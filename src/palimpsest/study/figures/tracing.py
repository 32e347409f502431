"""The figures of causal tracing: pure functions of a view. Each is None where nothing was traced.

As in figures 1 to 3 of Meng et al. 2022 (arXiv 2202.05262), a panel for each kind of state.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from palimpsest.study.figures.style import FAINT, axis, escape, layout
from palimpsest.study.figures.trace_style import (
    COLUMNS,
    EFFECT,
    GROUP_COLOURS,
    GROUP_DASHES,
    NOTHING,
    colour_stops,
    fact_title,
    limits,
    token_texts,
)
from palimpsest.study.intervals import Estimate, Floats
from palimpsest.study.text import DASH, plain
from palimpsest.study.traces import GROUPS, TracedFact, TraceView, average_map, band

_ROW = 21
"""Height of a row of a heat map, in pixels."""
_TOP, _GAP, _BOTTOM = 62, 74, 48
"""Height above, between and below the panels, in pixels."""


def fact(view: TraceView, traced: TracedFact) -> Any:
    """One fact's indirect effects by token and layer; the subject's tokens are bold and starred.

    Returns:
        A plotly Figure.
    """
    first, last = traced.subject
    texts = [escape(text) for text in token_texts(traced)]
    bold = [f"<b>{t}</b>" if first <= k <= last else t for k, t in enumerate(texts)]
    figure = _heat_maps(view, traced.maps, bold)
    figure.update_layout(title=_title(escape(fact_title(traced))))
    return figure


def average(view: TraceView) -> Any:
    """AIE by position group and layer.

    Returns:
        A plotly Figure, or None.
    """
    if not view.groups:
        return None
    maps = {protocol: average_map(view, protocol) for protocol in view.protocols}
    figure = _heat_maps(view, maps, [GROUPS[group] for group in view.groups])
    figure.update_layout(title=_title("average indirect effect"))
    return figure


def curves(view: TraceView) -> Any:
    """AIE by layer, a line for each position group, with 95% intervals.

    Returns:
        A plotly Figure, or None.
    """
    if not view.groups:
        return None
    figure = _panels(view, 230, shared_yaxes="all")
    for place, protocol in enumerate(view.protocols):
        where = {"row": place // COLUMNS + 1, "col": place % COLUMNS + 1}
        for group, found in view.curves[protocol].items():
            named = any(line.name == GROUPS[group] for line in figure.data)
            for line in (_band(group, found), _line(group, found, named)):
                figure.add_trace(line, **where)
    figure.update_xaxes(axis("layer", **_ticks(view)))
    figure.update_yaxes(axis("", zeroline=True, zerolinecolor=FAINT, zerolinewidth=1))
    figure.update_yaxes(title_text="average indirect effect", col=1)
    above = {"yref": "container", "y": 0.99, "yanchor": "top"}
    figure.update_layout(legend={"orientation": "h", "x": 0, **above})
    return figure


def _panels(view: TraceView, height: int, **shared: Any) -> Any:
    """Empty panels of a height in pixels, one for each protocol, with their titles."""
    columns = min(COLUMNS, len(view.protocols))
    rows = math.ceil(len(view.protocols) / columns)
    inside = rows * height + (rows - 1) * _GAP
    slots: list[dict[str, Any] | None] = [{}] * len(view.protocols)
    slots += [None] * (rows * columns - len(slots))
    figure = make_subplots(
        rows,
        columns,
        specs=[slots[row * columns : (row + 1) * columns] for row in range(rows)],
        subplot_titles=[escape(view.title(protocol)) for protocol in view.protocols],
        horizontal_spacing=0.025,
        vertical_spacing=_GAP / inside if rows > 1 else 0,
        **shared,
    )
    margin = {"l": 56, "r": 16, "t": _TOP, "b": _BOTTOM}
    figure.update_layout(layout(inside + _TOP + _BOTTOM), margin=margin)
    figure.update_annotations(font={"size": 12})
    return figure


def _heat_maps(view: TraceView, maps: Mapping[str, Floats], names: Sequence[str]) -> Any:
    """A heat map for each protocol over the same rows, in one colour scale."""
    figure = _panels(view, _ROW * max(len(names), 4), shared_yaxes=True)
    for place, protocol in enumerate(view.protocols):
        heat = _heat_map(view, maps[protocol])
        figure.add_trace(heat, place // COLUMNS + 1, place % COLUMNS + 1)
    low, high = limits(maps.values())
    bar = {"title": {"text": EFFECT, "side": "right", "font": {"size": 12}}, "thickness": 12}
    scale = [list(stop) for stop in colour_stops(low, high)]
    figure.update_layout(
        coloraxis={
            "colorscale": scale,
            "cmin": low,
            "cmax": high,
            "colorbar": bar | {"outlinewidth": 0, "xpad": 8},
        },
        plot_bgcolor=NOTHING,
    )
    rows = {"tickvals": list(range(len(names))), "ticktext": list(names)}
    figure.update_xaxes(axis("layer", showgrid=False, **_ticks(view)))
    figure.update_yaxes(
        axis("", showgrid=False, ticks="", automargin=True, **rows),
        range=[len(names) - 0.5, -0.5],
    )
    return figure


def _heat_map(view: TraceView, found: Floats) -> Any:
    values = [[float(v) if np.isfinite(v) else None for v in row] for row in found]
    return go.Heatmap(
        x=list(view.layers),
        y=list(range(len(values))),
        z=values,
        coloraxis="coloraxis",
        hoverongaps=False,
        hovertemplate=f"%{{y}}<br>layer %{{x}}<br>{EFFECT} %{{z:.3g}}<extra></extra>",
    )


def _ticks(view: TraceView) -> dict[str, Any]:
    """Ticks at the layers where these are few, elsewhere plotly's own."""
    return {"tickvals": list(view.layers)} if len(view.layers) <= 8 else {}


def _title(text: str) -> dict[str, Any]:
    """A figure's title, above those of its panels."""
    place = {"x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top"}
    return {"text": text, "font": {"size": 13}, "pad": {"t": 10}, **place}


def _band(group: str, found: Mapping[int, Estimate]) -> Any:
    """The 95% intervals along a curve, as one area."""
    layers, lows, highs = band(found)
    return go.Scatter(
        x=layers + layers[::-1],
        y=lows + highs[::-1],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=_faded(GROUP_COLOURS[group]),
        legendgroup=group,
        showlegend=False,
        hoverinfo="skip",
    )


def _line(group: str, found: Mapping[int, Estimate], named: bool) -> Any:
    return go.Scatter(
        x=list(found),
        y=[e.value for e in found.values()],
        mode="lines+markers" if len(found) < 3 else "lines",
        line={"color": GROUP_COLOURS[group], "width": 2, "dash": GROUP_DASHES[group]},
        name=GROUPS[group],
        legendgroup=group,
        showlegend=not named,
        hovertext=[
            f"<b>{GROUPS[group]}</b><br>layer {layer}<br>{_told(e)}" for layer, e in found.items()
        ],
        hoverinfo="text",
    )


def _told(estimate: Estimate) -> str:
    """An AIE with its interval and count, for a tooltip."""
    ends = ""
    if estimate.low is not None:
        ends = f" [{plain(estimate.low)} {DASH} {plain(estimate.high)}]"
    return f"{plain(estimate.value)}{ends}, n = {estimate.n}"


def _faded(colour: str) -> str:
    return "rgba({},{},{},0.16)".format(*(int(colour[k : k + 2], 16) for k in (1, 3, 5)))
