"""`palimpsest ask`: one fact put to several methods, once or line by line."""

import argparse
import io
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from palimpsest.cli.words import CONSOLE, Screen, say, tell
from palimpsest.errors import RequestError, nearest

if TYPE_CHECKING:
    from palimpsest.ask.bench import Bench, Entry, Findings
    from palimpsest.ask.inquiry import Inquiry
    from palimpsest.model.handle import ModelHandle

METHODS = "none,rome,leace"
"""Compared unless others are named."""

DEFAULTS = ("contexts=2", "record=local")
"""Where a run's own settings would take longer, or write."""

WIDTH = 110
"""Columns of what is written to a file, and of the picture."""

LONGEST = 100_000
"""Characters of a typed line beyond which it is not read."""

SHOWN = 60
"""Characters of a wrong line that its error shows."""

HELP = """\
TEXT                               put a text to every method
:fact PROMPT | SUBJECT | OLD | NEW fit the methods on another fact
:help                              show this
:quit                              end, as the end of the input does"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="a text to be continued with the object")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="as in a run; METHOD:KEY=VALUE for one")
    add("--subject", help="what the prompt is about; stands in it")
    add("--old", help="the object that the model says")
    add("--new", help="the object that is to replace it")
    add("--methods", default=METHODS, help=f"names of conf/intervene (default: {METHODS})")
    add("--relation", help="what erasers are fitted on (default: the nearest)")
    add("--paraphrase", action="append", default=[], metavar="TEXT", help="another wording")
    add(
        "--question",
        action="append",
        default=[],
        metavar="'TEXT=OLD|NEW'",
        help="a question that the fact entails, and its answers by old and new object",
    )
    add(
        "--neighbor",
        action="append",
        default=[],
        metavar="'TEXT=OBJECT'",
        help="a fact that should stay",
    )
    add("--html", type=Path, metavar="FILE", help="write a self-contained page")
    add("--svg", type=Path, metavar="FILE", help="write what the terminal shows as a picture")
    add("--interactive", action="store_true", help="then take texts, a line each, from the input")


@dataclass(frozen=True)
class Output:
    """Where findings go: the terminal, and the files that were named."""

    console: Console
    html: Path | None
    svg: Path | None

    def check(self) -> None:
        """Refuse files that cannot be written, before anything is computed.

        Raises:
            RequestError: the directory is missing or not writable, the file is a directory, or
                both are one.
        """
        if self.html is not None and self.html == self.svg:
            raise RequestError(
                f"expected two files for --html and --svg, found {str(self.html)!r} for both; "
                "name another"
            )
        for option, path in (("--html", self.html), ("--svg", self.svg)):
            if path is not None:
                _check_writable(option, path)

    def write(self, findings: "Findings") -> None:
        """Print the findings, and write the files."""
        from palimpsest.ask.page import render
        from palimpsest.ask.terminal import show
        from palimpsest.files import write_text

        show(findings, self.console)
        if self.html is not None:
            write_text(self.html, render(findings))
            say(f"page: {self.html}")
        if self.svg is not None:
            write_text(self.svg, picture(findings))
            say(f"picture: {self.svg}")


def ask(options: argparse.Namespace, stdin: TextIO | None = None) -> int:
    """Compare the methods on the fact, then on what is typed."""
    _sort(options)
    for word in options.overrides:
        if "=" not in word:
            raise RequestError(
                f"expected KEY=VALUE after the prompt, found {word!r}; set the whole prompt in "
                "quotes"
            )
    inquiry = _inquiry(options)
    output = Output(_console(), options.html, options.svg)
    output.check()
    bench = _bench(options)
    if inquiry is not None:
        output.write(bench.examine(inquiry))
    if options.interactive:
        converse(bench, output, inquiry, stdin or sys.stdin)
    return 0


def _sort(options: argparse.Namespace) -> None:
    """Without a fact, what stands first is no prompt but an override."""
    alone = options.subject is None and options.old is None and options.new is None
    if options.interactive and alone and re.match(r"[^\s=]+=", options.prompt or ""):
        options.overrides, options.prompt = [options.prompt, *options.overrides], None


def _inquiry(options: argparse.Namespace) -> "Inquiry | None":
    """The fact that is asked about; None if it is to be typed."""
    from palimpsest.ask.inquiry import inquire

    fact = (options.prompt, options.subject, options.old, options.new)
    names = ("PROMPT", "--subject", "--old", "--new")
    missing = [name for name, value in zip(names, fact, strict=True) if value is None]
    if options.interactive and len(missing) == len(names):
        return None
    if missing:
        raise RequestError(
            f"expected PROMPT, --subject, --old and --new, found no {', '.join(missing)}; give "
            "them, or --interactive alone to type them"
        )
    return inquire(
        *fact,
        paraphrases=options.paraphrase,
        questions=options.question,
        neighbors=options.neighbor,
    )


def _console() -> Console:
    console = Screen()
    if not console.is_terminal:
        console.width = WIDTH
    return console


def _check_writable(option: str, path: Path) -> None:
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise RequestError(
            f"expected {option} to name a file in a directory that can be written, found {path} "
            f"({error.strerror}); make the directory or name another file"
        ) from error


# -- what is compared ------------------------------------------------------------------------------


def _bench(options: argparse.Namespace) -> "Bench":
    """The methods as runs would be made of them, the facts, the model."""
    from palimpsest.ask.bench import Bench
    from palimpsest.ask.relation import Library

    names = _names(options.methods)
    shared, own = _overrides(options.overrides, names)
    entries, parts = _entries(names, shared, own)
    with phase("facts"):
        library = Library.read(parts["facts"], parts["seed"])
        if options.relation is not None:
            library.check(options.relation)
    with phase("model"):
        model = parts["model"].load()
    bench = Bench(model, _quick(entries, own, model), library, options.relation, phase)
    for name, each in bench.moments.items():
        if not each.cached:
            say(
                f"{name}: second moments over {each.tokens:,} tokens are sampled from the "
                "model once, then cached"
            )
    return bench


def _quick(
    entries: Sequence["Entry"], own: dict[str, list[str]], model: "ModelHandle"
) -> list["Entry"]:
    """The methods with second moments over little text, unless anything of them was set."""
    from palimpsest.ask.sampling import shortened

    given = {name for name, words in own.items() if any(".moments." in word for word in words)}
    return [
        each if each.name in given else replace(each, method=shortened(each.method, model))
        for each in entries
    ]


def _names(listed: str) -> list[str]:
    """Methods' names, each once, `none` before all others."""
    names = [name.strip() for name in listed.split(",")]
    return list(dict.fromkeys(["none", *(name for name in names if name)]))


