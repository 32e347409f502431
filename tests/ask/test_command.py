"""`palimpsest ask` as a command: once, wrongly, and line by line."""

import io
import re
import time
from pathlib import Path

import pytest

from palimpsest.cli import _parser
from palimpsest.cli.ask import LONGEST, ask, converse
from tests.ask.surroundings import lived, overrides


@pytest.fixture
def words(tiny):
    """A quick command about a city of the tiny model."""
    subject, old = lived(tiny, "P17")
    new = "Japan" if old != "Japan" else "Kenya"
    prompt = f"The city of {subject} lies in"
    return ["ask", prompt, "--subject", subject.upper(), "--old", old, "--new", new,
            *overrides(tiny)]  # fmt: skip


def changed(words, **options):
    """The command with other options; None takes one away."""
    found = list(words)
    for name, value in options.items():
        place = 1 if name == "prompt" else found.index(f"--{name}") + 1
        if value is None:
            del found[place - (name != "prompt") : place + 1]
        else:
            found[place] = value
    return found


def test_the_command_prints_and_writes(call, words):
    outcome = call(*words, "--html", "a.html", "--svg", "a.svg", "--methods", "rome")
    assert outcome.code == 0, outcome.err
    assert re.search(r"^rome\b", outcome.out, re.MULTILINE)
    assert not re.search(r"^leace\b", outcome.out, re.MULTILINE)
    assert "\x1b" not in outcome.out
    assert Path("a.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert Path("a.svg").read_text(encoding="utf-8").lstrip().startswith("<svg")
    assert "rome: fit" in outcome.err
    assert sorted(path.name for path in Path().iterdir()) == ["a.html", "a.svg"]


def test_a_setting_of_one_method(call, words):
    outcome = call(*words, "leace:locate.layer=2", "rome:intervene.variant=plain")
    assert outcome.code == 0, outcome.err
    assert "changes layer 2, residual" in outcome.out
    assert "changes layer 0, mlp" in outcome.out


def test_a_named_relation_is_taken(call, words):
    outcome = call(*words, "--relation", "P103")
    assert outcome.code == 0, outcome.err
    assert "Relation P103, as named." in outcome.out


def waits(outcome):
    """The lines that tell that second moments are not there yet."""
    return [line for line in outcome.err.splitlines() if "sampled from the model once" in line]


def test_second_moments_are_few_and_waited_for_once(call, words, tmp_path, monkeypatch):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "own"))
    words = [*words, "--methods", "rome,random_delta,rome_plain"]
    first = call(*words)
    assert waits(first) == [
        f"{name}: second moments over 96 tokens are sampled from the model once, then cached"
        for name in ("rome", "random_delta")
    ]
    said = " ".join(first.out.split())
    for name, key in (("rome", "moments"), ("random_delta", "base.moments")):
        assert f"{name}: second moments over 96 sampled tokens, to be quick; " in said
        assert f"{name}:intervene.{key}.tokens=null takes a run's 640." in said
    assert "rome_plain: second moments" not in said
    assert waits(call(*words)) == []
    assert len(waits(call(*words, "locate.layer=1"))) == 2


def test_all_of_a_run_s_second_moments(call, words, tmp_path, monkeypatch):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "own"))
    (tmp_path / "own" / "moments").mkdir(parents=True)
    outcome = call(*words, "--methods", "rome", "rome:intervene.moments.tokens=null")
    assert waits(outcome)[0].startswith("rome: second moments over 640 tokens")
    assert "sampled tokens" not in outcome.out


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"prompt": "The city lies in"}, [], r"holds its subject '\w+', found 'The city lies in';"),
        ({"prompt": ""}, [], r"expected a text for prompt, found an empty one; write"),
        ({"prompt": "x "}, [], r"expected prompt without white space at its ends, found 'x '; rem"),
        ({"old": ""}, [], r"expected a text for old, found an empty one"),
        ({"new": ""}, [], r"expected a text for new, found an empty one"),
        ({"old": "Japan", "new": "JAPAN"}, [], r"two different objects, found 'Japan' .*; name an"),
        ({"old": None}, [], r"--old and --new, found no --old; give them, or --interactive alone"),
        ({}, ["--methods", "roem"], r"intervene to be one of .*found 'roem'; did you mean 'rome'"),
        ({}, ["--relation", "P13"], r"--relation to be one of P103, P17 .* found 'P13'; did you"),
        ({}, ["--question", "Who?"], r"expected --question 'TEXT=OLD\|NEW', found 'Who\?'; write"),
        ({}, ["--neighbor", "Who?"], r"expected --neighbor 'TEXT=OBJECT', found 'Who\?'; write"),
        ({}, ["--html", "gone/a.html"], r"expected --html to name a file .* found gone/a\.html \("),
        ({}, ["--html", "."], r"expected --html to name a file .* found \. \(Is a directory\); ma"),
        ({}, ["--svg", "/proc/a.svg"], r"expected --svg to name a file .* found /proc/a\.svg \("),
        ({}, ["--htlm", "a"], r"expected the arguments of `palimpsest.*`, found: .*--htlm"),
        ({}, ["locate.layer=9"], r"a layer from 0 to 3 for model, found 9; set locate\.layer"),
        ({}, ["locate.lyer=1"], r"found 'locate\.lyer'; did you mean 'locate\.layer'"),
        ({}, ["locate.layer"], r"expected KEY=VALUE after the prompt, found 'locate\.layer'"),
        (
            {},
            ["--methods", "erase_then_edit", "erase_then_edit:intervene.first_layer=1"],
            r"expected single methods, found erase_then_edit, .*leave it out of --methods",
        ),
        ({}, ["intervene=rome"], r"expected methods in --methods, found 'intervene=rome'; write"),
        ({}, ["intervene.variant=plain"], r"METHOD:KEY=VALUE .* found 'intervene\.variant=plain'"),
        ({}, ["roem:locate.layer=1"], r"METHOD:KEY=VALUE .* found 'roem:.*; did you mean 'rome'"),
        ({}, ["rome:seed=1"], r"a key of intervene or locate .* 'rome:seed=1'; .*: write 'seed=1'"),
        ({}, ["rome:intervene.vriant=x"], r"found 'intervene\.vriant'; did you mean"),
        ({}, ["facts.path=gone.json"], r"expected .* gone\.json, found .*facts\.path"),
        ({}, ["model.path=gone"], r"found 'gone' .*; set model\.path"),
    ],
)  # fmt: skip
def test_wrong_requests(call, words, options, more, message):
    outcome = call(*changed(words, **options), *more)
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last), last
    assert ": fit" not in outcome.err
    assert "Traceback" not in outcome.err


