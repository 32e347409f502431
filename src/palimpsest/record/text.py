"""Numbers as text, the same in every view."""

from typing import Literal

from palimpsest.record.columns import Column, Direction
from palimpsest.record.intervals import Estimate

DASH = "\N{EN DASH}"
"""Stands for a missing value."""

MINUS = "\N{MINUS SIGN}"
"""Of negative numbers."""

_ARROWS = {"up": "↑", "down": "↓"}


def value_text(estimate: Estimate, style: Literal["share", "number", "rank"]) -> str:
    """The value as the table shows it; a dash if it is missing."""
    return DASH if estimate.value is None else _number(estimate.value, style)


def interval_text(estimate: Estimate, style: Literal["share", "number", "rank"]) -> str:
    """The 95% interval as low, dash, high; empty if there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{_number(estimate.low, style)}{DASH}{_number(estimate.high, style)}"


def difference_text(estimate: Estimate, style: Literal["share", "number", "rank"]) -> str:
    """A difference with its sign; a dash if it is missing."""
    return DASH if estimate.value is None else _signed(estimate.value, style)


def difference_interval(estimate: Estimate, style: Literal["share", "number", "rank"]) -> str:
    """A difference's 95% interval: low, `to`, high; empty if there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{_signed(estimate.low, style)} to {_signed(estimate.high, style)}"


def _signed(value: float, style: Literal["share", "number", "rank"]) -> str:
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


def _number(value: float, style: Literal["share", "number", "rank"]) -> str:
    if style == "share":
        return f"{value:.2f}"
    if style == "number" and value >= 1e6:
        return f"{value:.1e}"
    if style == "number" and value < 100:
        return f"{value:.1f}"
    return f"{value:,.1f}".removesuffix(".0") if value < 100 else f"{value:,.0f}"
