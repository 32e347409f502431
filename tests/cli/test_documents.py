"""A sweep file means the same to Hydra and to wandb's agents, and is read within limits."""

import re

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from palimpsest.cli.conversion import convert
from palimpsest.cli.documents import LONGEST, read_document
from palimpsest.cli.door import MOST, check_count, from_agent
from palimpsest.cli.sweeps import sweep_overrides
from palimpsest.errors import RequestError

HEAD = "method: grid\nparameters:\n"


def write(tmp_path, content):
    path = tmp_path / "s.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def by_hydra(file, key="key"):
    """The value that a job of `palimpsest sweep` gets."""
    words = [word for word in sweep_overrides(file) if word.startswith(f"{key}=")]
    return OverridesParser.create().parse_override(words[0]).value()


def by_agent(file, key="key"):
    """The value that a run of wandb's agent gets: PyYAML's reading, written by Python."""
    value = yaml.safe_load(file.read_text())["parameters"][key]["value"]
    [word] = from_agent([f"{key}={value}"])
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("5e-1", 0.5),
        ("1e-4", 1e-4),
        ("1e3", 1000.0),
        ("1.5e3", 1500.0),
        ("1.0e-4", 1e-4),
        ("-2e5", -2e5),
        ("+1e2", 100.0),
        (".5", 0.5),
        (".5e1", 5.0),
        ("1.", 1.0),
        ("-0.25", -0.25),
        ("1_000", 1000),
        ("+5", 5),
        ("17", 17),
        ("yes", True),
        ("no", False),
        ("on", True),
        ("Off", False),
        ("true", True),
        ("y", "y"),
        ("010", 8),
        ("0x10", 16),
        ("0o10", "0o10"),
        ("1:30", 90),
        ("09", "09"),
        ("2026-11-30", "2026-11-30"),
        ("12e", "12e"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("rome", "rome"),
        ("P17", "P17"),
        ("[0.5, 1, P17]", [0.5, 1, "P17"]),
        ("[]", []),
        ("{target: 0.1, test: 0.9}", {"target": 0.1, "test": 0.9}),
        ("{mlp: {early: 5}}", {"mlp": {"early": 5}}),
    ],
)
def test_a_value_means_the_same_to_hydra_and_to_an_agent(tmp_path, written, wanted):
    file = write(tmp_path, f"{HEAD}  key: {{value: {written}}}\n")
    assert repr(by_hydra(file)) == repr(by_agent(file)) == repr(wanted)


@pytest.mark.parametrize(
    ("written", "kind", "wanted"),
    [
        ("[5e-1, 1]", list[float], [0.5, 1.0]),
        ("{target: 1e-1, test: 9e-1}", dict[str, float], {"target": 0.1, "test": 0.9}),
        ("null", int | None, None),
        ("[null, 1]", list[int | None], [None, 1]),
    ],
)
def test_what_an_agent_writes_in_quotes_is_the_same_when_converted(tmp_path, written, kind, wanted):
    file = write(tmp_path, f"{HEAD}  key: {{value: {written}}}\n")
    assert convert(kind, by_hydra(file), "key") == wanted
    assert convert(kind, by_agent(file), "key") == wanted


@pytest.mark.parametrize("written", ['"5e-1"', "'17'", '"true"', '"2026-11-30"'])
def test_what_is_quoted_stays_text(tmp_path, written):
    assert by_hydra(write(tmp_path, f"{HEAD}  key: {{value: {written}}}\n")) == written[1:-1]


# -- a run that an agent starts again --------------------------------------------------------------

AGAIN = [
    "_wandb={'cli_version': '0.31.0', 't': {'1': [1, 2]}, 'e': {'x1': {'args': ['run']}}}",
    "contexts=2",
    "evaluate={'_target_': 'palimpsest.evaluate.ruler.Ruler', 'lens': None}",
    "facts={'_target_': 'palimpsest.facts.world.World', 'limit': 24, 'classes': ['BR', 'CN']}",
    "facts.limit=24",
    "intervene=rome",
    "model={'_target_': 'palimpsest.model.load.Pretrained', 'path': None, 'prefix': '\\n'}",
    "record={'_target_': 'palimpsest.record.recording.Recording', 'sweep': \"it's\"}",
    "record.sweep=quickstart",
    "seed=0",
]


