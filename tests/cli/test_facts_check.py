"""`palimpsest facts check`: what is wrong with a file, and what a model makes of it."""

import json
from pathlib import Path

from palimpsest.cli.sweeps import sweep_overrides


def test_a_sound_file_tells_its_classes_and_splits(call, tmp_path):
    file = facts(tmp_path, [fact("Lyon", "France"), fact("Kyoto", "Japan")])
    outcome = call("facts", "check", file)
    assert outcome.code == 0, outcome.err
    assert "2 facts, 0 problems" in outcome.out
    assert "France" in outcome.out
    assert "if a model knew every fact" in outcome.out


def test_every_problem_is_told_with_its_line(call, tmp_path):
    broken = {**fact("Bonn", "Germany"), "true": 7}
    file = facts(tmp_path, [fact("Lyon", "France"), broken, {"subject": "Rome"}])
    outcome = call("facts", "check", file)
    assert outcome.code == 2
    assert "4 problems" in outcome.out
    assert "line 2" in outcome.out
    assert "line 3" in outcome.out


def test_a_model_is_asked_if_one_is_named(call, tiny, tmp_path):
    records = json.loads(tiny.facts.read_text())[:8]
    asked = [record["requested_rewrite"] for record in records]
    lines = [
        {
            "relation": rewrite["relation_id"],
            "subject": rewrite["subject"],
            "prompt": rewrite["prompt"],
            "true": rewrite["target_true"]["str"],
        }
        for rewrite in asked
    ]
    outcome = call("facts", "check", facts(tmp_path, lines), f"model.path={tiny.model}")
    assert outcome.code == 0, outcome.err
    assert "known to the model" in outcome.out


def test_a_wrong_override_is_one_line(call, tmp_path):
    file = facts(tmp_path, [fact("Lyon", "France")])
    outcome = call("facts", "check", file, "facts.limt=3")
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert "facts.limit" in outcome.err


def test_a_sweep_that_comes_with_palimpsest_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "record.sweep=quickstart" in sweep_overrides(Path("sweeps/quickstart.yaml"))


def fact(subject, true):
    return {"relation": "r", "subject": subject, "prompt": "The city of {} is in", "true": true}


def facts(directory, lines):
    file = directory / "facts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
