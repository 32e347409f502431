"""The configuration: every file composes, and says neither more nor less than its class."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

import palimpsest
from palimpsest import __version__
from palimpsest.cli.configuration import check_config, resource
from palimpsest.evaluate.ruler import Ruler
from palimpsest.facts.dataset import DataSet
from palimpsest.locate.locator import Locator
from palimpsest.model.load import Pretrained
from palimpsest.record.recording import Recording
from palimpsest.record.results import load_runs

OPTIONS = sorted((path.parent.name, path.stem) for path in resource("conf").glob("*/*.yaml"))
each_option = pytest.mark.parametrize(("group", "option"), OPTIONS)


def composed(*words: str) -> DictConfig:
    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        return compose("run", list(words))


def parts(node, path=""):
    """Every node with a `_target_`, by its dotted path."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in node:
            yield from parts(node[key], f"{path}.{key}".lstrip("."))


# -- the files ------------------------------------------------------------------------------------


def test_there_is_a_group_for_each_room():
    assert {group for group, _ in OPTIONS} == {
        "facts", "model", "locate", "intervene", "evaluate", "record",
    }  # fmt: skip


@each_option
def test_every_option_makes_its_part(group, option):
    config = composed(f"{group}={option}")
    check_config(config)
    made = instantiate(config, _convert_="all")
    made_of = dict(parts(config[group], group))
    own = made[group] if group == "evaluate" else {"": made[group]}
    kinds = {f"{group}.{name}".rstrip("."): type(part) for name, part in own.items()}
    assert kinds.items() <= {path: get_class(n["_target_"]) for path, n in made_of.items()}.items()
    assert isinstance(made["model"], Pretrained)
    assert isinstance(made["facts"], DataSet)
    assert isinstance(made["locate"], Locator)
    assert isinstance(made["record"], Recording)
    assert callable(made["intervene"].fit)
    assert next(iter(Ruler(made["evaluate"]).measures)) == "downstream"


@each_option
def test_a_file_names_every_field_of_its_class_and_no_other(group, option):
    for path, node in parts(composed(f"{group}={option}")[group], group):
        fields = dataclasses.fields(get_class(node["_target_"]))
        named = {str(key) for key in node if key != "_target_"}
        assert named == {field.name for field in fields if field.init}, path


@each_option
def test_a_file_can_be_read_without_a_value_missing(group, option):
    OmegaConf.to_container(composed(f"{group}={option}"), resolve=True, throw_on_missing=True)


PRESETS = {
    ("facts", "countries"): "world",
    ("intervene", "leace_shuffled"): "leace",
    ("intervene", "rome_plain"): "rome",
}
"""Files of a class that another file stands for; they name other values on purpose."""

CHOSEN = {"facts.relations", "evaluate.shadow_probes.subjects"}
"""Whose value in a file is one choice among the class's, which has none; `quick` takes few."""

PLAIN = [
    each for each in OPTIONS
    if each[0] in {"facts", "locate", "intervene", "evaluate"} and each not in PRESETS
]  # fmt: skip


def valued(node, path, made=None):
    """Every value that a file gives as it stands, with the class's default: (path, value, default).

    Args:
        node: of the configuration, with a `_target_`.
        path: where it stands.
        made: what the part around it makes by default; None: the class's own defaults count.
    """
    kind = get_class(node["_target_"])
    made = made if type(made) is kind else None
    for field in dataclasses.fields(kind):
        if not field.init or OmegaConf.is_interpolation(node, field.name):
            continue
        value, default = node[field.name], own_default(field, made)
        if isinstance(value, DictConfig) and list(parts(value)):
            for inner, part in parts(value):
                if not inner:
                    yield from valued(part, f"{path}.{field.name}", default)
        elif default is not dataclasses.MISSING:
            value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            yield f"{path}.{field.name}", value, default


def own_default(field, made):
    """A field's default, or what it is in `made`."""
    if made is not None:
        return getattr(made, field.name)
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


@pytest.mark.parametrize(("group", "option"), PLAIN)
def test_a_class_s_defaults_are_its_file_s_values(group, option):
    config = composed(f"{group}={option}")[group]
    nodes = (
        {group: config} if "_target_" in config else {f"{group}.{n}": v for n, v in config.items()}
    )
    found = [each for path, node in nodes.items() for each in valued(node, path)]
    differing = [each for each in found if each[1] != each[2] and each[0] not in CHOSEN]
    assert differing == []


@pytest.mark.parametrize(("preset", "plain"), PRESETS.items())
def test_a_preset_is_another_file_with_other_values(preset, plain):
    group, option = preset
    made, other = (composed(f"{group}={name}")[group] for name in (option, plain))
    assert made["_target_"] == other["_target_"]
    assert made != other


def test_the_seed_reaches_every_part_that_draws():
    config = composed("intervene=random_delta", "seed=7")
    assert config.intervene.seed == config.intervene.base.prefixes.seed == 7
    assert composed("intervene=leace_shuffled", "seed=7").intervene.seed == 7


def test_a_control_s_base_follows_the_same_settings():
    config = composed("intervene=random_delta", "contexts=3")
    assert config.intervene.base.prefixes.count == 3
    assert config.intervene.base == composed("intervene=rome", "contexts=3").intervene


