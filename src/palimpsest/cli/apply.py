"""`palimpsest apply`: a run's change of weights as a model directory, and the way back."""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from palimpsest.cli.configuration import resource
from palimpsest.cli.words import quoted, say
from palimpsest.errors import RequestError
from palimpsest.record.redact import without_secrets

if TYPE_CHECKING:
    from palimpsest.model.load import Pretrained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    add(
        "--intervention",
        type=Path,
        metavar="DIR",
        help="a run's directory; with --undo: what must have been applied",
    )
    add(
        "--model",
        required=True,
        metavar="M",
        help="a known name, a directory or a hub id; with --undo: what was written",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="must not exist, or be empty")
    add("--fact", metavar="ID", help="whose change, where each fact has its own")
    add("--step", type=int, metavar="N", help="of sequential edits: after how many (default: all)")
    add("--undo", action="store_true", help="write the original of what `apply` has written")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="model.dtype=..., model.revision=...")


def apply(options: argparse.Namespace) -> int:
    """Write the changed model, or the original of one that was changed."""
    _check_overrides(options.overrides)
    return _undo(options) if options.undo else _apply(options)


def _apply(options: argparse.Namespace) -> int:
    if options.intervention is None:
        raise RequestError(
            "expected --intervention DIR, or --undo, found neither; name a run's directory"
        )
    from palimpsest.apply import apply, choose

    chosen = choose(options.intervention, options.fact, options.step)
    dtype = [] if chosen.dtype is None else [f"model.dtype={quoted(chosen.dtype)}"]
    source = _source(_model(options.model), [*dtype, *options.overrides])
    record = apply(source, chosen, options.output, _command(options))
    say(
        f"{options.output}: {record.model['name']!r}, changed in {', '.join(record.changed)}; "
        f"fingerprint {record.fingerprint[:12]}, read back and found the same"
    )
    return 0


def _undo(options: argparse.Namespace) -> int:
    if options.fact is not None or options.step is not None:
        raise RequestError(
            "expected --undo without --fact and --step, found one of them: what was applied is "
            "undone as a whole; leave it out"
        )
    from palimpsest.apply import undo

    source = _source([f"model.path={quoted(options.model)}"], options.overrides)
    record = undo(source, options.output, options.intervention)
    say(
        f"{options.output}: {record.model['name']!r} as it was; fingerprint "
        f"{record.model['fingerprint'][:12]}, read back and found the same"
    )
    return 0


def _check_overrides(words: Sequence[str]) -> None:
    """Refuse settings of anything but the model, and what `--model` says already."""
    for word in words:
        if not re.match(r"\+{0,2}model\.(?!(path|name)=)[^=]+=", word):
            raise RequestError(
                f"expected model.KEY=VALUE beside the options, found {word!r}; --model names the "
                "model, and nothing but its own settings counts here"
            )


def _model(name: str) -> list[str]:
    """A known model's name, a directory or a hub id as overrides."""
    known = {file.stem for file in (resource("conf") / "model").glob("*.yaml")}
    return [f"model={name}"] if name in known else [f"model.path={quoted(name)}"]


def _source(model: Sequence[str], overrides: Sequence[str]) -> "Pretrained":
    """Where the model comes from; it is read into CPU memory unless told otherwise."""
    from palimpsest.cli.jobs import compose_parts

    mapped = any(word.lstrip("+").startswith("model.device_map=") for word in overrides)
    device = [] if mapped else ["model.device=cpu"]
    words = ["record=local", *device, *model, *overrides]
    source: Pretrained = compose_parts(words)["model"]
    return source


def _command(options: argparse.Namespace) -> str:
    """The command line, its options in their usual order."""
    names = ("intervention", "model", "output", "fact", "step")
    given = ((name, getattr(options, name)) for name in names)
    words = [f"--{name}={value}" for name, value in given if value is not None]
    return without_secrets(shlex.join(["palimpsest", "apply", *words, *options.overrides]))
