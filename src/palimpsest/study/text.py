"""Numbers as text, the same in every view."""

import re

from palimpsest.study.intervals import Estimate
from palimpsest.study.table import Cell, Direction, Heading, Style, Words

DASH = "\N{EN DASH}"
"""Stands for a missing value."""

MINUS = "\N{MINUS SIGN}"
"""Of negative numbers."""

_ARROWS = {"up": "↑", "down": "↓"}


def cell_text(cell: Cell, style: Style, signed: bool = False) -> str:
    """A cell as tables show it; a dash for an estimate without a value."""
    if isinstance(cell, Estimate):
        return value_text(cell, style, signed)
    if cell is None:
        return ""
    if isinstance(cell, Words):
        return cell.text
    return _number(cell, style) if isinstance(cell, float) else str(cell)


def value_text(estimate: Estimate, style: Style, signed: bool = False) -> str:
    """An estimate's value; a dash if it is missing."""
    if estimate.value is None:
        return DASH
    return _signed(estimate.value, style) if signed else _number(estimate.value, style)


def interval_text(cell: Cell, style: Style, signed: bool = False) -> str:
    """An estimate's 95% interval as low, dash (or `to`), high; empty if there is none."""
    if not isinstance(cell, Estimate) or cell.low is None or cell.high is None:
        return ""
    number = _signed if signed else _number
    return (" to " if signed else DASH).join(number(end, style) for end in (cell.low, cell.high))


def brief(text: str) -> str:
    """Numbers without the zero before their point."""
    return re.sub(r"\b0(?=\.)", "", text)


def _signed(value: float, style: Style) -> str:
    text = _number(abs(value), style)
    zero = not any(digit in text for digit in "123456789")
    return text if zero else f"{'+' if value > 0 else MINUS}{text}"


def direction_text(heading: Heading) -> str:
    """An arrow for the better direction, and for whom if not for both kinds of method."""
    if heading.editor == heading.eraser:
        return arrow(heading.editor)
    pairs = (("editor", heading.editor), ("eraser", heading.eraser))
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
    if style in ("plain", "words"):
        return plain(value)
    if style == "decimals":
        return decimals(value)
    if style == "share":
        return f"{value:.2f}"
    if style == "number" and value >= 1e6:
        return f"{value:.1e}"
    if style == "number" and value < 100:
        return f"{value:.1f}"
    return f"{value:,.1f}".removesuffix(".0") if value < 100 else f"{value:,.0f}"
