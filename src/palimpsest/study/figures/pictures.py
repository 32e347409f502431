"""The figures of causal tracing as PNG and PDF, for papers: the same three as on the page."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from palimpsest.study.figures.style import FAINT, GRID
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
from palimpsest.study.traces import (
    GROUPS,
    TracedFact,
    TraceView,
    average_map,
    band,
    traced_facts,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = {"solid": "-", "dash": "--", "dashdot": "-.", "dot": ":"}
_WIDTH, _MARGIN = 2.3, 1.7
"""Width of a panel, and of what stands beside the panels, in inches."""
_ROW = 0.165
"""Height of a row of a heat map, in inches."""


def of(view: TraceView) -> list[tuple[str, Callable[[TraceView], "Figure"]]]:
    """A trace run's pictures: their names, and what draws each.

    `aie`, `average` and, for the first facts, `fact-0`, `fact-1`, ...; those of which nothing was
    traced are left out.
    """
    whole = [("aie", _curves), ("average", _average)] if view.groups else []
    facts = [(f"fact-{n}", partial(_fact, traced=f)) for n, f in enumerate(traced_facts(view))]
    return [*whole, *facts]


def _fact(view: TraceView, traced: TracedFact) -> "Figure":
    """One fact's indirect effects by token and layer; the subject's tokens are starred."""
    figure = _heat_maps(view, traced.maps, token_texts(traced))
    figure.suptitle(fact_title(traced), fontsize=9)
    return figure


def _average(view: TraceView) -> "Figure":
    """AIE by position group and layer."""
    maps = {protocol: average_map(view, protocol) for protocol in view.protocols}
    figure = _heat_maps(view, maps, [GROUPS[group] for group in view.groups])
    figure.suptitle(f"average {EFFECT}", fontsize=9)
    return figure


def _curves(view: TraceView) -> "Figure":
    """AIE by layer, a line for each position group, with 95% intervals."""
    figure, panels = _panels(view, 1.7)
    for axes, protocol in zip(panels, view.protocols, strict=True):
        axes.axhline(0, color=FAINT, linewidth=0.6)
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        for group, found in view.curves[protocol].items():
            _add_curve(axes, group, found)
    panels[0].set_ylabel(f"average {EFFECT}")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    named = [lines[GROUPS[group]] for group in view.groups]
    columns = min(COLUMNS, len(view.protocols))
    figure.legend(handles=named, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def _add_curve(axes: "Axes", group: str, found: Mapping[int, Estimate]) -> None:
    colour, dash = GROUP_COLOURS[group], _DASHES[GROUP_DASHES[group]]
    values = np.array([e.value for e in found.values()], dtype=np.float64)
    marker = "o" if len(found) < 3 else ""
    line = axes.plot(list(found), values, color=colour, linestyle=dash, marker=marker)
    line[0].set_label(GROUPS[group])
    axes.fill_between(*band(found), color=colour, alpha=0.16, linewidth=0)


def _panels(view: TraceView, height: float) -> tuple["Figure", list["Axes"]]:
    """A figure with titled panels of a height in inches, one for each protocol."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(view.protocols))
    rows = math.ceil(len(view.protocols) / columns)
    size = (_MARGIN + columns * _WIDTH, 0.8 + rows * (height + 0.6))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[len(view.protocols) :]:
        axes.remove()
    for axes, protocol in zip(panels, view.protocols, strict=False):
        axes.set_title(view.title(protocol))
        axes.set_xlabel("layer")
        axes.tick_params(labelbottom=True, length=2.5, width=0.6)
        axes.locator_params(axis="x", integer=True)
    return figure, panels[: len(view.protocols)]


def _heat_maps(view: TraceView, maps: Mapping[str, Floats], names: Sequence[str]) -> "Figure":
    """A heat map for each protocol over the same rows, in one colour scale."""
    from matplotlib.colors import LinearSegmentedColormap

    low, high = limits(maps.values())
    colours = LinearSegmentedColormap.from_list(EFFECT, colour_stops(low, high))
    figure, panels = _panels(view, _ROW * max(len(names), 4))
    for axes, protocol in zip(panels, view.protocols, strict=True):
        edges = (_edges(view.layers), np.arange(len(names) + 1) - 0.5)
        mesh = axes.pcolormesh(
            *edges, maps[protocol], cmap=colours, vmin=low, vmax=high, rasterized=True
        )
        axes.set_facecolor(NOTHING)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    for axes in panels:
        axes.tick_params(axis="y", length=0)
    bar = figure.colorbar(
        mesh, ax=panels, label=EFFECT, pad=0.02, aspect=10 * figure.get_figheight()
    )
    bar.outline.set_visible(False)
    return figure


def _edges(layers: Sequence[int]) -> Floats:
    """Where the columns of layers begin and end: halfway between them, `[layers + 1]`."""
    centres = np.array(layers, dtype=np.float64)
    gaps = np.diff(centres) / 2 if len(centres) > 1 else np.array([0.5])
    middle = centres[:-1] + gaps[: len(centres) - 1]
    return np.concatenate([[centres[0] - gaps[0]], middle, [centres[-1] + gaps[-1]]])
