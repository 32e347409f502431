"""wandb, offline: what a run leaves there can be read back by wandb's own command."""

import json
import subprocess
import sys

import pytest

from palimpsest.intervene.erasers.leace import Leace
from palimpsest.record.results import load_runs

OFFLINE = ("record=wandb", "record.tracker.mode=offline", "record.sweep=night")


def inspect(directory, *options):
    [run] = (directory / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(run)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_an_offline_run_can_be_read_back(call, few, done, tmp_path):
    outcome = call("run", *few, "intervene=none", *OFFLINE)
    assert (outcome.code, outcome.err.count("\n")) == (0, 1)
    [run] = load_runs(tmp_path / "results" / "night")
    assert run.run_id == done["none"].run_id
    assert run.rows == done["none"].rows
    assert (run.path / run.run["wandb"]["directory"]).is_dir()
    assert (run.run["wandb"]["mode"], run.run["wandb"]["id"]) == ("offline", run.run_id)

    found = json.loads(inspect(run.path, "--summary"))
    assert (found["state"], found["exit_code"]) == ("finished", 0)
    assert (found["run_id"], found["project"]) == (run.run_id, "palimpsest")
    assert found["config"]["facts"]["limit"] == 6
    assert found["summary"]["downstream/suppression/candidates"] == 0
    records = [json.loads(line) for line in inspect(run.path).splitlines()]
    [about] = [record["run"] for record in records if record["type"] == "run"]
    assert (about["run_group"], about["job_type"]) == ("night", "none")
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_a_failed_run_is_failed_there_too(call, few, tmp_path, monkeypatch):
    def fit(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(Leace, "fit", fit)
    assert call("run", *few, "intervene=leace", *OFFLINE).code == 1
    [path] = (tmp_path / "results" / "night").iterdir()
    assert json.loads((path / "run.json").read_text())["status"] == "failed"
    found = json.loads(inspect(path, "--summary"))
    assert (found["state"], found["exit_code"]) == ("failed", 1)


@pytest.mark.parametrize("words", [["record.tracker.mode=disabled"], []])
def test_disabled_leaves_nothing(call, few, tmp_path, monkeypatch, words):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert call("run", *few, "intervene=none", "record=wandb", *words).code == 0
    [run] = load_runs(tmp_path / "results" / "runs")
    assert not (run.path / "wandb").exists()
    assert run.run["wandb"]["mode"] == "disabled"
