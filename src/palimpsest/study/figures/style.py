"""How figures look: colours that survive colour blindness, one per method, and escaped text."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from palimpsest.study.intervals import Estimate
from palimpsest.study.summary import Summary

INK = "#1f2328"
FAINT = "#8c959f"
GRID = "#e8eaed"
UNCHANGED = "#24292f"
OLD, NEW, NEITHER = "#d55e00", "#0072b2", "#d0d4d9"

_PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#b58900",
    "#56b4e9",
    "#882255",
    "#6a6f00",
    "#6a51a3",
    "#44aa99",
)
_SYMBOLS = (
    "square",
    "diamond",
    "triangle-up",
    "pentagon",
    "triangle-down",
    "hexagon",
    "star",
    "cross",
)
_GLYPHS = {
    "circle": "●○",
    "square": "■□",
    "diamond": "◆◇",
    "triangle-up": "▲△",
    "pentagon": "⬟⬠",
    "triangle-down": "▼▽",
    "hexagon": "⬢⬡",
    "star": "★☆",
    "cross": "✚✛",
}
"""A filled and an open letter like each symbol."""
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


@dataclass(frozen=True, slots=True)
class Style:
    """A method's look: a control takes the colour of the run it imitates, with open markers.

    Attributes:
        colour: as a hexadecimal RGB triple.
        symbol: plotly's name of the filled marker.
        control: whether the method is a control.
    """

    colour: str
    symbol: str
    control: bool

    @property
    def marker(self) -> str:
        """Plotly's name of the marker symbol."""
        return f"{self.symbol}-open" if self.control else self.symbol

    @property
    def glyph(self) -> str:
        """A letter like the marker, for a legend in words."""
        return _GLYPHS[self.symbol][self.control]


def styles(summaries: Sequence[Summary]) -> dict[str, Style]:
    """A style per label, in the same order for every figure of a report."""
    found: dict[str, Style] = {}
    controls = [s for s in summaries if s.imitates is not None]
    for summary in [s for s in summaries if s.imitates is None] + controls:
        model = found.get(summary.imitates or "")
        free = sum(not style.control for style in found.values())
        symbol = _SYMBOLS[free % len(_SYMBOLS)]
        if summary.method == "none":
            found[summary.label] = Style(UNCHANGED, "circle", False)
        elif model:
            found[summary.label] = Style(model.colour, model.symbol, True)
        else:
            colour = _PALETTE[(len(found)) % len(_PALETTE)]
            found[summary.label] = Style(colour, symbol, summary.imitates is not None)
    return found


def escape(text: str) -> str:
    """Text that plotly shows as it is: it reads `<b>`, `<a href>` and entities as markup."""
    return html.escape(text, quote=False)


def shorten(text: str, limit: int = 38) -> str:
    """The text, cut in the middle if it is longer than `limit`."""
    if len(text) <= limit:
        return text
    return f"{text[: limit - 12]}…{text[-11:]}"


def describe(estimate: Estimate) -> str:
    """A value with its interval and count, for a tooltip."""
    if estimate.value is None:
        return "no value"
    ends = "" if estimate.low is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]"
    return f"{estimate.value:.2f}{ends}, n = {estimate.n}"


def layout(height: int, **more: Any) -> dict[str, Any]:
    """The layout that all figures share."""
    base = {
        "template": {},
        "height": height,
        "font": {"family": _FONT, "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {
            "bgcolor": "white",
            "bordercolor": FAINT,
            "font": {"color": INK},
            "namelength": -1,
        },
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GRID, "activecolor": FAINT},
        "margin": {"l": 56, "r": 24, "t": 36, "b": 48},
    }
    return base | more


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with faint grid lines and a title."""
    base = {
        "title": {"text": title, "font": {"size": 12}, "standoff": 8},
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": FAINT,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": FAINT,
    }
    return base | more


def bars(found: Sequence[Estimate], colour: str) -> dict[str, Any]:
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
