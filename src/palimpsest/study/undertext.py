"""The undertext map: layer by token, how legible the old and the new object are, by method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from palimpsest.record.results import Results, sql_text
from palimpsest.record.row import UPSTREAM
from palimpsest.study.comparable import compared
from palimpsest.study.figures.style import axis, escape, layout, shorten
from palimpsest.study.figures.trace_style import NOTHING
from palimpsest.study.study import MOST_RUNS, Block, Figure, Study, too_many
from palimpsest.study.summary import summarise
from palimpsest.study.traces import GROUPS

METRICS = {"legibility_old": "old object", "legibility_new": "new object"}
"""What is read, and the headings of the columns."""

Map = Mapping[tuple[str, int], float]
"""A share by token group and layer."""

_ROW, _TOP, _GAP, _BOTTOM = 15, 58, 30, 46
"""Heights of a row of a map, above, between and below the maps, in pixels."""

_RAMP = [[0.0, "#ffffff"], [0.25, "#c6dbef"], [0.5, "#6baed6"], [0.75, "#2171b5"], [1.0, "#08306b"]]


@dataclass(frozen=True)
class Undertext(Study):
    """Where in the model the old and the new object can be read."""

    def read(self, results: Results) -> Sequence[Block]:
        """One figure with a row for each run that has a map."""
        runs = len({run_id for run_id, _ in undertext(results)})
        if not runs:
            return ()
        shown = runs <= MOST_RUNS
        made = figure(results) if shown else None
        caption = (
            "The share of the changed facts whose old, or new, object a linear probe of that layer "
            "and token names. Probes are trained on other subjects of the relation, anew on models "
            "that are changed for all, on the unchanged model for edits of single facts. The line "
            "stands at the first layer that the change reaches."
        )
        return [
            Figure(
                name="undertext",
                chart=made.to_plotly_json() if made else None,
                title="The undertext, layer by token",
                caption=caption if shown else too_many(runs, "The maps"),
            )
        ]


def undertext(results: Results) -> dict[tuple[str, str], Map]:
    """By run and metric the share of target facts whose object a probe names.

    Relations weigh by their facts. Probes trained anew come before those of the unchanged model.
    """
    compared(results)
    records = results.query(
        f"""WITH found AS (
            SELECT run_id, metric, coalesce(position, '') AS position, coalesce(layer, 0) AS layer,
                value, n, protocol = 'retrained' AS anew FROM compared
            WHERE metric IN ({", ".join(map(sql_text, METRICS))}) AND value IS NOT NULL
        ), best AS (SELECT run_id, metric, bool_or(anew) AS anew FROM found GROUP BY ALL)
        SELECT run_id, metric, position, layer, sum(value * n) / sum(n)
        FROM found JOIN best USING (run_id, metric, anew) GROUP BY ALL ORDER BY ALL"""
    )
    maps: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for run_id, metric, position, layer, share in records:
        maps.setdefault((run_id, metric), {})[position, layer] = share
    return dict(maps)


def figure(results: Results) -> Any:
    """A row of two maps for each method.

    Returns:
        A plotly Figure, or None where no run has a map.
    """
    found, begins = undertext(results), _begins(results)
    drawn = [s for s in summarise(results) if found.get((s.run.run_id, "legibility_old"))]
    if not drawn:
        return None
    maps = {(s.label, m): found.get((s.run.run_id, m), {}) for s in drawn for m in METRICS}
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
            if (layer := begins.get(summary.run.run_id)) is not None:
                figure.add_vline(
                    x=layer, row=number, col=column, line={"color": "#d55e00", "width": 1.5}
                )
    _finish(figure, len(groups), inside + _TOP + _BOTTOM)
    figure.update_xaxes(title_text="layer", row=len(drawn))
    return figure


def _begins(results: Results) -> dict[str, int]:
    """By run the lowest layer whose states the change reaches; none where nothing is changed."""
    upstream = f"contains(coalesce(note, ''), {sql_text(UPSTREAM)})"
    records = results.query(
        f"SELECT run_id, min(layer) FILTER (NOT {upstream}), bool_or({upstream}) FROM rows "
        "WHERE metric = 'legibility_old' AND layer IS NOT NULL GROUP BY ALL"
    )
    return {run_id: layer for run_id, layer, some in records if some and layer is not None}


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
