"""One run from the command line to the last row, with a tiny model that knows its facts."""

import json
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from statistics import fmean

import duckdb
import pytest

from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.intervention import Unchanged, load
from palimpsest.record.results import COLUMNS, KEY, load_runs

RUN_JSON = {
    "run_id", "schema", "status", "method", "imitates", "site", "located", "model", "facts", "seed",
    "requests", "measures", "sweep", "config", "versions", "git_commit", "code", "device",
    "seconds", "peak_mb", "batch_sizes", "wandb", "command", "error", "started", "finished",
}  # fmt: skip

METHODS = ["none", "rome", "rome_batch", "rome_plain", "random_delta", "leace", "leace_shuffled"]
each_method = pytest.mark.parametrize("name", METHODS)


def mean(run, metric, protocol, **equal):
    values = [row.value for row in run.select(metric, protocol, **equal)]
    assert values, f"no rows of {metric}/{protocol}"
    return fmean(values)


def files(directory):
    """Every file below, with its time of change and content."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def run_id(call, few, tmp_path):
    """Runs, and gives the id under which the results were written."""

    def run(*words):
        place = tmp_path / f"place{len(list(tmp_path.iterdir()))}"
        outcome = call("run", *few, f"record.dir={place}", *words)
        assert outcome.code == 0, outcome.err
        return outcome.err.split("/")[-1].strip()

    return run


# -- the contract ---------------------------------------------------------------------------------


@each_method
def test_a_run_leaves_exactly_these_files(done, name):
    path = done[name].path
    found = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert found == {
        "DONE",
        "run.json",
        "rows.parquet",
        "facts.json",
        "intervention/intervention.json",
        "intervention/intervention.safetensors",
    }


@each_method
def test_run_json_holds_what_the_contract_names(done, name):
    run = json.loads((done[name].path / "run.json").read_text())
    assert set(run) == RUN_JSON
    assert (run["status"], run["error"], run["schema"], run["seed"]) == ("done", None, 2, 0)
    assert run["method"] == name.replace("rome_batch", "rome")
    assert set(run["model"]) == {"name", "fingerprint", "prefix"}
    assert run["model"]["name"] == "model"
    assert len(run["requests"]) == 1
    assert all(len(keys) == 1 for keys in run["measures"].values())
    assert set(run["facts"]) == {"name", "fingerprint", "counts", "sizes"}
    assert set(run["seconds"]) == set(run["peak_mb"])
    assert set(run["seconds"]) == {"load", "locate", "split", "prepare", "fit", "measure"}
    assert run["wandb"] == {"mode": "disabled", "id": None, "directory": None}
    assert run["config"]["facts"]["limit"] == 6
    assert run["command"].startswith("palimpsest run ")


@each_method
def test_the_run_s_name_is_its_directory_s(done, name):
    run = done[name]
    assert run.path.name == run.run_id
    assert re.fullmatch("[0-9a-f]{12}", run.run_id)


def test_runs_of_different_methods_have_different_names(done):
    assert len({run.run_id for run in done.values()}) == len(done)


@each_method
def test_rows_have_the_contract_s_columns_and_unique_keys(done, name):
    path = str(done[name].path / "rows.parquet")
    with duckdb.connect() as database:
        query = "DESCRIBE SELECT * FROM read_parquet(?)"
        described = database.execute(query, [path]).fetchall()
        keys = database.execute(f"SELECT {', '.join(KEY)} FROM read_parquet(?)", [path]).fetchall()
    assert {column: kind for column, kind, *_ in described} == COLUMNS
    assert max(Counter(keys).values()) == 1


@each_method
def test_a_missing_value_has_a_cause(done, name):
    assert all(row.note for row in done[name].rows if row.value is None)


@each_method
def test_every_axis_is_measured(done, name):
    axes = {row.axis for row in done[name].rows}
    expected = {"downstream", "recoverability", "consistency"}
    assert axes == (expected if name == "none" else expected | {"cost"})


@each_method
def test_counts_say_how_many_facts_each_filter_left(done, name):
    facts = done[name].run["facts"]
    counts, sizes = facts["counts"], facts["sizes"]
    assert counts["records"] == 64
    assert counts["selected"] == 32
    assert counts["target_dealt"] >= counts["target_known"] >= counts["target_taken"] == 6
    assert sizes["target"] == len(done[name].facts) == 6
    assert all(counts[f"{split}_taken"] == size for split, size in sizes.items())


@each_method
def test_facts_json_says_what_the_model_said(done, name):
    for fact in done[name].facts:
        assert set(fact) == {
            "fact_id", "relation", "subject", "prompt", "true", "new", "answer", "top",
        }  # fmt: skip
        assert len(fact["top"]) == 5
        assert fact["subject"] in fact["prompt"]


@each_method
def test_the_intervention_can_be_loaded_again(done, name):
    found = load(done[name].path / "intervention", [WeightDeltas, Erasure, Unchanged])
    assert found.model == done[name].run["model"]["fingerprint"]
    assert found.change.layer == (None if name == "none" else 0)
    if isinstance(found, WeightDeltas):
        assert found.left.shape == ((1, 6, 64) if name == "rome_batch" else (6, 1, 64))


# -- what the numbers must be ---------------------------------------------------------------------


def test_an_unchanged_model_says_what_it_knows(done):
    run = done["none"]
    assert mean(run, "efficacy", "argmax") == 0
    assert mean(run, "suppression", "vocabulary", prompt_id="fit") == 0
    assert mean(run, "relation_accuracy", "vocabulary", split="test") == 1
    assert all(fact["answer"].strip().startswith(fact["true"]) for fact in run.facts)


@pytest.mark.parametrize("name", ["rome", "rome_plain", "rome_batch"])
def test_rome_makes_the_new_objects_likely(done, name):
    assert new_objects(done[name]) > 50 * new_objects(done["none"])


def test_a_random_push_of_equal_norm_does_not(done):
    assert new_objects(done["random_delta"]) < 0.05 * new_objects(done["rome"])


def new_objects(run):
    """Mean probability of the new objects, of those that are among the five likeliest tokens."""
    tops = [{token.strip(): p for token, p in fact["top"]} for fact in run.facts]
    return fmean(top.get(f["new"], 0.0) for top, f in zip(tops, run.facts, strict=True))


def test_leace_makes_the_old_objects_unlikely(done):
    assert mean(done["leace"], "suppression", "vocabulary", prompt_id="fit") > 0.5


def test_leace_leaves_no_covariance_on_its_fit_sample(done):
    [row] = done["leace"].select("residual_cross_covariance", "fit_sample")
    assert row.value < 1e-9
    assert row.scope == "relation"


# -- again ----------------------------------------------------------------------------------------


def test_a_run_ends_with_one_line_that_says_where_it_is(call, few, tmp_path):
    outcome = call("run", "intervene=none", *few)
    [path] = (tmp_path / "results" / "runs").iterdir()
    assert outcome.err == f"none: done: results/runs/{path.name}\n"
    assert outcome.out == ""


def test_the_second_time_prints_one_line_and_touches_nothing(call, few, done):
    run = done["leace"]
    before = files(run.path)
    outcome = call("run", "intervene=leace", *few, f"record.dir={run.path.parent}")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == f"leace: done before, left as it is: {run.path}\n"
    assert files(run.path) == before


@each_method
def test_elsewhere_from_nothing_gives_the_same_rows(
    done, name, call, tiny, few, tmp_path, monkeypatch
):
    """Other directories for results, model and facts, and an empty cache."""
    run = done[name]
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    model, facts = tmp_path / "model", tmp_path / "facts.json"
    shutil.copytree(tiny.model, model)
    shutil.copy(tiny.facts, facts)
    words = shlex.split(run.run["command"])[2:]
    moved = [f"model.path={model}", f"facts.path={facts}", f"record.dir={tmp_path / 'there'}"]
    assert call("run", *words, *moved).code == 0
    [again] = load_runs(tmp_path / "there")
    assert again.run_id == run.run_id
    assert again.rows == run.rows
    assert again.facts == run.facts


def test_an_unfinished_run_is_begun_anew(call, few, done, tmp_path):
    run_id = done["none"].run_id
    left = tmp_path / "there" / run_id
    left.mkdir(parents=True)
    (left / "rows.jsonl").write_text('{"torn')
    (left / "run.json").write_text(json.dumps({**done["none"].run, "status": "running"}))
    assert call("run", "intervene=none", *few, f"record.dir={tmp_path / 'there'}").code == 0
    assert load_runs(left)[0].rows == done["none"].rows


# -- what a run's name depends on -----------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["record.sweep=another"],
        ["record=wandb", "record.tracker.mode=disabled", "record.tracker.project=other"],
        ["model.name=other"],
        ["model.depths.mlp.early=3"],
        ["locate.depth=late"],
        ["intervene.moments.layers=[0,2]"],
        ["model.device=cpu"],
        ["evaluate.probes.stride=2"],
    ],
    ids=lambda words: words[0],
)
def test_the_name_does_not_depend_on(words, run_id, done):
    assert run_id("intervene=rome", *words) == done["rome"].run_id


@pytest.mark.parametrize(
    "word",
    [
        "seed=1",
        "facts.limit=5",
        "facts.fit=5",
        "facts.relations=[P103]",
        "locate.layer=1",
        "contexts=2",
        "intervene.search.steps=3",
        "intervene.moments.tokens=2000",
        "intervene.moments.sink=true",
        "model.prefix=''",
        "model.dtype=bfloat16",
    ],
)
def test_the_name_depends_on(word, run_id, done):
    assert run_id("intervene=rome", word) != done["rome"].run_id


def test_a_measure_s_text_is_known_by_its_content(call, few, tmp_path):
    """The run is the same one; what was measured with another text is not compared."""
    keys, names = [], set()
    for name, content in (("a", "one " * 40), ("b", "one " * 40), ("c", "two " * 40)):
        text = tmp_path / f"{name}.txt"
        text.write_text(content)
        words = ["intervene=none", f"evaluate.downstream.text={text}", f"record.dir={text.stem}"]
        assert call("run", *few, *words).code == 0
        [run] = load_runs(Path(name))
        keys.append(list(run.run["measures"]["downstream"]))
        names.add(run.run_id)
    assert keys[0] == keys[1] != keys[2]
    assert len(names) == 1


def test_two_spellings_of_one_method_share_a_name(run_id, done):
    assert run_id("intervene=rome", "intervene.variant=plain") == done["rome_plain"].run_id
    assert run_id("intervene=leace", "intervene.shuffled=true") == done["leace_shuffled"].run_id


def test_no_change_is_the_same_at_every_layer(run_id, done):
    assert run_id("intervene=none", "locate.layer=3") == done["none"].run_id


def test_controls_name_the_run_that_they_imitate(done):
    assert done["random_delta"].run["imitates"] == done["rome"].run_id
    assert done["leace_shuffled"].run["imitates"] == done["leace"].run_id
    assert {done[name].run["imitates"] for name in ("none", "rome", "leace")} == {None}


def test_results_lie_under_the_sweep_s_name(call, few, tmp_path):
    assert call("run", "intervene=none", *few, "record.sweep=night").code == 0
    [path] = Path("results", "night").iterdir()
    assert json.loads((path / "run.json").read_text())["sweep"] == "night"


# -- attacks on weights ----------------------------------------------------------------------------


def test_attacks_on_weights_see_what_the_method_wrote(call, done, few, tmp_path):
    """Inversion of each edit alone; all three of one change; none of an eraser by hook."""
    on = ["evaluate.relearning.steps=[0,2]", "evaluate.compression.bits=[4]"]
    joint = ["intervene=rome", "protocol=batch", "intervene.moments.tokens=2000"]
    words = [word for word in few if not word.startswith("~")]
    assert call("run", *words, *on, *joint, f"record.dir={tmp_path / 'r'}").code == 0
    [run] = load_runs(tmp_path / "r")

    def values(some, metric):
        return {row.value for row in some.rows if row.metric == metric} - {None}

    for metric in ("relearned_old", "relearned_test", "compressed_old", "compressed_other"):
        assert values(run, metric), metric
    assert values(run, "inversion_success")
    assert values(done["rome"], "inversion_success")
    assert not values(done["leace"], "inversion_success")
    notes = {r.note for r in done["leace"].rows if r.metric == "inversion_success"}
    assert all("no W_out was changed" in note for note in notes)
