"""Grids: a run is launched once, what is done costs no model, every outcome is told by its name."""

import json
import time
from pathlib import Path

import duckdb
import pytest

from palimpsest.cli import launching
from palimpsest.model.load import Pretrained
from palimpsest.record.results import load_runs
from palimpsest.sweep import plan

RUNS = Path("results/runs")


@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads a model fails."""

    def refuse(self):
        raise AssertionError("a model was loaded")

    return lambda: monkeypatch.setattr(Pretrained, "load", refuse)


def swept(path: Path, **parameters) -> Path:
    """A sweep file."""
    entries = {name: {"values": value} for name, value in parameters.items()}
    path.write_text(json.dumps({"method": "grid", "parameters": entries}), encoding="utf-8")
    return path


def test_jobs_that_are_one_run_are_launched_once(call, few):
    """No change has no site and no protocol."""
    outcome = call(
        "run", "-m", *few, "intervene=none", "locate.layer=0,1", "protocol=batch,independent"
    )
    assert outcome.code == 0
    lines = outcome.err.splitlines()
    assert sum("the same run as" in line for line in lines) == 3
    assert sum("none: done" in line for line in lines) == 1
    assert len(load_runs(RUNS)) == 1


def test_what_is_done_costs_no_model(call, few, no_model):
    words = ["run", *few, "intervene=rome,none", "seed=0"]
    assert call(*words[:1], "-m", *words[1:]).code == 0
    no_model()
    for again in (["-m", "intervene=rome,none"], ["intervene=rome"], ["intervene=none"]):
        outcome = call("run", *few, *again)
        assert outcome.code == 0, outcome.err
        lines = outcome.err.splitlines()
        assert lines
        assert all("done before, left as it is: results/runs/" in line for line in lines)


def test_the_layer_may_be_named_in_two_ways(call, few, no_model):
    by_depth = ["++model.depths.mlp.early=1", "locate.layer=null", "locate.depth=early"]
    assert call("run", *few, "intervene=rome", *by_depth).code == 0
    no_model()
    assert "done before" in call("run", *few, "intervene=rome", "locate.layer=1").err


def test_another_way_to_the_same_run_is_remembered(call, few, tiny, no_model, tmp_path):
    """The same model in another place is asked once; the request then stands in run.json."""
    other = tmp_path / "elsewhere"
    other.symlink_to(tiny.model)
    assert call("run", *few, "intervene=none").code == 0
    same = [*few, "intervene=none", f"model.path={other}", "facts.neighbors=5"]
    assert "done" in call("run", *same).err
    no_model()
    assert "done before" in call("run", *same).err


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
                                      ["hydra/launcher=submitit_local"]])  # fmt: skip
def test_every_outcome_is_told_by_the_jobs_name(call, few, launcher):
    words = ["intervene=none,rome,leace", "locate.layer=1,99", *launcher]
    outcome = call("run", "-m", *few, *words)
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    wrong = [line for line in lines if "error: expected a layer from 0 to 3" in line]
    assert sorted(line.split(":")[0] for line in wrong) == [
        "locate.layer=99 intervene=leace", "locate.layer=99 intervene=rome",
    ]  # fmt: skip
    assert sum(": done: results/runs/" in line for line in lines) == 3
    assert sum("locate.layer=99 intervene=none: the same run as" in line for line in lines) == 1
    assert len(load_runs(RUNS)) == 3


def test_a_worker_that_dies_is_told_as_such(call, few, monkeypatch):
    """A launcher that loses a process tells of one job, or of none."""
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    def launch(self, job_overrides, initial_job_idx):
        raise RuntimeError("worker killed by signal 9")

    monkeypatch.setattr(BasicLauncher, "launch", launch)
    outcome = call("run", "-m", *few, "intervene=none,leace")
    assert outcome.code == 1
    assert [line.split(": ", 1)[0] for line in outcome.err.splitlines()] == [
        "intervene=none", "intervene=leace",
    ]  # fmt: skip
    assert outcome.err.count("its process died: RuntimeError: worker killed by signal 9") == 2


def test_a_grid_of_absurd_size_is_counted_and_not_made(call, few):
    begun = time.process_time()
    outcome = call("run", "-m", *few, "seed=range(1000)", "facts.limit=range(1,1001)")
    assert time.process_time() - begun < 30
    assert outcome.code == 2
    assert "expected at most 10000 jobs, found 1000000" in outcome.err
    assert len(outcome.err.splitlines()) == 1


# -- the manifest ----------------------------------------------------------------------------------


def test_a_sweep_writes_a_manifest_before_it_works(call, few, tmp_path, no_model):
    file = swept(tmp_path / "grid.yaml", intervene=["none", "leace"], **{"locate.layer": [1, 99]})
    directory = tmp_path / "results" / "grid"
    assert call("sweep", file, *[w for w in few if not w.startswith("locate.")]).code == 2
    jobs = plan.read(directory)
    assert [job.source for job in jobs] == ["grid.yaml"] * 4
    assert plan.states(directory, jobs) == ["done", "done", "done", "pending"]
    assert set(jobs[0].measures) >= {"downstream", "probes"}
    no_model()
    plan.states(directory, plan.read(directory))


def test_two_sweeps_share_a_directory(call, few, tmp_path):
    for name, method in (("one", "none"), ("two", "leace"), ("one", "leace")):
        file = swept(tmp_path / f"{name}.yaml", intervene=[method], **{"record.sweep": ["both"]})
        assert call("sweep", file, *few).code == 0
    jobs = plan.read(tmp_path / "results" / "both")
    assert sorted((job.source, job.overrides[0].split("=")[0]) for job in jobs) == [
        ("one.yaml", "record.sweep"), ("two.yaml", "record.sweep"),
    ]  # fmt: skip
    assert len({job.key for job in jobs}) == 1
    assert len(load_runs(tmp_path / "results" / "both")) == 2


def test_a_damaged_manifest_is_refused_in_a_line(call, few, tmp_path):
    directory = tmp_path / "results" / "grid"
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text("[" * 100_000)
    outcome = call("sweep", swept(tmp_path / "grid.yaml", intervene=["none"]), *few)
    assert outcome.code == 2
    assert outcome.err.startswith("error: expected a sweep's manifest in")


def test_the_states_of_a_thousand_jobs_take_little(tmp_path):
    """One reading of each run.json, whatever the number of jobs."""
    jobs = [plan.Job(f"{n:012x}", {"downstream": "k"}, (f"seed={n}",), "s") for n in range(1000)]
    plan.record(tmp_path, jobs)
    for job in jobs[:600]:
        place = tmp_path / job.request
        place.mkdir()
        run = {
            "run_id": job.request, "method": "none", "status": "done", "schema": 2,
            "requests": [job.request], "measures": {"downstream": {"k": {}}},
        }  # fmt: skip
        (place / "run.json").write_text(json.dumps(run))
        (place / "DONE").touch()
    begun = time.process_time()
    found = plan.states(tmp_path, plan.read(tmp_path))
    assert time.process_time() - begun < 5  # far above what it takes, far below a model's load
    assert (found.count("done"), found.count("pending")) == (600, 400)


def test_names_tell_jobs_apart():
    jobs = [("a=1", "b=2", "c=3"), ("a=1", "b=4", "c=3")]
    assert launching.named(jobs) == ["b=2", "b=4"]
    assert launching.named(jobs[:1]) == ["a=1 b=2 c=3"]


@pytest.mark.parametrize("damage", ["status", "rows"])
def test_a_damaged_run_is_not_done(call, few, damage):
    """Refused as a single job refuses it, and not told as done."""
    assert call("run", *few, "intervene=none").code == 0
    [path] = RUNS.glob("*/run.json")
    if damage == "status":
        path.write_text(path.read_text().replace('"status": "done"', '"status": "failed"'))
    else:
        table = path.with_name("rows.parquet")
        duckdb.execute(f"CREATE OR REPLACE TEMP TABLE found AS SELECT * FROM '{table}'")
        duckdb.execute(f"COPY (FROM found UNION ALL FROM found) TO '{table}' (FORMAT parquet)")
    outcome = call("run", "-m", *few, "intervene=none", "seed=0")
    assert outcome.code == 2
    assert "done before" not in outcome.err
