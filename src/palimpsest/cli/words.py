"""What the command says to its user, and where."""

import argparse
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from palimpsest.errors import RequestError, WriteError, nearest, visible
from palimpsest.record.redact import without_secrets


class Screen(Console):
    """A console that shows control characters of what it prints escaped, new lines excepted."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """What is to be written; of control codes only Rich's own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else _escaped(segment)

    def show(self, text: str) -> None:
        """Print a text as it is, however long."""
        self.print(text, markup=False, highlight=False, soft_wrap=True)


def _escaped(segment: Segment) -> Segment:
    lines = segment.text.split("\n")
    return segment._replace(text="\n".join(map(visible, lines)))


CONSOLE = Screen(stderr=True)


def say(text: str) -> None:
    """Print to stderr, as it is but for secrets and control characters."""
    CONSOLE.show(without_secrets(text))


def tell(error: Exception) -> int:
    """Print what its user can mend in a line, another failure with its traceback.

    Returns:
        the exit code: 2 if the request was wrong, 1 if the work failed.
    """
    code, text = explained(error)
    say(text)
    return code


def explained(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and what to print of it: a line, or a traceback of a bug."""
    if not isinstance(error, RequestError | WriteError):
        error = _in_a_line(error)
    code = 2 if isinstance(error, RequestError) else 1
    if isinstance(error, RequestError | WriteError):
        return code, f"error: {visible(str(error))}"
    return code, "".join(traceback.format_exception(error)).rstrip("\n")


def _in_a_line(error: Exception) -> Exception:
    """A full disk, wherever it was met, as what needs no traceback; any other error as it is."""
    from palimpsest.files import cannot_write

    place = getattr(error, "filename", None) or "what the command makes"
    told = cannot_write(Path(place), error)
    return told if isinstance(told, WriteError) else error


def quoted(text: str) -> str:
    """A text as a quoted value in Hydra's grammar, where backslashes count before quotes only."""
    return "'" + re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'") + "'"


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are wrong requests, one line each.

    Attributes:
        intermixed: take positional arguments after options too.
    """

    intermixed = False

    def __init__(self, *args: Any, **options: Any) -> None:
        """A parser that takes no shortened flags: what looks at words early must know them all."""
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse what is known."""
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # what is called here calls this function
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True

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
