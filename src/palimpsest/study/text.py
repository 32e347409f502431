"""Numbers as text, the same in every view."""

from typing import Literal

from palimpsest.study.columns import Column, Direction
from palimpsest.study.intervals import Estimate

Style = Literal["share", "number", "rank"]
"""How a column's numbers are set: two decimals, three digits, or whole."""

DASH = "\N{EN DASH}"
"""Stands for a missing value."""

MINUS = "\N{MINUS SIGN}"
"""Of negative numbers."""

_ARROWS = {"up": "↑", "down": "↓"}


def value_text(estimate: Estimate, style: Style) -> str:
    """The value as the table shows it; a dash if it is missing."""
    return DASH if estimate.value is None else _number(estimate.value, style)


def interval_text(estimate: Estimate, style: Style) -> str:
    """The 95% interval as low, dash, high; empty if there is none."""
    return DASH.join(_number(end, style) for end in _ends(estimate))


def difference_text(estimate: Estimate, style: Style) -> str:
    """A difference with its sign; a dash if it is missing."""
    return DASH if estimate.value is None else _signed(estimate.value, style)


def difference_interval(estimate: Estimate, style: Style) -> str:
    """A difference's 95% interval: low, `to`, high; empty if there is none."""
    return " to ".join(_signed(end, style) for end in _ends(estimate))


def _ends(estimate: Estimate) -> tuple[float, ...]:
    """Both ends of the interval; none if there is none."""
    low, high = estimate.low, estimate.high
    return () if low is None or high is None else (low, high)


def _signed(value: float, style: Style) -> str:
    text = _number(abs(value), style)
    zero = not any(digit in text for digit in "123456789")
    return text if zero else f"{'+' if value > 0 else MINUS}{text}"


def direction_text(column: Column) -> str:
    """An arrow for the better direction, and for whom if not for both kinds of method."""
    if column.editor == column.eraser:
        return arrow(column.editor)
    pairs = (("editor", column.editor), ("eraser", column.eraser))
    return ", ".join(f"{arrow(direction)} {who}" for who, direction in pairs if direction)


def arrow(direction: Direction) -> str:
    """↑, ↓ or nothing."""
    return _ARROWS[direction] if direction else ""


def plain(value: float | None) -> str:
    """Three significant digits, without an exponent where the number is readable without."""
    if value is None:
        return DASH
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def decimals(value: float | None) -> str:
    """Three decimals, no sign on zero; a dash if it is missing."""
    return DASH if value is None else f"{value:z.3f}"


def _number(value: float, style: Style) -> str:
    if style == "share":
        return f"{value:.2f}"
    if style == "number" and value >= 1e6:
        return f"{value:.1e}"
    if style == "number" and value < 100:
        return f"{value:.1f}"
    return f"{value:,.1f}".removesuffix(".0") if value < 100 else f"{value:,.0f}"
