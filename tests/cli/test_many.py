"""Several runs in one call, and runs that do not end well."""

import json

import pytest
import torch

from palimpsest.evaluate.probes import Probes
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.intervene.erasers.leace import Leace
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.record.results import load_runs, load_unfinished


def raising(error):
    def method(*_, **__):
        raise error

    return method


def interrupt(*_, **__):
    raise KeyboardInterrupt


# -- several ---------------------------------------------------------------------------------------


def test_a_grid_runs_every_combination(call, few, tmp_path):
    outcome = call("run", "-m", *few, "intervene=none,leace", "seed=0,1")
    assert outcome.code == 0
    assert [line.split(":")[0] for line in outcome.err.splitlines()] == [
        "none", "none", "leace", "leace",
    ]  # fmt: skip
    runs = load_runs(tmp_path / "results" / "runs")
    assert {(run.method, run.run["seed"]) for run in runs} == {
        ("none", 0), ("none", 1), ("leace", 0), ("leace", 1),
    }  # fmt: skip


def test_nothing_is_left_beside_the_results(call, few, tmp_path):
    assert call("run", "-m", *few, "intervene=none", "seed=0,1").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert {len(path.name) for path in (tmp_path / "results" / "runs").iterdir()} == {12}


def test_flags_may_stand_anywhere(call, few, tmp_path):
    assert call("run", "intervene=none", "-m", *few, "seed=0,1").code == 0
    assert len(load_runs(tmp_path / "results" / "runs")) == 2


def test_one_wrong_request_leaves_the_others_done(call, few, tmp_path):
    outcome = call("run", "-m", *few, "intervene=leace", "locate.layer=9,1")
    assert outcome.code == 2
    [run] = load_runs(tmp_path / "results" / "runs")
    right, wrong = sorted(outcome.err.splitlines())
    assert right == f"leace: done: results/runs/{run.run_id}"
    assert wrong.startswith(
        "locate.layer=9: error: expected a layer from 0 to 3 for model, found 9"
    )


def test_one_crash_leaves_the_others_done(call, few, tmp_path, monkeypatch):
    monkeypatch.setattr(Leace, "fit", raising(RuntimeError("boom")))
    outcome = call("run", "-m", *few, "intervene=leace,none", "locate.layer=9,1")
    assert outcome.code == 1
    assert outcome.err.count("RuntimeError: boom") == 1
    assert outcome.err.count("locate.layer=9 intervene=leace: error: expected a layer") == 1
    assert [run.method for run in load_runs(tmp_path / "results" / "runs")] == ["none"]


# -- failures --------------------------------------------------------------------------------------


def unfinished(tmp_path):
    [run] = load_unfinished(tmp_path / "results" / "runs")
    return run


def test_a_bug_is_told_with_its_traceback(call, few, tmp_path, monkeypatch):
    monkeypatch.setattr(Leace, "fit", raising(RuntimeError("boom")))
    outcome = call("run", *few, "intervene=leace")
    assert outcome.code == 1
    assert outcome.err.startswith("Traceback (most recent call last):")
    assert outcome.err.endswith("RuntimeError: boom\n")
    assert "Error executing job" not in outcome.err
    assert "error:" not in outcome.err
    run = unfinished(tmp_path)
    assert (run["status"], run["error"]) == ("failed", "RuntimeError: boom")


def test_a_bug_outside_a_run_is_told_with_its_traceback(call, done, monkeypatch):
    monkeypatch.setattr("palimpsest.report.page.write_report", raising(RuntimeError("boom")))
    outcome = call("report", done["none"].path)
    assert outcome.code == 1
    assert outcome.err.endswith("RuntimeError: boom\n")


def test_a_wrong_request_found_while_fitting_is_kept_as_failed(call, few, tmp_path):
    outcome = call("run", *few, "intervene=leace", "facts.relations=[]")
    assert outcome.code == 2
    run = unfinished(tmp_path)
    assert run["status"] == "failed"
    assert run["error"] == "RequestError: " + outcome.err.removeprefix("error: ").strip()
    [path] = (tmp_path / "results" / "runs").iterdir()
    assert {file.name for file in path.iterdir()} == {"run.json", "rows.jsonl"}


@pytest.fixture
def loaded(monkeypatch):
    """The models that runs load."""
    models = []
    load = Pretrained.load

    def remembered(self):
        models.append(load(self))
        return models[-1]

    monkeypatch.setattr(Pretrained, "load", remembered)
    return models


def check_untouched(handle: ModelHandle):
    fresh = ModelHandle(handle.model, handle.tokenizer, "again", handle.prefix)
    assert fresh.fingerprint == handle.fingerprint
    hooks = [m for m in handle.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    assert handle.running is None
    assert not any(parameter.requires_grad for parameter in handle.model.parameters())


@pytest.mark.parametrize(
    ("place", "name", "words"),
    [
        (ValueSearch, "find", ["intervene=rome"]),
        (Probes, "measure", ["intervene=rome"]),
        (Probes, "measure", ["intervene=rome", "intervene.protocol=batch"]),
        (Probes, "measure", ["intervene=leace"]),
    ],
    ids=["fit", "measure independent", "measure batch", "measure leace"],
)
def test_an_interruption_ends_the_run_and_restores_the_model(
    call, few, loaded, tmp_path, monkeypatch, place, name, words
):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupt)
        outcome = call("run", *few, *words)
    assert (outcome.code, outcome.err) == (1, "interrupted\n")
    run = unfinished(tmp_path)
    assert (run["status"], run["error"]) == ("failed", "KeyboardInterrupt")
    check_untouched(loaded[0])


def test_an_interruption_within_a_forward_pass_restores_the_model(
    call, few, loaded, tmp_path, monkeypatch
):
    """Raised from the deepest place: inside the last block, while hooks are set."""
    original = torch.nn.functional.silu
    calls = iter(range(10**6))

    def silu(states, inplace=False):
        if next(calls) == 150:
            raise KeyboardInterrupt
        return original(states, inplace)

    monkeypatch.setattr(torch.nn.functional, "silu", silu)
    outcome = call("run", *few, "intervene=rome", "seed=5")
    assert outcome.code == 1
    check_untouched(loaded[0])


def test_after_an_interruption_the_run_is_finished_with_the_same_rows(
    call, few, done, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Probes, "measure", interrupt)
        assert call("run", *few, "intervene=leace").code == 1
    assert unfinished(tmp_path)["run_id"] == done["leace"].run_id
    outcome = call("run", *few, "intervene=leace")
    assert (outcome.code, outcome.err.count("\n")) == (0, 1)
    [run] = load_runs(tmp_path / "results" / "runs")
    assert run.rows == done["leace"].rows
    assert json.loads((run.path / "run.json").read_text())["error"] is None
