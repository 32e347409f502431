"""docs/extend.md keeps its promises: its own tests pass, and so does a run with its files."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from palimpsest.record.results import load_runs

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"
BLOCKS = {
    name: text
    for text, name in re.findall(
        r"^```(?:python|yaml)\n(# (\S+\.(?:py|yaml))\n.*?)^```$",
        PAGE.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The page's files: Python ones can be imported, yaml ones lie in `conf`."""
    for name, text in BLOCKS.items():
        place = tmp_path / ("mine" if name.endswith(".py") else "conf") / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    yield tmp_path
    for name in BLOCKS:
        sys.modules.pop(name.removesuffix(".py"), None)


def write_csv(tiny, path):
    """The tiny model's facts as the page's CSV."""
    records = json.loads(tiny.facts.read_text())
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["relation", "subject", "prompt", "object", "paraphrase"])
        for record in records:
            asked = record["requested_rewrite"]
            subject = asked["subject"]
            again = record["paraphrase_prompts"][0].replace(subject, "{}")
            true = asked["target_true"]["str"]
            writer.writerow([asked["relation_id"], subject, asked["prompt"], true, again])


def test_the_page_holds_a_file_a_yaml_and_a_test_of_each():
    assert set(BLOCKS) == {
        "top_components.py", "intervene/top_components.yaml", "test_top_components.py",
        "next_token_entropy.py", "evaluate/measure/entropy.yaml", "evaluate/mine.yaml",
        "test_next_token_entropy.py",
        "csv_facts.py", "facts/csv.yaml", "test_csv_facts.py",
        "by_relation.py", "study/by_relation.yaml", "test_by_relation.py",
    }  # fmt: skip


def test_its_tests_pass(written):
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    result = subprocess.run(words, cwd=written / "mine", capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 passed" in result.stdout


def test_a_run_with_all_three(written, call, tiny):
    write_csv(tiny, written / "facts.csv")
    words = [
        "intervene=top_components", "facts=csv", "facts.path=facts.csv", "facts.relations=[P17]",
        "facts.limit=6", "evaluate=quick", "evaluate.probes.least=1",
        "+evaluate/measure@evaluate.entropy=entropy", f"model.path={tiny.model}", "locate.layer=2",
        "record=local",
    ]  # fmt: skip
    for method in ("intervene=none", words[0]):
        outcome = call("run", "--config-dir", "conf", *words, method)
        assert outcome.code == 0, outcome.err
    none, run = sorted(load_runs(Path("results/runs")), key=lambda run: run.method != "none")
    assert (none.method, run.method) == ("none", "top_components")
    assert run.run["facts"]["counts"]["selected"] == 32
    entropies = [row.value for row in run.select("entropy", "next_token")]
    assert len(entropies) == 2 * len(run.facts)
    assert fmean(entropies) > fmean(row.value for row in none.select("entropy", "next_token"))
    words = ["--config-dir", "conf", "+study@studies.by_relation=by_relation"]
    words += ["studies.by_relation.metric=paraphrase", "studies.by_relation.protocol=probability"]
    assert call("report", "results/runs", *words).code == 0
    page = Path("results/runs/report.html").read_text(encoding="utf-8")
    assert "entropy" in page
    assert "<h2>Paraphrase by relation</h2>" in page
    written = Path("results/runs/by_relation.csv").read_text(encoding="utf-8")
    assert written.startswith("method,P17,P17/low,P17/high,P17/n\n")


def entropies(run):
    """Values by prompt."""
    found = run.select("entropy", "next_token")
    return {(row.fact_id, row.prompt_id): row.value for row in found}


def test_a_ruler_of_one_s_own_and_finished_runs_measured_further(written, call, tiny):
    """The same values under the same key, asked for at once or added later; also two of a class."""
    write_csv(tiny, written / "facts.csv")
    words = [
        "intervene=none", "facts=csv", "facts.path=facts.csv", "facts.relations=[P17]",
        "facts.limit=6", f"model.path={tiny.model}", "record=local", "record.dir=results/runs",
    ]  # fmt: skip
    own = call("run", "--config-dir", "conf", *words, "evaluate=mine", "record.dir=results/mine")
    assert own.code == 0, own.err
    [mine] = load_runs(Path("results/mine"))
    assert call("run", "--config-dir", "conf", *words, "evaluate=quick").code == 0
    [quick] = load_runs(Path("results/runs"))
    assert entropies(quick) == {}
    added = "+evaluate/measure@evaluate."
    for name, setting in (("entropy", "true"), ("again", "false")):
        further = [f"{added}{name}=entropy", f"evaluate.{name}.paraphrases={setting}"]
        if name == "again":
            further += [f"{added}entropy=entropy"]
        outcome = call(
            "measure",
            "results/runs",
            "--config-dir",
            "conf",
            "--own-classes",
            "evaluate=quick",
            *further,
        )
        assert outcome.code == 0, outcome.err
        if name == "entropy":
            [run] = load_runs(Path("results/runs"))
            assert entropies(run) == entropies(mine) != {}
            assert run.run["measures"]["entropy"].keys() == mine.run["measures"]["entropy"].keys()
    [run] = load_runs(Path("results/runs"))
    assert set(run.run["measures"]) >= {"entropy", "again", "downstream"}
    assert run.run_id == mine.run_id == quick.run_id


def test_a_misspelt_key_is_refused(written, call, tiny):
    words = ["intervene=top_components", "++intervene.polcy=all", f"model.path={tiny.model}"]
    outcome = call("run", "--config-dir", "conf", *words)
    assert outcome.code == 2
    assert "found 'intervene.polcy'; did you mean 'intervene.policy'" in outcome.err