def test_a_run_that_an_agent_starts_again_gets_the_sweep_s_own_parameters():
    kept = [word for word in AGAIN if "_target_" not in word and not word.startswith("_wandb")]
    assert from_agent(AGAIN) == kept
    assert len(kept) == 5


def test_the_command_takes_the_words_of_a_run_started_again(call):
    outcome = call("run", *AGAIN, "--cfg", "job")
    assert (outcome.code, outcome.err) == (0, "")
    shown = yaml.safe_load(outcome.out)
    first = call("run", *from_agent(AGAIN), "--cfg", "job")
    assert shown == yaml.safe_load(first.out)
    assert shown["record"]["sweep"] == "quickstart"


def test_mappings_of_an_agent_are_put_into_hydra_s_grammar():
    words = ["facts.shares={'target': 0.5, 'test': 0.5}", "a={b: 1}", "c={}", "d={'x'", "e=1"]
    assert from_agent(words) == ["facts.shares={target:0.5,test:0.5}", *words[1:]]


def test_a_part_as_a_mapping_sets_the_part_s_keys(call):
    outcome = call("run", AGAIN[6].replace("'path': None", "'path': 'a b'"), "--cfg", "job")
    assert (outcome.code, outcome.err) == (0, "")
    assert yaml.safe_load(outcome.out)["model"]["path"] == "a b"


# -- limits ----------------------------------------------------------------------------------------

NINE = ",".join("x" * 9)
BOMB = f"a0: &a0 [{NINE}]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 40)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{HEAD}  seed: {{value: 1}}".encode("utf-16"), r"expected UTF-8 text in .*, found"),
        (
            HEAD.encode() + b"  facts.path: {value: caf\xe9}",
            r"UTF-8 text in .* at byte 50; convert",
        ),
        (
            b"a: " + b"x" * LONGEST,
            rf"expected at most {LONGEST} bytes in .*, found more; divide it",
        ),
        ("[" * 5000 + "]" * 5000, r"at most 100 levels in .*, found in line 1 more; simplify it"),
        ("{a: " * 50_000, r"at most 100 levels in .*, found in line 1 more"),
        (
            "".join(" " * i + "a:\n" for i in range(900)),
            r"100 levels in .*, found in line 100 more",
        ),
        ("method: grid\nparameters: &p {seed: *p}", r"found in line 2 the anchor 'p' in itself;"),
        ("- &a [*a]", r"found in line 1 the anchor 'a' in itself; write it out"),
        (BOMB, r"characters with every alias written out in .*, found in line \d+ more"),
        (MERGES, r"characters with every alias written out in .*, found in line \d+ more"),
        (
            "a: !!python/object/apply:os.getcwd []",
            r"expected plain values in .* found in line 1 the",
        ),
        ("a: !!int ''", r"expected plain values in .*, found in line 1 the tag '.*int'; leave it"),
        ("a: !!timestamp x", r"expected plain values in .*, found in line 1 the tag"),
        ("method: grid\nmethod: grid", r"expected YAML in .*found the key 'method' twice"),
        ("? [a]\n: b", r"expected YAML in .*unhashable"),
        ("a: <<", r"expected YAML in .*; mend it$"),
        ("a: =", r"expected YAML in .*; mend it$"),
        ("a: 1\n---\nb: 2", r"expected YAML in .*single document"),
        (b"a: \x00", r"expected YAML in .*; mend it$"),
        (f"{HEAD}  seed: {{value: {'9' * 5000}}}", r"expected YAML in .*; mend it$"),
        (
            f"{HEAD}  seed: {{value: 0x{'f' * 5000}}}",
            r"expected YAML in .*number too long; mend it$",
        ),
        (f"{HEAD}  --config-dir: {{value: x}}", r"the name of a setting .*, found '--config-dir'"),
        (f"{HEAD}  seed: {'x' * 900}", r"expected 'value' or 'values' under parameters\.seed in"),
    ],
    ids=range(23),
)
def test_a_sweep_file_beyond_the_limits_is_refused_in_a_line(call, tmp_path, content, message):
    outcome = call("sweep", write(tmp_path, content))
    assert (outcome.code, outcome.out) == (2, "")
    assert re.search(message, outcome.err.rstrip("\n")), outcome.err
    assert outcome.err.count("\n") == 1
    assert len(outcome.err) < 700
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