def _overrides(
    words: Sequence[str], names: Sequence[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """The overrides that all methods share, and each method's own."""
    shared: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in names}
    for word in words:
        method = re.match(r"([\w.-]+):(?=[^=]*=)", word)
        rest = word[method.end() :] if method else word
        if method is None:
            _check_shared(word, names)
            shared.append(word)
        elif method[1] not in own:
            raise RequestError(
                f"expected METHOD:KEY=VALUE with one of --methods {','.join(names)}, found "
                f"{word!r}; {nearest(method[1], names)}"
            )
        elif "@" in rest.partition("=")[0]:
            raise RequestError(
                f"expected a setting of one method, found {word!r}; pairs are for palimpsest run"
            )
        elif not re.match(r"\+{0,2}(intervene|locate)\.", rest):
            raise RequestError(
                f"expected a key of intervene or locate for one method, found {word!r}; all "
                f"methods share the rest: write {rest!r}"
            )
        else:
            own[method[1]].append(rest)
    return [word for word in DEFAULTS if not _given(word, shared)] + shared, own


def _check_shared(word: str, names: Sequence[str]) -> None:
    """Refuse settings that only one method can have."""
    if re.match(r"[+~]*intervene=", word):
        raise RequestError(
            f"expected methods in --methods, found {word!r}; write --methods "
            f"none,{word.partition('=')[2]}"
        )
    if re.match(r"\+{0,2}intervene\.", word):
        raise RequestError(
            f"expected METHOD:KEY=VALUE for a setting of one method, found {word!r}; write "
            f"{names[-1]}:{word}"
        )


def _given(default: str, words: Sequence[str]) -> bool:
    key = default.partition("=")[0]
    return any(word.lstrip("+").partition("=")[0] == key for word in words)


def _entries(
    names: Sequence[str], shared: Sequence[str], own: dict[str, list[str]]
) -> tuple[list["Entry"], Any]:
    """Each method with what chooses its site, and the parts that they share."""
    from palimpsest.ask.bench import Entry
    from palimpsest.cli.jobs import compose_parts

    parts = {name: compose_parts([f"intervene={name}", *shared, *own[name]]) for name in names}
    entries = [Entry(name, each["intervene"], each["locate"]) for name, each in parts.items()]
    return entries, parts["none"]


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Show on stderr what is being done, then how long it took."""
    begun = time.monotonic()
    with CONSOLE.status(f"{what} ..."):
        yield
    say(f"{what}: {time.monotonic() - begun:.1f} s")


# -- line by line ----------------------------------------------------------------------------------


def converse(bench: "Bench", output: Output, inquiry: "Inquiry | None", stdin: TextIO) -> None:
    """Take lines until `:quit` or the end of the input; a wrong one is told, and passed over."""
    if isinstance(stdin, io.TextIOWrapper):
        stdin.reconfigure(errors="backslashreplace")
    say("a text to be continued, or :help")
    for line in _lines(stdin):
        if line == ":quit":
            return
        try:
            inquiry = _take(bench, output, inquiry, line)
        except RequestError as error:
            tell(error)


def _lines(stdin: TextIO) -> Iterator[str]:
    """The lines that hold something, without white space around them; too long ones are told."""
    while True:
        if stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = stdin.readline(LONGEST + 1)
        if not line:
            return
        if len(line) > LONGEST and not line.endswith("\n"):
            _pass_over(stdin)
        elif line.strip():
            yield line.strip()


def _pass_over(stdin: TextIO) -> None:
    """Read to the end of a line that is too long, a part at a time, and tell."""
    while (part := stdin.readline(LONGEST)) and not part.endswith("\n"):
        pass
    tell(
        RequestError(
            f"expected a line of at most {LONGEST} characters, found a longer one; shorten it"
        )
    )


def _take(bench: "Bench", output: Output, inquiry: "Inquiry | None", line: str) -> "Inquiry | None":
    """Do what a line says; the inquiry that the methods are fitted on from then on."""
    from palimpsest.ask.terminal import show_replies

    if line == ":help":
        say(HELP)
    elif line.split()[0] == ":fact":
        inquiry = _typed(line.removeprefix(":fact"))
        output.write(bench.examine(inquiry))
    elif line.startswith(":"):
        found = line.split()[0][:SHOWN]
        raise RequestError(
            f"expected :fact, :help or :quit, found {found!r}; "
            f"{nearest(found, [':fact', ':help', ':quit'])}"
        )
    elif inquiry is None:
        raise RequestError(
            "expected a fact first, found a text to be continued; type :fact PROMPT | SUBJECT | "
            "OLD | NEW"
        )
    else:
        show_replies(bench.reply(line, inquiry.fact.subject), output.console)
    return inquiry


def _typed(text: str) -> "Inquiry":
    from palimpsest.ask.inquiry import inquire

    parts = [part.strip() for part in text.split("|")]
    if len(parts) != 4:
        raise RequestError(
            f"expected :fact PROMPT | SUBJECT | OLD | NEW, found {len(parts)} part(s) in "
            f"{text.strip()[:SHOWN]!r}; set three bars"
        )
    return inquire(*parts)


# -- the picture -----------------------------------------------------------------------------------


def picture(findings: "Findings") -> str:
    """What the terminal shows, as an SVG that fetches nothing."""
    from palimpsest.ask.terminal import show

    console = Console(
        record=True, file=io.StringIO(), width=WIDTH, force_terminal=True, color_system="truecolor"
    )
    show(findings, console)
    svg = console.export_svg(title="palimpsest ask", unique_id="ask")
    svg = re.sub(r"@font-face\s*\{[^}]*\}", "", svg)
    return re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
