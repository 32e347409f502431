"""What the command says to its user, and where."""

import argparse
import re
from typing import NoReturn

from rich.console import Console

from palimpsest.errors import RequestError, nearest

CONSOLE = Console(stderr=True)


def say(text: str) -> None:
    """Print one line to stderr, as it is."""
    CONSOLE.print(text, markup=False, highlight=False, soft_wrap=True)


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
