"""What the command says to its user, and where."""

import argparse
import re
import traceback
from typing import NoReturn

from rich.console import Console

from palimpsest.errors import RequestError, nearest
from palimpsest.record.redact import without_secrets

CONSOLE = Console(stderr=True)


def say(text: str) -> None:
    """Print one line to stderr, as it is but for secrets."""
    CONSOLE.print(without_secrets(text), markup=False, highlight=False, soft_wrap=True)


def say_traceback(error: BaseException) -> None:
    """Print a failure of the work with its traceback."""
    say("".join(traceback.format_exception(error)).rstrip("\n"))


def quoted(text: str) -> str:
    """A text as a quoted value in Hydra's grammar, where backslashes count before quotes only."""
    return "'" + re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'") + "'"


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are wrong requests, one line each."""

    def error(self, message: str) -> NoReturn:
        """Complain as a wrong request."""
        complain(self.prog, message)


def complain(command: str, message: str) -> NoReturn:
    """Turn argparse's message into a wrong request.

    Raises:
        RequestError: always.
    """
    choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
    if choice:
        valid = re.findall(r"[\w-]+", choice[2])
        raise RequestError(
            f"expected one of {', '.join(valid)}, found {choice[1]!r}; {nearest(choice[1], valid)}"
        )
    raise RequestError(
        f"expected the arguments of `{command}`, found: {message}; see `{command} --help`"
    )
