"""Finished runs are measured further: without a fit, with the rows of a run that had it all."""

import json
import shutil
from pathlib import Path

import duckdb
import pytest

from palimpsest.cli import measure as command
from palimpsest.intervene.editors.editor import Editor
from palimpsest.intervene.erasers.eraser import Eraser
from palimpsest.intervene.pairs import InTurn
from palimpsest.record.results import COLUMNS, load_runs
from palimpsest.record.store import run_of

SMALL = (
    "evaluate.tuned_lens.tokens=128",
    "evaluate.tuned_lens.steps=1",
    "evaluate.relearning.steps=[0,1]",
    "evaluate.probes.least=1",
    "evaluate.mlp_probes.least=1",
    "evaluate.undertext.least=1",
)
METHODS = {
    "none": ["intervene=none"],
    "independent": ["intervene=rome"],
    "sequential": ["intervene=rome", "protocol=sequential"],
    "pair": ["intervene=erase_then_edit", "intervene.first_layer=2"],
    "eraser": ["intervene=leace"],
}


@pytest.fixture
def quick(few):
    """Overrides of a run with the measures of `quick`, as `full` has them."""
    words = [word for word in few if not word.startswith("~")]
    return [*words, "evaluate=quick", "evaluate.shadow_probes.subjects=20"]


def rows(directory: Path) -> dict[tuple, tuple]:
    """By key the value, n and note of every row."""
    [path] = directory.glob("*/rows.parquet")
    query = f"SELECT {', '.join(COLUMNS)} FROM read_parquet('{path}')"
    found = duckdb.sql(query).fetchall()
    split = len(COLUMNS) - 3
    keyed = {row[:split]: row[split:] for row in found}
    assert len(keyed) == len(found)
    return keyed


def no_fit(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was fitted")

    for kind in (Editor, Eraser, InTurn):
        monkeypatch.setattr(kind, "fit", refuse)


@pytest.mark.parametrize("name", METHODS)
def test_the_rows_are_those_of_a_run_that_had_them_from_the_start(call, quick, name, monkeypatch):
    method = METHODS[name]
    full = [word for word in quick if word != "evaluate=quick"]
    assert call("run", *full, *SMALL, *method, "record.sweep=whole").code == 0
    assert call("run", *quick, *method, "record.sweep=parts").code == 0
    before = rows(Path("results/parts"))
    no_fit(monkeypatch)
    outcome = call("measure", "results/parts", *SMALL)
    assert outcome.code == 0, outcome.err
    found, wanted = rows(Path("results/parts")), rows(Path("results/whole"))
    assert found == wanted
    assert before.items() <= found.items()
    assert {key[0] for key in found} >= {"tuned_lens", "relearning", "downstream"} - {""}
    [parts], [whole] = load_runs(Path("results/parts")), load_runs(Path("results/whole"))
    assert parts.run_id == whole.run_id
    assert (parts.run["status"], set(parts.run["measures"])) == ("done", set(whole.run["measures"]))
    assert not (parts.path / "rows.jsonl").exists()


def test_asked_again_nothing_is_done(call, quick):
    assert call("run", *quick, "intervene=none").code == 0
    assert call("measure", "results/runs", "evaluate=quick", "evaluate.probes.least=1").code == 0
    [path] = Path("results/runs").glob("*/rows.parquet")
    before = path.read_bytes(), path.stat().st_mtime_ns
    outcome = call("measure", "results/runs", "evaluate=quick", "evaluate.probes.least=1")
    assert "measured before, left as it is" in outcome.err
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_run_with_more_measures_takes_up_the_finished_one(call, quick, monkeypatch):
    assert call("run", *quick, "intervene=rome").code == 0
    no_fit(monkeypatch)
    full = [word for word in quick if word != "evaluate=quick"]
    assert call("run", *full, *SMALL, "intervene=rome").code == 0
    [run] = load_runs(Path("results/runs"))
    assert "relearning" in run.run["measures"]


def test_one_measure_may_stand_there_in_two_settings(call, quick):
    assert call("run", *quick, "intervene=none").code == 0
    words = ["evaluate=quick", "evaluate.probes.least=1", "evaluate.attacks.budgets=[2]"]
    assert call("measure", "results/runs", *words).code == 0
    keys = {key[:2] for key in rows(Path("results/runs"))}
    assert len([1 for measure, _ in keys if measure == "attacks"]) == 2
    assert len([1 for measure, _ in keys if measure == "downstream"]) == 1


def test_on_another_machine_the_model_is_elsewhere(call, quick, tiny, tmp_path):
    model = tmp_path / "copied"
    shutil.copytree(tiny.model, model)
    here = [word for word in quick if not word.startswith("model.path")]
    assert call("run", *here, "intervene=leace", f"model.path={model}").code == 0
    model.rename(tmp_path / "gone")
    words = ["results/runs", "evaluate=quick", "evaluate.probes.least=2"]
    assert call("measure", *words).code == 2
    assert call("measure", *words, f"model.path={tiny.model}").code == 0
    outcome = call("measure", *words, "evaluate.probes.stride=1", f"model.path={tiny.ignorant}")
    assert outcome.code == 2
    assert "expected the model of run" in outcome.err
    assert "name the right one with model.path=" in outcome.err


def test_an_interrupted_measurement_leaves_the_run_finished(call, quick, monkeypatch):
    assert call("run", *quick, "intervene=none").code == 0
    before = rows(Path("results/runs"))
    from palimpsest.evaluate.attacks.compression import Compression

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Compression, "measure", interrupt)
        assert call("measure", "results/runs", *SMALL).code == 1
    [path] = Path("results/runs").iterdir()
    assert rows(Path("results/runs")) == before
    assert run_of(path)["status"] == "done"
    assert call("measure", "results/runs", *SMALL).code == 0
    assert {key[0] for key in rows(Path("results/runs"))} >= {"undertext", "compression"}