def test_what_is_within_the_limits_is_read(tmp_path):
    deep = "[" * 99 + "]" * 99
    assert read_document(write(tmp_path, deep)) is not None
    shared = read_document(write(tmp_path, "a: &a [1, 2]\nb: *a\nc: {<<: {x: 1}, y: *a}"))
    assert shared == {"a": [1, 2], "b": [1, 2], "c": {"x": 1, "y": [1, 2]}}
    assert read_document(write(tmp_path, b"\xef\xbb\xbfa: 1")) == {"a": 1}


# -- counting --------------------------------------------------------------------------------------


def test_a_grid_is_counted_before_anything_is_made_of_it(call, tmp_path):
    values = "[" + ", ".join(map(str, range(10))) + "]"
    grid = HEAD + "".join(f"  k{i}: {{values: {values}}}\n" for i in range(30))
    outcome = call("sweep", write(tmp_path, grid))
    assert outcome.code == 2
    assert re.search(r"expected at most 10000 jobs, found far more in .*s\.yaml; di", outcome.err)


def test_a_grid_of_the_limit_passes_and_one_more_does_not(tmp_path):
    def grid(count):
        return write(tmp_path, f"{HEAD}  seed: {{values: {[*range(count)]}}}")

    assert len(sweep_overrides(grid(MOST))) == 2
    with pytest.raises(RequestError, match=rf"found {MOST + 1} in .*; divide the grid"):
        sweep_overrides(grid(MOST + 1))


@pytest.mark.parametrize(
    "words",
    [
        ["seed=range(0,1000000)"],
        ["seed=range(1000000)"],
        ["seed=range(0,1e9,1e-3)"],
        ["seed=range(0,inf)"],
        ["seed=shuffle(range(1,100001))"],
        ["seed=range(100)", "contexts=range(0,101)"],
        ["seed=" + ",".join(map(str, range(101))), "contexts=range(100)"],
    ],
    ids=lambda words: words[0][:24],
)
def test_words_of_too_many_jobs_are_refused(call, words):
    outcome = call("run", "-m", *words)
    assert outcome.code == 2
    assert re.fullmatch(r"error: expected at most 10000 jobs, found .*; div.*\n", outcome.err)


def test_words_of_few_jobs_pass():
    few = ["-m", "seed=range(100)", "contexts=range(0,100)", "facts.relations=[a,b]", "x=f(", "y=1"]
    check_count(few)
    check_count(["seed=range(10,0)", "a=" + ",".join(map(str, range(MOST)))])


def test_a_word_of_many_brackets_is_refused_in_a_line(call):
    outcome = call("run", "seed=" + "[" * 5000 + "]" * 5000)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "expected at most 100 brackets within each other" in outcome.err


# -- configuration of one's own --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"_target_: caf\xe9", r"expected UTF-8 text in .*mine\.yaml"),
        (BOMB.encode(), r"characters with every alias written out in .*mine\.yaml"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, r"at most 100 levels in .*mine\.yaml"),
        (b"a: &a [*a]", r"the anchor 'a' in itself"),
        (b"a: [1\nb: }", r"expected YAML in a configuration file, found .*; mend it"),
    ],
    ids=["latin-1", "bomb", "deep", "recursive", "no YAML"],
)
@pytest.mark.parametrize(
    "words",
    [
        ["run", "--config-dir", "mine"], ["run", "--config-dir=mine"], ["run", "-cd", "mine"],
        ["run", "--config-di", "mine"], ["run", "--config-d=mine"],
        ["run", "hydra.searchpath=[file://{}/mine]"], ["measure", ".", "--config-dir", "mine"],
        ["report", ".", "--config-dir=mine"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_one_s_own_configuration_beyond_the_limits_is_refused_in_a_line(
    call, tmp_path, content, message, words
):
    place = tmp_path / "mine" / "intervene" / "mine.yaml"
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    outcome = call(*(word.format(tmp_path) for word in words), "intervene=mine")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    read = words[0] == "run" or "expected YAML" not in message  # else there is nothing to read it
    assert not read or re.search(message, outcome.err), outcome.err
