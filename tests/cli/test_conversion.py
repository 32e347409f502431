"""Every configured value reaches its class as declared, or is refused in one line."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from palimpsest.cli.configuration import check_config, resource
from palimpsest.cli.conversion import convert, part
from palimpsest.errors import RequestError
from palimpsest.record.provenance import describe, identity

OPTIONS = sorted((path.parent.name, path.stem) for path in resource("conf").glob("*/*.yaml"))
REFUSED = RequestError


def composed(*words: str, command: str = "run"):
    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        return compose(command, list(words))


# -- one value -------------------------------------------------------------------------------------

TABLE = [
    (bool, False, [False, 0, "no", "No", "NO", "off", "false", "False", "n", "0"]),
    (bool, True, [True, 1, "yes", "Yes", "on", "ON", "true", "TRUE", "y", "1"]),
    (bool, REFUSED, [None, 2, -1, 1.0, 0.0, "", "maybe", "2", [], [True], {}]),
    (int, 4, [4, 4.0, "4", "4.0", "4e0", " 4 ", 4.0e0]),
    (int, 2**53, [2**53, float(2**53), str(2**53), "9007199254740992.0"]),
    (int, 2**63 + 1, [2**63 + 1, str(2**63 + 1)]),
    (int, REFUSED, [None, True, False, 4.5, "4.5", "four", "", float("nan"), float("inf"), 1e23]),
    (int, REFUSED, ["1e23", "yes", "0x10", "9" * 5000, [4], {"a": 4}]),
    (float, 1.0, [1, 1.0, "1", "1.0", "1e0", "+1", 1e0]),
    (float, 0.0, [0, 0.0, -0.0, "0", "-0.0"]),
    (float, float("inf"), [float("inf"), "inf", "Infinity"]),
    (float, REFUSED, [None, True, "fast", "", "off", [1.0], {}, 10**400]),
    (str, "2026", ["2026", 2026]),
    (str, "False", ["False"]),
    (str, REFUSED, [None, True, False, 1.5, 1e5, ["a"], {"a": 1}]),
    (str | None, None, [None, "None"]),
    (str | None, "null", ["null"]),
    (str | None, REFUSED, [False, 0.5, []]),
    (int | None, 3, [3, 3.0, "3"]),
    (int | None, None, [None, "None"]),
    (int | None, REFUSED, ["null", "", True, 0.5]),
    (float | None, 2.0, [2, "2", 2.0]),
    (int | float, 2.0, [2, "2", 2.0]),
    (int | str, "2", ["2"]),
    (int | str, 2, [2]),
    (list[str], ["17"], [[17], ["17"]]),
    (list[str], [], [[]]),
    (list[str], REFUSED, ["P17", 17, [False], [None], [["P17"]], {}, None]),
    (list[int], [1, 2], [[1, "2"], [1.0, 2]]),
    (list[int] | None, [1], [[1], ["1"]]),
    (list[int] | None, REFUSED, [1, ["a"], [1.5]]),
    (list[float], [1.0, 0.5], [[1, 0.5], ["1", "5e-1"]]),
    (tuple[int, ...], [1, 2], [[1, 2.0]]),
    (tuple[int, str], [1, "2"], [["1", 2]]),
    (tuple[int, str], REFUSED, [[1], [1, "a", "b"]]),
    (Sequence[float], [1.0], [[1]]),
    (dict[str, float], {"a": 1.0}, [{"a": 1}, {"a": "1e0"}]),
    (dict[str, float], {"1": 1.0}, [{1: 1}]),
    (Mapping[str, int], {"a": 1}, [{"a": 1.0}]),
    (dict[str, dict[str, int]], {"a": {"b": 1}}, [{"a": {"b": "1"}}]),
    (dict[str, dict[str, int]], REFUSED, [3, [], {"a": 1}, {"a": {"b": 1.5}}, {"a": None}]),
    (Literal["a", "b"], "b", ["b"]),
    (Literal["a", "1"], "1", [1, "1"]),
    (Literal["a", "b"], REFUSED, ["c", None, 1, []]),
    (dict[str, Any], {"a": 1, "b": [None]}, [{"a": 1, "b": [None]}]),
    (list, [1, "a"], [[1, "a"]]),
    (dict, {"a": 1}, [{"a": 1}]),
]


@pytest.mark.parametrize(("kind", "wanted", "values"), TABLE, ids=lambda each: str(each)[:40])
def test_a_value_is_converted_or_refused(kind, wanted, values):
    for value in values:
        if wanted is REFUSED:
            with pytest.raises(RequestError, match=r"^expected a\.b\S* .*, found .*; .*") as caught:
                convert(kind, value, "a.b")
            assert len(str(caught.value)) < 500
            assert "\n" not in str(caught.value)
        else:
            found = convert(kind, value, "a.b")
            assert repr(found) == repr(wanted), value  # 1 and 1.0 and True are not the same


def test_a_number_of_thousands_of_digits_is_refused():
    with pytest.raises(RequestError, match=r"to be str, found a number too long to be written"):
        convert(str, 10**5000, "a.b")


def test_a_number_for_a_text_is_told_how_to_write_it():
    with pytest.raises(
        RequestError, match=r"""write it in quotes, .*: "record\.sweep='\.\.\.'"$"""
    ):
        convert(str, 0.5, "record.sweep")


# -- every field of every file ---------------------------------------------------------------------


def nodes(value):
    """Every node with a `_target_`."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for item in value.values():
            yield from nodes(item)


