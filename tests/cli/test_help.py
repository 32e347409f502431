"""The help of every subcommand ends with examples, and these can be run."""

import shlex

import pytest

from palimpsest.cli import EXAMPLES, _parser
from palimpsest.cli.jobs import _flags_first, compose_parts

LINES = [(name, line) for name, lines in EXAMPLES.items() for line in lines]


def commands(parser, prefix=()):
    """The names of all subcommands, those within others too."""
    for action in parser._actions:
        for name, inner in (action.choices or {}).items() if action.dest == "==SUPPRESS==" else ():
            yield " ".join((*prefix, name))
            yield from commands(inner, (*prefix, name))


def test_every_subcommand_has_examples():
    assert set(commands(_parser())) == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_shows_the_examples_a_line_each(call, name):
    outcome = call(*name.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    shown = outcome.out.partition("\nexamples:\n")[2].splitlines()
    assert shown == [f"  {line}" for line in EXAMPLES[name]]


@pytest.mark.parametrize(("name", "line"), LINES)
def test_an_example_parses(name, line):
    program, *words = shlex.split(line)
    assert program == "palimpsest"
    assert line.startswith(f"palimpsest {name}")
    if name in ("run", "trace"):
        _flags_first(name, words[1:])
    else:
        options = _parser().parse_args(words)
        assert callable(options.call)


@pytest.mark.parametrize("line", EXAMPLES["run"])
def test_an_example_of_run_composes(line, monkeypatch, tmp_path):
    words = [word for word in shlex.split(line)[2:] if "=" in word]
    assert compose_parts([word.partition(",")[0] for word in words])
