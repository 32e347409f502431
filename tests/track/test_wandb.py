"""Offline wandb runs, read back by wandb's own command."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest.errors import RequestError
from palimpsest.record.row import Row
from palimpsest.record.store import RunStore
from palimpsest.track.wandb import NullTracker, Tracker

KEY = "0a1b2c3d4e" * 4


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    """No account, and wandb's own caches out of the user's home."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def inspect(directory: Path, *options: str) -> str:
    [run] = (directory / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(run)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in inspect(directory).splitlines()]


@pytest.fixture
def tracked(runs, tmp_path, monkeypatch):
    """A run of the synthetic sweep, finished while being tracked with a key in the environment."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    source = runs[1]
    directory = tmp_path / "my_sweep" / source.run_id
    store = RunStore.open(directory, source.run)
    tracker = Tracker(mode="offline", tags=["night"])
    with tracker.run(directory, source.run) as live:
        store.update(wandb=tracker.describe())
        store.append(source.rows)
        (directory / "intervention" / "a").mkdir(parents=True)
        (directory / "intervention" / "a" / "delta.json").write_text("{}")
        live.log_results(store.snapshot())
        store.finish()
    return directory


def test_a_run_can_be_read_back(tracked):
    found = json.loads(inspect(tracked, "--summary"))
    assert (found["state"], found["exit_code"]) == ("finished", 0)
    assert found["run_id"] == tracked.name
    assert found["project"] == "palimpsest"
    assert found["tags"] == ["night"]
    assert found["config"]["intervene"]["variant"] == "plain"
    assert 0 < found["summary"]["downstream/efficacy/probability"] <= 1
    assert found["summary"]["rows"]["ncols"] == 15
    assert "figures/recoverability" in found["summary"]


def test_group_job_type_metrics_and_artifact_are_recorded(tracked):
    found = records(tracked)
    [run] = [record["run"] for record in found if record["type"] == "run"]
    assert (run["run_group"], run["job_type"]) == ("my_sweep", "rome")
    metrics = [record["metric"] for record in found if record["type"] == "metric"]
    assert any(metric.get("step_metric") == "step" for metric in metrics)
    artifacts = [record["artifact"] for record in found if record["type"] == "artifact"]
    assert "intervention" in {artifact["type"] for artifact in artifacts}


def test_run_json_says_where_the_tracked_run_is(tracked):
    described = json.loads((tracked / "run.json").read_text())["wandb"]
    assert (described["mode"], described["id"]) == ("offline", tracked.name)
    assert (tracked / described["directory"]).is_dir()
    assert described["directory"].startswith("wandb/")


def test_no_file_holds_the_key(tracked):
    for path in tracked.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes()


def test_a_failing_run_is_failed_there_and_raises_on(tmp_path):
    run = {"run_id": "feed00000001", "method": "rome", "config": {}}
    with pytest.raises(ZeroDivisionError), Tracker().run(tmp_path, run):
        _ = 1 / 0
    found = json.loads(inspect(tmp_path, "--summary"))
    assert (found["state"], found["exit_code"]) == ("failed", 1)


def test_a_run_after_a_failed_one_is_its_own(tmp_path):
    for name in ("a", "b"):
        run = {"run_id": f"{name}eed00000001", "method": "rome", "config": {"x": name}}
        (tmp_path / name).mkdir()
        try:
            with Tracker().run(tmp_path / name, run):
                if name == "a":
                    raise RuntimeError
        except RuntimeError:
            pass
    found = json.loads(inspect(tmp_path / "b", "--summary"))
    assert (found["state"], found["config"]) == ("finished", {"x": "b"})


def test_steps_become_history(tmp_path, write_run):
    about = {"scope": "fact", "axis": "downstream", "metric": "efficacy", "protocol": "argmax"}
    rows = [
        Row(**about, fact_id=f, step=s, value=v)
        for s, f, v in ((1, "a", 1.0), (1, "b", 0.0), (5, "a", 0.0), (5, "b", 0.0))
    ]
    run = write_run(*rows)
    with Tracker().run(run.path, run.run) as live:
        live.log_results(run)
    history = [record["history"]["item"] for record in records(run.path) if "history" in record]
    name = "by_step/downstream/efficacy/argmax"
    steps = {item["step"]: item[name] for item in history if name in item}
    assert steps == {1: 0.5, 5: 0}


def test_tracing_becomes_numbers_a_table_and_figures(write_run):
    about = {"scope": "fact", "axis": "localization", "split": "target", "relation": "P1"}
    rows, facts = [], []
    for fact in ("a", "b"):
        about["fact_id"] = fact
        facts.append({"fact_id": fact, "true": "$x$ <b>", "tokens": [" A", "\n", " is"]})
        facts[-1]["subject_tokens"] = [0, 1]
        for metric, value in (("clean_probability", 0.75), ("total_effect", 0.5)):
            rows.append(Row(**about, metric=metric, protocol="noise", value=value))
        for position, layer in itertools.product(("last_subject", "token/1"), (0, 4)):
            place = {"position": position, "layer": layer, "protocol": "noise/residual"}
            rows.append(Row(**about, **place, metric="indirect_effect", value=layer / 16))
    run = write_run(*rows, method="trace")
    (run.path / "facts.json").write_text(json.dumps(facts))
    with Tracker().run(run.path, run.run) as live:
        live.log_results(run)
    found = json.loads(inspect(run.path, "--summary"))["summary"]
    assert found["localization/total_effect/noise"] == 0.5
    assert found["localization/clean_probability/noise"] == 0.75
    assert found["localization/peak_aie/noise/residual"] == 0.25
    assert found["localization/peak_aie_layer/noise/residual"] == 4
    assert found["localization/peak_aie_last_subject/noise/residual"] == 0.25
    assert (found["aie"]["nrows"], found["aie"]["ncols"]) == (2, 8)
    figures = {name for name in found if name.startswith("figures/")}
    assert figures == {f"figures/{n}" for n in ("average", "aie", "fact-0", "fact-1")}


def test_sequences_become_curves_over_facts_without_missing_values(tmp_path, write_run):
    about = {"scope": "fact", "axis": "downstream", "split": "target"}
    win = about | {"metric": "efficacy", "protocol": "probability", "prompt_id": "fit"}
    near = about | {"metric": "neighborhood", "protocol": "probability"}
    gone = about | {"metric": "suppression", "protocol": "candidates"}
    text = {"scope": "fact", "axis": "downstream", "metric": "perplexity"}
    text["protocol"] = "heldout_text"
    rows = [
        *(Row(**win, fact_id=f"f{k:02d}", step=10, value=float(k > 1)) for k in range(10)),
        *(Row(**win, fact_id=f"f{k:02d}", step=12, value=float(k > 5)) for k in range(1, 12)),
        Row(**win, fact_id="f00", step=12, value=None, n=0, note="failed"),
        Row(**near, fact_id="f01", prompt_id="neighbor/0", step=12, value=1.0),
        Row(**near, fact_id="f02", prompt_id="neighbor/0", step=12, value=0.0),
        Row(**near, fact_id="f02", prompt_id="neighbor/1", step=12, value=1.0),
        Row(**gone, fact_id="f01", prompt_id="fit", step=12, value=1.0),
        Row(**gone, fact_id="f01", prompt_id="paraphrase/0", step=12, value=0.0),
        Row(**text, step=10, value=20.0),
        Row(**text, step=12, value=None, n=0, note="no finite perplexity"),
    ]
    run = write_run(*rows)
    with Tracker().run(run.path, run.run) as live:
        live.log_results(run)
    history = [record["history"]["item"] for record in records(run.path) if "history" in record]
    logged = [item for item in history if any(name.startswith("by_step/") for name in item)]
    curves = {
        item["step"]: {name: item[name] for name in item if name.startswith("by_step/")}
        for item in logged
    }
    name = "by_step/downstream/{}".format
    assert curves[10] == {
        name("efficacy/probability"): 0.8,
        name("retention/first_10"): 0.8,
        name("perplexity/heldout_text"): 20,
    }
    assert curves[12] == {
        name("efficacy/probability"): pytest.approx(6 / 11),
        name("retention/first_10"): pytest.approx(4 / 9),
        name("neighborhood/probability"): 0.75,
        name("suppression/candidates"): 0,
    }


@pytest.mark.parametrize("tracker", [NullTracker(), Tracker(mode="disabled")])
def test_disabled_leaves_nothing(tracker, tmp_path, runs):
    with tracker.run(tmp_path, runs[0].run) as live:
        live.log_results(runs[0])
    assert list(tmp_path.iterdir()) == []
    assert tracker.describe() == {"mode": "disabled", "id": None, "directory": None}


def test_auto_is_online_only_for_the_logged_in(monkeypatch, tmp_path):
    assert Tracker().resolved_mode() == "offline"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert Tracker().resolved_mode() == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert Tracker().resolved_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert Tracker().resolved_mode() == "disabled"


@pytest.mark.parametrize(
    "raw", [b"machine \xe9", b"machine", b"\x00" * 9, "machine a".encode("utf-16")]
)
def test_a_netrc_that_cannot_be_read_holds_no_account(tmp_path, raw):
    (tmp_path / "netrc").write_bytes(raw)
    assert Tracker().resolved_mode() == "offline"


def test_an_unknown_mode_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError, match="did you mean 'offline'"):
        Tracker(mode="ofline").run(tmp_path, {"run_id": "x", "method": "rome"})