@pytest.mark.parametrize("word", ["intervene=leace", "seed=1", "facts.limit=3", "record.dir=x"])
def test_what_was_done_is_not_changed_by_measuring(call, quick, word):
    assert call("run", *quick, "intervene=none").code == 0
    outcome = call("measure", "results/runs", word)
    assert outcome.code == 2
    assert outcome.err.startswith("error: expected evaluate=..., or where the model")


def test_strangers_among_the_runs_are_passed_over(call, quick):
    assert call("run", *quick, "intervene=none").code == 0
    for name, text in (("a", "[" * 100_000), ("b", "{}"), ("c", '{"schema": 1}')):
        place = Path("results/runs") / name
        place.mkdir()
        (place / "run.json").write_text(text)
        (place / "DONE").touch()
    assert call("measure", "results/runs", "evaluate=quick", "evaluate.probes.least=2").code == 0


def test_without_runs_there_is_nothing_to_measure(call, tmp_path):
    outcome = call("measure", tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith("error: expected finished runs of this version's schema")


def test_settings_of_place_are_told_from_settings_of_work():
    ruler, places = command._split(["evaluate=quick", "model.path=a=b", "~evaluate.probes"])
    assert (ruler, places) == (["evaluate=quick", "~evaluate.probes"], {"model.path": "a=b"})
    assert json.dumps(places)


# -- results of somebody else ----------------------------------------------------------------------


@pytest.fixture
def theirs(done, tmp_path):
    """A finished run that came from elsewhere: its directory, and a change of its run.json."""
    place = tmp_path / "theirs" / done["none"].path.name
    shutil.copytree(done["none"].path, place)

    def alter(change) -> Path:
        run = json.loads((place / "run.json").read_text())
        change(run)
        (place / "run.json").write_text(json.dumps(run))
        return place

    return alter


def test_a_run_json_makes_no_model_run_its_own_code(call, theirs, monkeypatch):
    place = theirs(lambda run: run["config"]["model"].update(trust_remote_code=True))
    made = []
    monkeypatch.setattr(command, "parts_of", lambda config: made.append(config) or {})
    with pytest.raises(KeyError):
        command._further(place, run_of(place), command.composed([]).evaluate, {}, False)
    assert made[0].model.trust_remote_code is False


def test_a_run_json_names_no_class_of_somebodys(call, theirs):
    place = theirs(lambda run: run["config"]["facts"].update(_target_="os.system", command="true"))
    outcome = call("measure", place, "evaluate=full")
    assert outcome.code == 2
    assert "expected classes of palimpsest" in outcome.err
    assert "found 'os.system'; if the code of that name is yours, give --own-classes" in outcome.err


@pytest.mark.parametrize("name", ["../../outside/x", "another"])
def test_a_run_is_measured_in_its_own_directory_alone(call, theirs, tmp_path, name):
    place = theirs(lambda run: run.update(run_id=name))
    before = set(tmp_path.rglob("*"))
    outcome = call("measure", place, "evaluate=full")
    assert outcome.code == 2
    assert f"expected the directory of run {name!r} to bear its name" in outcome.err
    assert set(tmp_path.rglob("*")) == before


def test_a_foreign_run_is_passed_over_and_told(call, few, theirs):
    place = theirs(lambda run: None)
    foreign = place.parent / "0000000000ff"
    shutil.copytree(place, foreign)
    run = json.loads((foreign / "run.json").read_text())
    (foreign / "run.json").write_text(json.dumps({**run, "run_id": foreign.name, "config": None}))
    outcome = call("measure", place.parent, *[word for word in few if "evaluate" in word])
    assert outcome.code == 0
    assert f"passed over: {foreign}: expected the configuration" in outcome.err + outcome.out


@pytest.mark.parametrize("value", ["[a", "{a: *x}"])
def test_a_setting_that_is_no_yaml_is_one_line(call, theirs, value):
    outcome = call("measure", theirs(lambda run: None), f"model.path={value}")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