def every_field():
    """Class, field, declared type and a node that holds it, once each, of all files of conf/."""
    configs = [composed(f"{group}={option}") for group, option in OPTIONS]
    configs += [composed("record=local", command="trace")]
    found = {}
    for config in configs:
        for node in nodes(OmegaConf.to_container(config, resolve=True)):
            kinds = get_type_hints(get_class(node["_target_"]))
            for name in node.keys() - {"_target_"}:
                found[node["_target_"], name] = (kinds[name], node)
    return [(target, name, *rest) for (target, name), rest in sorted(found.items())]


def spellings(kind, value):
    """The same value written in other ways, with what each must become."""
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if bool in kinds:
        yield from ((text, False) for text in ("no", "off", "false", "False", 0, "0"))
        yield from ((text, True) for text in ("yes", "on", "true", "True", 1, "1"))
    if int in kinds:
        yield from ((text, 1) for text in (1, 1.0, 1e0, "1", "1e0"))
    if float in kinds:
        yield from ((text, 1.0) for text in (1, 1.0, 1e0, "1", "1e0"))
    if str in kinds:
        yield from ((text, "17") for text in (17, "17"))
    if type(None) in kinds:
        yield from ((text, None) for text in (None, "None"))
    yield value, float(value) if float in kinds and value is not None else value


FIELDS = every_field()


@pytest.mark.parametrize(
    ("target", "name", "kind", "node"), FIELDS, ids=lambda each: str(each)[-30:]
)
def test_every_field_of_every_file_in_several_spellings(target, name, kind, node):
    for written, wanted in spellings(kind, node[name]):
        found = part({**node, name: written}, "here")[name]
        assert (found, type(found)) == (wanted, type(wanted)), written


def test_the_files_hold_fields_of_every_kind():
    kinds = [kind for _, _, kind, _ in FIELDS]
    for kind in (bool, int, float, str, int | None, str | None, float | None, list[int], list[str]):
        assert kind in kinds
    assert len(FIELDS) > 150


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_file_s_own_values_are_of_the_declared_types(group, option):
    """Where a yaml says 10 for a float the class gets 10.0: types are those of the defaults."""
    made = instantiate(check_config(composed(f"{group}={option}")), _convert_="all")[group]
    stack = list(made.values()) if isinstance(made, dict) else [made]
    while stack:
        here = stack.pop()
        kinds = get_type_hints(type(here))
        for field in dataclasses.fields(here):
            value = getattr(here, field.name)
            if dataclasses.is_dataclass(value):
                stack.append(value)
            elif kinds[field.name] is float or (kinds[field.name] == float | None and value):
                assert type(value) is float, field.name
            elif kinds[field.name] == list[float]:
                assert set(map(type, value)) <= {float}


# -- what reaches the classes, and what is kept ----------------------------------------------------


@pytest.mark.parametrize(
    ("word", "path", "wanted"),
    [
        ("model.trust_remote_code=no", "model.trust_remote_code", False),
        ("model.trust_remote_code='false'", "model.trust_remote_code", False),
        ("model.trust_remote_code=on", "model.trust_remote_code", True),
        ("model.compile=0", "model.compile", False),
        ("intervene.moments.sink=no", "intervene.moments.sink", False),
        ("record.sweep=2026", "record.sweep", "2026"),
        ("model.device=0", "model.device", "0"),
        ("model.prefix=1", "model.prefix", "1"),
        ("facts.limit='4'", "facts.limit", 4),
        ("facts.limit=1e1", "facts.limit", 10),
        ("facts.shares.target='8e-2'", "facts.shares.target", 0.08),
        ("locate.layer=3.0", "locate.layer", 3),
        ("locate.layer=None", "locate.layer", None),
        ("seed=7.0", "seed", 7),
        ("seed='7'", "intervene.search.seed", 7),
        ("contexts=2.0", "intervene.prefixes.count", 2),
        ("objective=1", "objective", "1"),
        ("model.name='\\${not.one}'", "model.name", "${not.one}"),
    ],
)
def test_a_word_is_converted(word, path, wanted):
    found = OmegaConf.select(check_config(composed(word)), path)
    assert (found, type(found)) == (wanted, type(wanted))


