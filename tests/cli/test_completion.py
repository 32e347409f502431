"""The shell completes commands, flags, files and overrides, without waiting for torch."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

import palimpsest
from palimpsest.cli import _parser
from palimpsest.cli.completion import fetchable, methods, overrides
from palimpsest.cli.configuration import resource
from palimpsest.model.fetch import CATALOGUE

GROUPS = sorted(path.name for path in resource("conf").iterdir() if path.is_dir())
BASH = """
eval "$(palimpsest completion bash)"
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
_python_argcomplete palimpsest
printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
compdef() { }
_describe() { printf '%s\\n' "${completions[@]%%:*}" }
eval "$(palimpsest completion zsh)"
BUFFER=$1 CURSOR=${#1} words=(palimpsest)
_python_argcomplete
"""
FISH = """
palimpsest completion fish | source
complete --do-complete $argv[1] | cut -f 1
"""
SHELLS = {
    "bash": ["bash", "-c", BASH, "bash"],
    "zsh": ["zsh", "-f", "-c", ZSH, "zsh"],
    "fish": ["fish", "--no-config", "-c", FISH],
}


@pytest.fixture
def surrounded(tmp_path_factory, monkeypatch):
    """The command on the path of the processes that a test starts."""
    home = tmp_path_factory.mktemp("bin")
    command = home / "palimpsest"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m palimpsest "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(palimpsest.__file__).parents[1]))
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture(params=SHELLS)
def shell(request, surrounded):
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


def candidates(line, shell="bash"):
    """What a shell offers for the end of a line."""
    result = subprocess.run(
        [*SHELLS[shell], line], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stderr == ""
    return [word.rstrip(" ") for word in result.stdout.splitlines() if word]


def inner(parser):
    """The commands within a parser, by name."""
    for action in parser._actions:
        if action.dest == "==SUPPRESS==" and action.choices:
            return action.choices
    return {}


def flags(parser):
    return sorted(flag for action in parser._actions for flag in action.option_strings)


def leaves(node, prefix=""):
    """The dotted keys of a plain configuration."""
    if not isinstance(node, dict) or not node:
        return {prefix} if not prefix.endswith("_target_") else set()
    dot = "." if prefix else ""
    return {key for name in node for key in leaves(node[name], f"{prefix}{dot}{name}")}


def composed(*words):
    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        return OmegaConf.to_container(compose("run", list(words)))


def test_each_shell_completes_commands(shell):
    assert sorted(candidates("palimpsest ", shell)) == sorted(inner(_parser()))


def test_each_shell_completes_an_option_of_a_group(shell):
    found = candidates("palimpsest run -m seed=1,2 intervene=ro", shell)
    assert [word.removeprefix("intervene=") for word in found] == ["rome", "rome_plain"]


def test_each_shell_completes_a_file(shell):
    Path("facts.jsonl").touch()
    assert candidates("palimpsest facts check fa", shell) == ["facts.jsonl"]


@pytest.mark.parametrize("name", [*inner(_parser()), "facts check"])
def test_every_flag_stands_once(name, surrounded):
    parser = _parser()
    for word in name.split():
        parser = inner(parser)[word]
    assert sorted(candidates(f"palimpsest {name} -")) == flags(parser)


def test_the_flags_of_run_are_hydras():
    known = {
        flag: action for action in get_args_parser()._actions for flag in action.option_strings
    }
    run = [action for action in inner(_parser())["run"]._actions if action.option_strings]
    assert {flag for action in run for flag in action.option_strings} <= set(known)
    for action in run:
        asked = known[action.option_strings[0]]
        assert (action.dest, action.nargs) == (asked.dest, asked.nargs)
        assert set(action.choices or ()) == set(asked.choices or ())


@pytest.mark.parametrize("before", ["intervene=rome -m", "--cfg job -m", "-m --config-dir ."])
def test_overrides_follow_flags(before, surrounded):
    assert candidates(f"palimpsest run {before} facts.li") == ["facts.limit="]


def test_a_flags_value_is_no_override(surrounded):
    Path("mine").mkdir()
    assert candidates("palimpsest run --config-dir ") == ["mine/"]
    assert candidates("palimpsest run seed=1 --config-dir in") == []
    assert sorted(candidates("palimpsest run seed=1 --cfg ")) == ["all", "hydra", "job"]


@pytest.mark.parametrize("group", GROUPS)
def test_a_groups_options_are_its_files(group):
    files = {path.stem for path in (resource("conf") / group).glob("*.yaml")}
    assert set(overrides(f"{group}=", [])) == {f"{group}={name}" for name in files}


def test_groups_and_keys_begin_a_word():
    found = overrides("", [])
    assert len(found) == len(set(found))
    assert {f"{group}=" for group in GROUPS} < set(found)
    assert {f"{group}." for group in GROUPS} < set(found)
    assert {"seed=", "contexts="} < set(found)


@pytest.mark.parametrize("choice", ["intervene=rome", "intervene=leace", "facts=pararel"])
def test_dotted_keys_are_those_of_the_composed_configuration(choice):
    config = composed(choice)
    found = [word for group in GROUPS for word in overrides(f"{group}.", [choice])]
    assert len(found) == len(set(found))
    assert set(found) == {f"{key}=" for key in leaves(config) if "." in key}


def test_a_trace_has_keys_of_its_own(surrounded):
    assert "tracing.window=" in candidates("palimpsest trace tracing.w")
    assert "tracing.window=" not in candidates("palimpsest run tracing.w")
    assert candidates("palimpsest trace intervene=ro") == []


def test_the_parts_of_a_pair_are_groups():
    pair = ["intervene=erase_then_edit"]
    keys = [f"intervene@intervene.{part}=" for part in ("first", "then")]
    assert sorted(overrides("intervene@", pair)) == keys
    assert overrides("intervene@", []) == []
    found = overrides(f"{keys[0]}leace", pair)
    assert f"{keys[0]}leace_background" in found
    assert all("@" in word and "=null" not in word for word in found)
    chosen = [*pair, f"{keys[0]}memit"]
    assert "intervene.first.weight=" in overrides("intervene.first.", chosen)
    assert "intervene.first.svd_tol=" not in overrides("intervene.first.", chosen)


def test_the_first_of_several_options_tells_the_keys():
    several = overrides("intervene.", ["intervene=leace,rome", "seed=0,1"])
    assert several == overrides("intervene.", ["intervene=leace"])
    assert several != overrides("intervene.", ["intervene=rome"])


def test_a_list_of_options_goes_on():
    assert overrides("intervene=none,leace", []) == [
        "intervene=none,leace", "intervene=none,leace_background", "intervene=none,leace_readers",
        "intervene=none,leace_shuffled", "intervene=none,leace_weights",
    ]  # fmt: skip


def test_methods_and_the_keys_of_one():
    assert methods("none,random") == ["none,random_delta", "none,random_subspace"]
    one = overrides("leace:intervene.", ["intervene=rome"])
    assert one == [f"leace:{word}" for word in overrides("intervene.", ["intervene=leace"])]


@pytest.mark.parametrize("sign", ["+", "++", "~"])
def test_signs_stay(sign):
    assert overrides(f"{sign}facts.li", []) == [f"{sign}facts.limit="]


def test_values_as_composed():
    assert overrides("seed=", []) == [f"seed={composed()['seed']}"]
    assert overrides("locate.layer=", []) == ["locate.layer=null"]
    assert overrides("intervene.shuffled=", ["intervene=leace"]) == [
        "intervene.shuffled=true", "intervene.shuffled=false",
    ]  # fmt: skip


def test_values_of_paths_are_files():
    Path("mine.jsonl").touch()
    assert "facts.path=mine.jsonl" in overrides("facts.path=mi", ["facts=file"])
    assert overrides("seed=mi", []) == []


@pytest.mark.parametrize(
    "word", ["intervene=nonsense", "intervene=", "x.y=1", "[", "facts.limit=a"]
)
def test_a_wrong_word_before_does_no_harm(word):
    assert overrides("facts.li", [word]) == ["facts.limit="]


def test_ones_own_configuration_is_found():
    place = Path("it's mine/intervene")
    place.mkdir(parents=True)
    target = "palimpsest.intervene.controls.NoChange"
    (place / "own.yaml").write_text(yaml.safe_dump({"_target_": target, "mine": 1}))
    assert "intervene=own" not in overrides("intervene=ow", [])
    assert overrides("intervene=ow", [], "it's mine") == ["intervene=own"]
    assert overrides("intervene.", ["intervene=own"], "it's mine") == ["intervene.mine="]


def test_a_hostile_file_name_is_quoted(surrounded):
    name = "facts $(touch owned);.jsonl"
    Path(name).touch()
    (found,) = candidates("palimpsest facts check fa")
    assert shlex.split(found) == [name]
    subprocess.run(["bash", "-c", f"echo {found}"], check=True, capture_output=True)
    assert not Path("owned").exists()


def test_models_to_fetch_are_those_of_the_catalogue():
    assert fetchable() == sorted(CATALOGUE)


def test_completing_loads_no_heavy_library(surrounded):
    line = "palimpsest run intervene=leace intervene.po"
    command = f"{shlex.quote(sys.executable)} -X importtime -m palimpsest 8>answer"
    told = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    result = subprocess.run(
        ["bash", "-c", command], env={**os.environ, **told}, capture_output=True, text=True
    )
    assert "intervene.policy=" in Path("answer").read_text()
    loaded = set(re.findall(r"\| +([\w.]+)$", result.stderr, re.MULTILINE))
    assert {"hydra", "palimpsest.cli.completion"} <= loaded
    assert not {"torch", "transformers", "numpy", "duckdb", "wandb"} & loaded


def test_another_shell_is_refused(call):
    outcome = call("completion", "tcsh")
    assert outcome.code == 2
    assert "tcsh" in outcome.err
