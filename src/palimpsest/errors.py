"""The exceptions that need no traceback, and how their messages are worded."""

import difflib
import math
import unicodedata
from collections.abc import Iterable

LARGEST_SEED = 2**63 - 1
"""What every generator takes."""

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode's categories of what controls a terminal, or cannot be seen."""


class RequestError(Exception):
    """What was asked for cannot be done as asked.

    The message is one line saying what was expected, what was found and what to do. The command
    prints it without a traceback and exits with code 2; every other exception is a bug or a failure
    of the work itself (exit code 1), which only `WriteError` tells without a traceback.
    """


class WriteError(Exception):
    """What was computed cannot be kept: the disk is full, or a quota is used up.

    The request was right and the work is not done (exit code 1). The message is one line with the
    file, the cause and what to do; no traceback says more.
    """


class Stopped(BaseException):
    """A signal asked the process to end.

    As with `KeyboardInterrupt`, code that goes on after an `Exception` does not go on after it.
    The message is `stopped by SIGTERM`; the command prints it and exits with code 1.
    """

    def __init__(self, signal: str) -> None:
        """Take the signal's name, e.g. `SIGTERM`."""
        super().__init__(signal)

    def __str__(self) -> str:
        """What run.json tells."""
        return f"stopped by {self.args[0]}"


def check_at_least(name: str, value: float, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        RequestError: names the setting, the least value and what was found.
    """
    if value < least:
        raise RequestError(f"expected {name} to be at least {least}, found {value}; raise it")


def check_number(
    name: str, value: float, *, above: float | None = None, least: float | None = None
) -> None:
    """Refuse a number that is not finite, not above `above`, or less than `least`.

    Raises:
        RequestError: names the setting, what it may be and what was found.
    """
    low = (above is not None and value <= above) or (least is not None and value < least)
    if math.isfinite(value) and not low:
        return
    bound = "" if above is None else f" above {above:g}"
    bound = bound if least is None else f" of {least:g} or more"
    raise RequestError(
        f"expected {name} to be a finite number{bound}, found {value}; set such a one"
    )


def check_seed(name: str, value: int) -> None:
    """Refuse a seed that not every generator takes.

    Raises:
        RequestError: it is negative or too large.
    """
    if not 0 <= value <= LARGEST_SEED:
        raise RequestError(
            f"expected {name} from 0 to {LARGEST_SEED}, found {value}; choose another seed"
        )


def visible(text: str) -> str:
    """The text with every control or formatting character escaped, a new line among them."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _HIDDEN else c
        for c in text
    )


def nearest(name: str, valid: Iterable[str]) -> str:
    """Words for an error message: the closest of `valid` to `name`, or all of them.

    Example: `nearest("roem", ["rome", "leace"])` is `"did you mean 'rome'?"`.
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    return "valid: " + ", ".join(names)
