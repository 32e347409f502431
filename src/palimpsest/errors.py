"""The exceptions that need no traceback, and how their messages are worded."""

import difflib
from collections.abc import Iterable


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


def check_at_least(name: str, value: float, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        RequestError: names the setting, the least value and what was found.
    """
    if value < least:
        raise RequestError(f"expected {name} to be at least {least}, found {value}; raise it")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Words for an error message: the closest of `valid` to `name`, or all of them.

    Example: `nearest("roem", ["rome", "leace"])` is `"did you mean 'rome'?"`.
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    return "valid: " + ", ".join(names)
