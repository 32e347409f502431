"""Shapes that a JSON value must have; each check tells everything that is wrong with a value."""

import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from palimpsest.errors import nearest

Check = Callable[[str, Any], Iterator[str]]
"""Takes a value's place in words (`"entailed[0].prompt"`) and the value; yields complaints."""


def show(value: Any) -> str:
    """A value for an error message: in one line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def name(where: str, value: Any) -> Iterator[str]:
    """A text in one line, with no white space around it: a subject, an object, an id."""
    yield from _text(where, value, allowed="")
    if isinstance(value, str) and value.strip() and value != value.strip():
        yield f"expected {where} without white space around it, found {show(value)}; remove it"


def prompt(where: str, value: Any) -> Iterator[str]:
    """A text to be continued: it may have several lines, and ends in no white space."""
    yield from _text(where, value, allowed="\n\t")
    if isinstance(value, str) and value.strip() and value != value.rstrip():
        yield f"expected {where} to end without white space, found {show(value[-20:])}; remove it"


def listed(item: Check) -> Check:
    """A list of what `item` checks."""

    def check(where: str, value: Any) -> Iterator[str]:
        if not isinstance(value, list):
            yield _wrong_type(where, "a list", value)
            return
        for index, element in enumerate(value):
            yield from item(f"{where}[{index}]", element)

    return check


def mapped(item: Check) -> Check:
    """An object whose keys are names and whose values are what `item` checks."""

    def check(where: str, value: Any) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield _wrong_type(where, "an object", value)
            return
        for key, element in value.items():
            yield from name(f"each key of {where}", key)
            yield from item(f"{where}[{show(key)}]", element)

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check]) -> Check:
    """An object that has the `required` keys, may have the `optional` ones, and has no others."""
    checks = {**required, **optional}

    def check(where: str, value: Any) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield _wrong_type(where or "the line", "an object", value)
            return
        prefix = f"{where}." if where else ""
        for key in required:
            if key not in value:
                yield f"expected the key {prefix}{key}, found none; add it"
        for key, element in value.items():
            if key in checks:
                yield from checks[key](f"{prefix}{key}", element)
            else:
                yield f"expected a known key, found {show(prefix + key)}; {nearest(key, checks)}"

    return check


def _text(where: str, value: Any, allowed: str) -> Iterator[str]:
    if not isinstance(value, str):
        yield _wrong_type(where, "a text", value)
        return
    if not value.strip():
        yield f"expected {where} to be a text, found {show(value)}, which is empty; fill it in"
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in allowed:
            found = f"U+{ord(character):04X} in {show(value)}"
            yield f"expected {where} without control characters, found {found}; remove it"
            return


def _wrong_type(where: str, wanted: str, value: Any) -> str:
    return f"expected {where} to be {wanted}, found {show(value)}; correct it"