def test_a_prompt_longer_than_the_model(call, words):
    long = f"{'far ' * 600}{words[1]}"
    outcome = call(*changed(words, prompt=long))
    assert outcome.code == 2
    assert re.search(r"a prompt of at most \d+ tokens for model, found \d+; shorten", outcome.err)


# -- line by line ----------------------------------------------------------------------------------


class Typed:
    """What someone types."""

    def __init__(self, *lines):
        self.lines = [f"{line}\n" for line in lines]

    def isatty(self):
        return False

    def readline(self, size):
        if not self.lines:
            return ""
        line = self.lines.pop(0)
        if len(line) > size:
            self.lines.insert(0, line[size:])
        return line[:size]


@pytest.fixture
def typed(tiny, words, capfd):
    """Type lines; the exit code, stdout, and the lines of stderr after the invitation."""

    def run(*lines, fact=False):
        given = words if fact else ["ask", *overrides(tiny)]
        options = _parser().parse_args([*given, "--interactive", "--methods", "rome"])
        code = ask(options, Typed(*lines))
        out, err = capfd.readouterr()
        return code, out, err.partition(":help\n")[2].splitlines()

    return run


def test_lines_are_put_to_every_method(typed, words):
    code, out, err = typed(words[1], fact=True)
    assert (code, err) == (0, [])
    said = dict(line.split()[:2] for line in out.splitlines()[-2:])
    assert list(said) == ["none", "rome"]
    assert said["none"] == words[5]


def test_a_fact_is_fitted_and_wrong_lines_are_passed_over(typed, words):
    fact = " | ".join((words[1], words[3], words[5], words[7]))
    code, out, err = typed(
        "hello",
        ":fact a | b",
        f":fact {fact}",
        "",
        ":fcat",
        "\x1b[31m \udcff",
        ":help",
        ":quit",
        "x",
    )
    assert code == 0
    assert "Collateral" in out
    told = [line for line in err if line.startswith("error: ")]
    assert [bool(re.search(pattern, line)) for pattern, line in zip((
        r"expected a fact first, found a text",
        r":fact PROMPT \| SUBJECT \| OLD \| NEW, found 2 part\(s\) in 'a \| b'; set three bars",
        r"expected :fact, :help or :quit, found ':fcat'; did you mean ':fact'",
        r"UTF-8",
    ), told, strict=True)] == [True] * 4  # fmt: skip
    assert any(line.startswith(":quit") for line in err)
    assert "\x1b" not in out + "".join(err)


class Endless(io.TextIOBase):
    """A line of a hundred million characters, then others; counts what it hands out at a time."""

    def __init__(self, rest):
        self.left, self.rest, self.most = 100_000_000, io.StringIO(rest), 0

    def readline(self, size=-1):
        if not self.left:
            return self.rest.readline(size)
        assert size > 0
        self.most = max(self.most, size)
        size = min(size, self.left)
        self.left -= size
        return "x" * size + ("" if self.left else "\n")


def test_a_line_without_end_is_passed_over_without_a_model(capfd):
    typed = Endless(":help\nhello\n:quit\n")
    begun = time.monotonic()
    converse(None, None, None, typed)
    assert time.monotonic() - begun < 10
    assert typed.most <= LONGEST + 1
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told[0] == (
        f"error: expected a line of at most {LONGEST} characters, found a longer one; shorten it"
    )
    assert told[1].startswith("error: expected a fact first")


@pytest.mark.parametrize("extra", [0, 1])
def test_a_line_of_just_that_length_is_taken(capfd, extra):
    converse(None, None, None, io.StringIO(":" + "x" * (LONGEST - 1 + extra) + "\n:quit\n"))
    [told] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ("a line of at most" in told) == bool(extra)
    assert len(told) < 200


def test_the_end_of_the_input_ends_it(typed):
    assert typed() == (0, "", [])
