"""One fact's objects under the logit lens."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from palimpsest.record.results import Results, sql_text
from palimpsest.study.curves import Point, curves
from palimpsest.study.figures.style import GRID, Style, axis, escape, layout, shorten, styles
from palimpsest.study.summary import Summary, summarise

Curves = Mapping[tuple[Any, ...], list[Point]]
"""Ranks by run id, metric and fact."""


def rank_curves(results: Results, facts: Sequence[str]) -> Curves:
    """The ranks of some facts' old and new objects."""
    if not facts:
        return {}
    condition = (
        "metric IN ('lens_rank_old', 'lens_rank_new') AND protocol = 'logit_lens' "
        f"AND budget IS NULL AND fact_id IN ({', '.join(map(sql_text, facts))})"
    )
    return curves(results, condition, ["metric", "fact_id"])


def ranks(results: Results, found: Curves, fact_id: str) -> Any:
    """One fact's old and new object: rank under the logit lens by layer, rank 1 on top.

    Args:
        results: the runs.
        found: of `rank_curves`.
        fact_id: the fact.

    Returns:
        A plotly Figure, or None.
    """
    summaries = summarise(results)
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
            points = found.get((summary.run.run_id, metric, fact_id))
            if points:
                named = any(trace.legendgroup == escape(summary.label) for trace in figure.data)
                trace = _rank_line(summary, looks[summary.label], points, named)
                figure.add_trace(trace, 1, column)
                highest = max(highest, *trace.y)
    if not figure.data:
        return None
    _finish_ranks(figure, highest, len(summaries))
    return figure


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
