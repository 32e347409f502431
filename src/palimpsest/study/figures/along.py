"""What holds along a sequence of edits."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from palimpsest.study.figures.style import Style, axis, bars, describe, escape, layout, styles
from palimpsest.study.sequences import SHOWN, Course, Measure
from palimpsest.study.summary import Summary


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
        error_y=bars([] if course.reference else found, look.colour),
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
