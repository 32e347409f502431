"""One file, two launchers: Hydra's multirun and wandb's agents run the same grid."""

import csv
import itertools
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from palimpsest.cli.configuration import resource
from palimpsest.cli.sweeps import sweep_overrides
from palimpsest.intervene.erasers.leace import Leace
from palimpsest.record.results import load_runs

SWEEPS = sorted(resource("sweeps").glob("*.yaml"))
each_sweep = pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)


def grid(words):
    """The jobs that Hydra makes of a multirun's overrides."""
    parsed = OverridesParser.create().parse_overrides(words)
    options = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in parsed
    ]
    return list(itertools.product(*options))


def composed(words):
    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        return OmegaConf.to_container(compose("run", list(words)), resolve=True)


SHARED = {"undertext"}
"""Directories that no sweep is named after: several fill them, for one page."""


@each_sweep
def test_a_sweep_file_names_itself_and_its_jobs_compose(file):
    configs = [composed(job) for job in grid(sweep_overrides(file))]
    [name] = {config["record"]["sweep"] for config in configs}
    assert file.stem.startswith(name) or name in SHARED  # a file may add to another's directory
    assert len({yaml.safe_dump(config) for config in configs}) == len(configs) > 1


@each_sweep
def test_wandb_s_agent_gives_the_same_configurations(file):
    """The agent's own code fills in the file's command for each point of the grid."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load(file.read_text())
    assert sweep["program"] == "palimpsest"
    assert sweep["command"][-3:] == ["palimpsest", "run", "${args_no_hyphens}"]
    names = list(sweep["parameters"])
    options = [entry.get("values", [entry.get("value")]) for entry in sweep["parameters"].values()]
    by_agent = []
    for point in itertools.product(*options):
        args = {name: {"value": value} for name, value in zip(names, point, strict=True)}
        words = utils.create_sweep_command_args({"args": args})["args_no_hyphens"]
        by_agent.append(composed(words))
    by_hydra = [composed(job) for job in grid(sweep_overrides(file))]
    assert sorted(map(yaml.safe_dump, by_agent)) == sorted(map(yaml.safe_dump, by_hydra))


# -- values ----------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    False,
    0,
    -3,
    17,
    0.5,
    1e-6,
    1e22,
    "rome",
    "gpt2-xl",
    "path/to/a.json",
    "two words",
    "one,two",
    "[a]",
    "{b: c}",
    "k=v",
    "it's",
    'say "no"',
    "back\\slash",
    "trailing\\",
    "\\'",
    "a:b",
    "100%",
    "~home",
    "+plus",
    "é日本",
    "line\nbreak",
    "\n",
    "",
    " padded ",
    "1",
    "1.5",
    "true",
    "null",
    "nan",
    "inf",
    "on",
    ["P17"],
    ["P17", "it's, this"],
    [1, None, True, "null"],
    [],
    {"target": 0.5, "test": 0.5},
    {"a": {"b": "c d"}},
]


def write(path: Path, parameters, method="grid") -> Path:
    path.write_text(yaml.safe_dump({"method": method, "parameters": parameters}))
    return path


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_reaches_hydra_as_it_is(value, tmp_path):
    file = write(tmp_path / "s.yaml", {"key": {"value": value}})
    [name, word] = sweep_overrides(file)
    assert name == "record.sweep=s"
    override = OverridesParser.create().parse_override(word)
    assert not override.is_sweep_override()
    found = override.value()
    assert (found, type(found)) == (value, type(value))


def test_values_reach_hydra_as_a_sweep_over_them(tmp_path):
    file = write(tmp_path / "s.yaml", {"key": {"values": VALUES}})
    override = OverridesParser.create().parse_override(sweep_overrides(file)[1])
    values = [OverridesParser.create().parse_override(f"key={text}").value()
              for text in override.sweep_string_iterator()]  # fmt: skip
    assert values == VALUES


def test_a_file_s_name_may_hold_anything(tmp_path):
    file = write(tmp_path / "my sweep, no. 2.yaml", {"seed": {"value": 1}})
    override = OverridesParser.create().parse_override(sweep_overrides(file)[0])
    assert override.value() == "my sweep, no. 2"


# -- end to end ------------------------------------------------------------------------------------


@pytest.fixture
def sweep(few, tmp_path):
    """A sweep file over methods, with the tiny model and its facts as fixed parameters."""

    def make(methods, **more):
        fixed = dict(word.split("=", 1) for word in few if not word.startswith("~"))
        fixed["evaluate"] = "quick"
        parameters = {name: {"value": yaml.safe_load(value)} for name, value in fixed.items()}
        parameters["intervene"] = {"values": methods}
        return write(tmp_path / "little grid.yaml", parameters | more)

    return make


def test_a_sweep_prints_its_table_and_writes_its_report(call, sweep, tmp_path):
    outcome = call("sweep", sweep(["none", "leace"]))
    assert outcome.code == 0
    place = tmp_path / "results" / "little grid"
    assert {run.method for run in load_runs(place)} == {"none", "leace"}
    assert f"report: {place.relative_to(tmp_path) / 'report.html'}" in outcome.out
    table = [line.split()[0] for line in outcome.out.splitlines() if line.strip()]
    assert {"method", "none", "leace"} <= set(table)
    assert (place / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert "\\begin{tabular}" in (place / "report.tex").read_text()
    with (place / "report.csv").open() as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"none", "leace"}


def test_a_sweep_again_runs_nothing_and_prints_the_same_table(call, sweep):
    file = sweep(["none", "leace"])
    first, again = call("sweep", file), call("sweep", file)
    assert again.code == 0
    assert again.out == first.out
    assert all("done before" in line for line in again.err.splitlines())


def test_overrides_come_on_top_of_the_file(call, sweep, tmp_path):
    place = tmp_path / "else where"
    outcome = call("sweep", sweep(["none"]), f"record.dir='{place}'", "seed=3")
    assert outcome.code == 0
    [run] = load_runs(place)
    assert run.run["seed"] == 3
    assert (place / "report.html").is_file()
    assert not (tmp_path / "results").exists()


def test_report_alone_gives_the_same(call, sweep):
    swept = call("sweep", sweep(["none", "leace"]))
    outcome = call("report", Path("results", "little grid"))
    assert (outcome.code, outcome.out, outcome.err) == (0, swept.out, "")


def test_a_sweep_with_a_wrong_job_still_reports_the_others(call, sweep, tmp_path):
    outcome = call("sweep", sweep(["leace"], **{"locate.layer": {"values": [0, 9]}}))
    assert outcome.code == 2
    assert outcome.err.count("error: ") == 1
    assert (tmp_path / "results" / "little grid" / "report.html").is_file()


def test_a_sweep_of_wrong_jobs_only_tells_each_cause_once(call, sweep):
    outcome = call("sweep", sweep(["leace"], **{"locate.layer": {"values": [8, 9]}}))
    assert outcome.code == 2
    assert [line[:38] for line in outcome.err.splitlines()] == [
        "locate.layer=8: error: expected a laye", "locate.layer=9: error: expected a laye",
    ]  # fmt: skip


def test_a_sweep_of_crashes_has_failed(call, sweep, monkeypatch):
    def fit(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(Leace, "fit", fit)
    outcome = call("sweep", sweep(["leace"]))
    assert outcome.code == 1
    assert outcome.err.count("RuntimeError: boom") == 1
    assert "error:" not in outcome.err