def test_the_same_of_erasers_lists_and_traces():
    eraser = check_config(composed("intervene=leace", "intervene.all_layers=no")).intervene
    assert eraser.all_layers is False
    facts = check_config(composed("facts=pararel", "facts.relations=[17]")).facts
    assert facts.relations == ["17"]
    traced = check_config(composed("tracing.noise=3", "seed='1'", command="trace"), "trace")
    assert (traced.seed, traced.tracing.seed, repr(traced.tracing.noise)) == (1, 1, "3.0")


@pytest.mark.parametrize(
    "words",
    [
        ("intervene.search.lr=1", "intervene.search.lr=1.0", "intervene.search.lr='1e0'"),
        ("facts.shares.target=0.08", "facts.shares.target='8e-2'"),
        ("evaluate.probes.strengths=[1]", "evaluate.probes.strengths=[1.0]"),
        ("intervene=alphaedit intervene.ridge=10", "intervene=alphaedit intervene.ridge=1e1"),
        ("intervene=ft_l intervene.bound=1", "intervene=ft_l intervene.bound=1.0"),
        ("intervene=memit intervene.weight=9", "intervene=memit intervene.weight=9e0"),
        ("intervene=inlp intervene.rounds=20", "intervene=inlp intervene.rounds=20.0"),
        ("model.editors.span=1 intervene=memit", "intervene=memit model.editors.span=1.0"),
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_one_value_has_one_identity_however_it_is_written(words):
    ids = set()
    for word in words:
        parts = instantiate(check_config(composed(*word.split())), _convert_="all")
        names = ("facts", "intervene", "evaluate")
        ids.add(identity({name: describe(parts[name]) for name in names}))
    assert len(ids) == 1


def test_a_run_is_kept_as_converted_and_is_the_same_run(call, few, tmp_path):
    first = call("run", *few, "intervene=ft", "intervene.steps=2", "intervene.lr=1", "seed=0")
    again = call("run", *few, "intervene=ft", "intervene.steps='2'", "intervene.lr=1.0", "seed='0'")
    assert (first.code, again.code) == (0, 0)
    assert "done before" in again.err
    [file] = tmp_path.glob("results/runs/*/run.json")
    config = json.loads(file.read_text())["config"]
    assert repr(config["intervene"]["lr"]) == "1.0"
    assert (config["seed"], config["intervene"]["steps"]) == (0, 2)


REMOTE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaForCausalLM
class Own(LlamaForCausalLM): pass
"""


@pytest.mark.parametrize("word", ["no", "off", "false", "'false'", "0", "'no'"])
def test_no_remote_code_runs_if_none_is_trusted(call, few, tiny, tmp_path, word, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(tiny.model, tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "own.py").write_text(REMOTE.format(mark=str(tmp_path / "ran")))
    words = [word_ for word_ in few if not word_.startswith("model.path")]
    outcome = call("run", *words, "model.path=own", f"model.trust_remote_code={word}")
    assert outcome.code == 2
    assert not (tmp_path / "ran").exists()


def test_the_device_0_is_refused_in_a_line(call, few):
    outcome = call("run", *few, "model.device=0")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "expected model.device to be auto, cpu, cuda or cuda:N, found '0'" in outcome.err


# -- parts of a user's own -------------------------------------------------------------------------


@dataclasses.dataclass
class Inner:
    rate: float = 1.0
    flags: list[bool] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Outer:
    named: dict[str, Any] = dataclasses.field(default_factory=dict)
    inner: Inner | None = None
    many: list[Any] = dataclasses.field(default_factory=list)
    size: int = 1


INNER = {"_target_": f"{__name__}.Inner", "rate": 2, "flags": ["no", 1]}
CONVERTED = {"_target_": f"{__name__}.Inner", "rate": 2.0, "flags": [False, True]}


def test_parts_in_mappings_lists_and_unions_are_converted():
    node = {
        "_target_": f"{__name__}.Outer",
        "named": {"mine": INNER, "none": None, "plain": {"deep": INNER}},
        "inner": INNER,
        "many": [INNER, 1],
    }
    found = part(node, "evaluate")
    assert repr(found["named"]) == repr(
        {"mine": CONVERTED, "none": None, "plain": {"deep": CONVERTED}}
    )
    assert repr((found["inner"], found["many"])) == repr((CONVERTED, [CONVERTED, 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"named": {"mine": INNER | {"rat": 1}}}, r"found 'x\.named\.mine\.rat'; did you mean"),
        ({"inner": INNER | {"rate": "fast"}}, r"expected x\.inner\.rate to be float, found 'fast'"),
        ({"inner": {"rate": 1}}, r"expected x\.inner to be "),
        ({"many": [INNER | {"flags": "no"}]}, r"expected x\.many\[0\]\.flags to be list\[bool\]"),
        ({"size": INNER}, r"expected x\.size to be int, found \{"),
    ],
)
def test_a_mistake_in_an_inner_part_names_its_place(change, message):
    with pytest.raises(RequestError, match=message):
        part({"_target_": f"{__name__}.Outer", **change}, "x")