def test_results_follow_the_sweep_s_name_unless_a_place_is_given():
    assert composed("record.sweep=night").record.dir == "results/night"
    assert composed("record.sweep=night", "record.dir=here").record.dir == "here"


# -- the flags ------------------------------------------------------------------------------------


def test_cfg_job_prints_the_configuration_and_runs_nothing(call, tmp_path):
    outcome = call("run", "--cfg", "job", "intervene=leace", "seed=3")
    assert (outcome.code, outcome.err) == (0, "")
    shown = yaml.safe_load(outcome.out)
    assert shown == OmegaConf.to_container(composed("intervene=leace", "seed=3"))
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_of_a_wrong_request_is_wrong(call):
    outcome = call("run", "--cfg", "job", "intervene=leaec")
    assert outcome.code == 2
    assert "did you mean 'leace'?" in outcome.err


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_names_every_command_and_gives_examples(call, words):
    outcome = call(*words)
    assert (outcome.code, outcome.err) == (0, "")
    for word in ("run", "sweep", "report", "fetch", "examples:"):
        assert word in outcome.out


@pytest.mark.parametrize("command", ["run", "sweep", "report", "fetch"])
def test_every_command_has_help(call, command):
    outcome = call(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"usage: palimpsest {command}")


def test_run_help_speaks_of_overrides_and_of_hydra_s_flags(call):
    out = call("run", "--help").out
    for word in ("KEY=VALUE", "-m", "--cfg job", "--config-dir", "intervene=rome"):
        assert word in out


def test_version(call):
    assert call("--version").out == f"palimpsest {__version__}\n"


def test_the_module_is_the_command_and_starts_without_torch():
    code = (
        "import runpy, sys; sys.argv = ['palimpsest', '--version']\n"
        "try: runpy.run_module('palimpsest', run_name='__main__')\n"
        "finally: print({'torch', 'hydra', 'transformers'} & set(sys.modules))"
    )
    source = str(Path(palimpsest.__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": source}, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (0, f"palimpsest {__version__}\nset()\n")


# -- one's own files ------------------------------------------------------------------------------


@pytest.fixture
def own(tiny, tmp_path):
    """A directory with a model and a method of one's own: one yaml each."""
    model = {
        "defaults": ["smollm2", "_self_"],
        "name": "own",
        "path": str(tiny.model),
        "depths": {"mlp": {"early": 0, "late": 2}},
    }
    method = {"defaults": ["rome", "_self_"], "search": {"steps": 2}}
    for group, name, content in (("model", "own", model), ("intervene", "hasty_rome", method)):
        folder = tmp_path / "mine" / group
        folder.mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "mine"


def test_one_s_own_model_and_method(call, own, few, tmp_path):
    words = [word for word in few if not word.startswith(("model", "locate"))]
    flags = ["--config-dir", own, "model=own", "intervene=hasty_rome", "locate.depth=late"]
    outcome = call("run", *flags, *words)
    assert (outcome.code, outcome.err.split(":")[0]) == (0, "hasty_rome")
    [run] = load_runs(tmp_path / "results" / "runs")
    assert run.method == "hasty_rome"
    assert run.run["site"] == {"layer": 2, "part": "mlp"}
    assert run.run["config"]["intervene"]["search"]["steps"] == 2


def test_one_s_own_names_are_among_the_nearest(call, own):
    outcome = call("run", "--config-dir", own, "intervene=hasty_roem")
    assert outcome.code == 2
    assert "did you mean 'hasty_rome'" in outcome.err


HALF = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Half:
    part: str = "mlp"
    place: str = "mlp"
    def fit(self, model, facts, site): ...
"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "_target_: palimpsest.intervene.editors.rome.Roem\n",
            r"error: expected intervene\._target_ to name a class, found 'palimpsest\.interv",
        ),
        ("steps: 3\n", r"error: expected intervene\._target_ to name a class, found None"),
        (
            "_target_: palimpsest.locate.fixed.Fixed\n",
            r"error: expected intervene to be a method with .* found palimpsest\.locate\.fixed\.Fix"
            "ed without part; declare it, or derive the class from palimpsest",
        ),
        (
            "_target_: half.Half\n",
            r"error: expected intervene to be a method with .* found half\.Half without lowest; ",
        ),
        (
            "_target_: palimpsest.intervene.editors.editor.Editor\n",
            r"error: expected intervene\._target_ to name a class that is whole, found 'palimp"
            r"sest\.intervene\.editors\.editor\.Editor' without begin; write it, or name a class",
        ),
        (
            "_target_: pathlib.Path\n",
            r"error: expected intervene\._target_ to name a dataclass, found 'pathlib\.Path'",
        ),
        (
            "defaults: [rome, _self_]\nsearch: {stepps: 3}\n",
            r"found 'intervene\.search\.stepps'; did you mean 'intervene\.search\.steps'",
        ),
    ],
    ids=[
        "no such class",
        "no class",
        "no method",
        "half a method",
        "abstract",
        "no dataclass",
        "no such field",
    ],
)
def test_a_mistake_in_one_s_own_file_is_named(call, own, monkeypatch, content, message):
    (own / "half.py").write_text(HALF)
    monkeypatch.syspath_prepend(str(own))
    (own / "intervene" / "mine.yaml").write_text(content)
    outcome = call("run", "--config-dir", own, "intervene=mine")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert re.search(message, outcome.err), outcome.err
