"""The one exception that means *the request was wrong*, and how its message is worded."""

import difflib
from collections.abc import Iterable


class RequestError(Exception):
    """What was asked for cannot be done as asked.

    The message is one line saying what was expected, what was found and what to do. The command
    prints it without a traceback and exits with code 2; every other exception is a bug or a failure
    of the work itself (exit code 1).
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
