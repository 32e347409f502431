"""`palimpsest apply`: what plain transformers loads is what the run measured; and back."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palimpsest.apply import ORIGINAL, RECORD
from palimpsest.cli import main
from palimpsest.record.results import Run, load_runs
from tests.cli.test_errors import check_one_line, listed

MORE = {
    "sequential": ["intervene=rome", "protocol=sequential"],
    "ft": ["intervene=ft"],
    "leace_readers": ["intervene=leace_readers"],
    "memit": [
        "intervene=memit",
        "protocol=batch",
        "intervene.span=2",
        "intervene.weight=0.01",
        "locate.layer=1",
    ],
}
"""Runs beside those of `done`, by a name."""


@pytest.fixture(scope="module")
def runs(done, few, cache, tmp_path_factory) -> dict[str, Run]:
    """One finished run of each shape of change."""
    home = tmp_path_factory.mktemp("more")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(cache))
        for name, words in MORE.items():
            assert main(["run", *few, *words, f"record.dir={home / name}"]) == 0
    return done | {name: load_runs(home / name)[0] for name in MORE}


def says(directory: Path, prompt: str) -> tuple[str, float]:
    """The likeliest next token and its probability, by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        ids = tokenizer(f"\n{prompt}", return_tensors="pt")["input_ids"]
        probability, token = model(ids).logits[0, -1].softmax(-1).max(-1)
        return tokenizer.decode(token), float(probability)


def said(fact: dict) -> tuple[str, float]:
    """The same as the run recorded it, as good as equal."""
    token, probability = fact["top"][0]
    return token, pytest.approx(probability, rel=1e-4)


def check_undone(call, tiny, directory: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    outcome = call("apply", "--undo", "--model", directory, "--output", back)
    assert outcome.code == 0, outcome.err
    assert outcome.err.startswith(f"{back}: 'model' as it was; fingerprint ")
    wanted = AutoModelForCausalLM.from_pretrained(tiny.model).state_dict()
    found = AutoModelForCausalLM.from_pretrained(back).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not {RECORD, ORIGINAL} & listed(back)


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rome_batch", "sequential", "memit", "leace_readers"])
def test_the_written_model_says_what_the_run_says(name, call, tiny, runs, tmp_path):
    run, out = runs[name], tmp_path / "out"
    outcome = call("apply", "--intervention", run.path, "--model", tiny.model, "--output", out)
    assert (outcome.code, outcome.out) == (0, ""), outcome.err
    record = json.loads((out / RECORD).read_text())
    assert record["model"]["fingerprint"] == run.run["model"]["fingerprint"]
    changed = ", ".join(record["changed"])
    assert outcome.err == (
        f"{out}: 'model', changed in {changed}; fingerprint {record['fingerprint'][:12]}, "
        "read back and found the same\n"
    )
    assert [says(out, fact["prompt"]) for fact in run.facts] == [said(f) for f in run.facts]
    assert all(says(tiny.model, fact["prompt"]) != said(fact) for fact in run.facts)
    check_undone(call, tiny, out, tmp_path)


@pytest.mark.parametrize("name", ["rome", "ft"])
def test_one_fact_is_changed_and_the_others_are_not(name, call, tiny, runs, tmp_path):
    run, out = runs[name], tmp_path / "out"
    fact = run.facts[2]
    words = ["--intervention", run.path, "--model", tiny.model, "--output", out]
    outcome = call("apply", *words, "--fact", fact["fact_id"])
    assert outcome.code == 0, outcome.err
    assert says(out, fact["prompt"]) == said(fact)
    assert json.loads((out / RECORD).read_text())["intervention"]["fact"] == fact["fact_id"]
    check_undone(call, tiny, out, tmp_path)


def test_the_folder_of_the_intervention_does_as_well(call, tiny, runs, tmp_path):
    run = runs["sequential"]
    outs = [tmp_path / "one", tmp_path / "two"]
    for out, place in zip(outs, (run.path, run.path / "intervention"), strict=True):
        words = ["--intervention", place, "--model", tiny.model, "--output", out, "--step", 2]
        assert call("apply", *words).code == 0
    fingerprints = {json.loads((out / RECORD).read_text())["fingerprint"] for out in outs}
    assert len(fingerprints) == 1
    last = tmp_path / "last"
    words = ["--intervention", run.path, "--model", tiny.model, "--output", last]
    assert call("apply", *words).code == 0
    assert json.loads((last / RECORD).read_text())["fingerprint"] not in fingerprints


def test_the_dtype_is_that_of_the_run(call, tiny, few, tmp_path):
    words = [*few, "intervene=rome", "protocol=batch", "model.dtype=bfloat16"]
    assert call("run", *words, f"record.dir={tmp_path / 'runs'}").code == 0
    [run] = load_runs(tmp_path / "runs")
    out = tmp_path / "out"
    words = ["--intervention", run.path, "--model", tiny.model, "--output", out]
    assert call("apply", *words).code == 0
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    other = call("apply", *words[:-1], tmp_path / "other", "model.dtype=float32")
    check_one_line(other, "expected the model with fingerprint .* load that model or fit anew")


def test_an_empty_directory_may_stand_there(call, tiny, runs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    words = ["--intervention", runs["rome_batch"].path, "--model", tiny.model, "--output", out]
    assert call("apply", *words).code == 0
    assert "model.safetensors" in listed(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- wrong requests --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A wrong request: a run by its name in braces, the model if it is not the right one."""

    name: str
    words: str
    message: str


GIVEN = "--model {model} --output out"
CASES = (
    Case("no intervention", GIVEN, r"expected --intervention DIR, or --undo, found neither"),
    Case("no model", "--intervention {rome_batch} --output out", r"required: --model"),
    Case("no output", "--intervention {rome_batch} --model {model}", r"required: --output"),
    Case("missing", f"--intervention gone {GIVEN}", r"expected a saved intervention .* in \S*gone"),
    Case("not a run", f"--intervention full {GIVEN}", r"expected a saved intervention .* name a r"),
    Case(
        "another model",
        "--intervention {rome_batch} --model {ignorant} --output out",
        r"^expected the model with fingerprint \w{12} that this intervention was fitted on, found "
        r"\w{12}; load that model or fit anew$",
    ),
    Case(
        "no such model",
        "--intervention {rome_batch} --model no/such/model --output out",
        r"^expected a local directory or a hub id .* found 'no/such/model'",
    ),
    Case(
        "full output", "--intervention {rome_batch} --model {model} --output full", r"is empty, f"
    ),
    Case("a file", "--intervention {rome_batch} --model {model} --output full/x", r"is empty, fou"),
    Case("in a file", "--intervention {rome_batch} --model {model} --output full/x/y", r"none at "),
    Case(
        "in no directory",
        "--intervention {rome_batch} --model {model} --output gone/out",
        r"^expected --output in a directory that exists, found none at \S+gone; make it$",
    ),
    Case(
        "an erasure",
        f"--intervention {{leace}} {GIVEN}",
        r"^expected a change of weights, found kind 'erasure': it acts on chosen tokens' states at "
        r"layer 0 while the model runs, which no weight can hold; apply it in Python by ",
    ),
    Case("no change", f"--intervention {{none}} {GIVEN}", r"found a run that changes nothing"),
    Case(
        "no fact",
        f"--intervention {{rome}} {GIVEN}",
        r"^expected --fact ID, found none: each of 6 facts has a change of its own; name one, such "
        r"as '\S+', or run with protocol=batch$",
    ),
    Case(
        "unknown fact", f"--intervention {{rome}} {GIVEN} --fact 1x", r"id, found '1x'; (did|val)"
    ),
    Case(
        "a fact of a batch",
        f"--intervention {{rome_batch}} {GIVEN} --fact 1",
        r"^expected --fact of a run with protocol=independent alone, found '1' with one change",
    ),
    Case(
        "unknown step",
        f"--intervention {{sequential}} {GIVEN} --step 3",
        r"^expected --step to be one of 1, 2, 5, 6, found 3; name one of these$",
    ),
    Case(
        "a step of a batch",
        f"--intervention {{rome_batch}} {GIVEN} --step 1",
        r"^expected --step of a run with protocol=sequential alone, found 1 with a weight deltas",
    ),
    Case(
        "a step in words", f"--intervention {{sequential}} {GIVEN} --step one", r"found: .*--step"
    ),
    Case(
        "a setting of no model",
        f"--intervention {{rome_batch}} {GIVEN} facts.limit=3",
        r"^expected model\.KEY=VALUE beside the options, found 'facts\.limit=3'; --model names",
    ),
    Case("model twice", f"--intervention {{rome_batch}} {GIVEN} model.path=x", r"'model\.path=x'"),
    Case("model's group", f"--intervention {{rome_batch}} {GIVEN} model=gpt2-xl", r"found 'model="),
    Case(
        "a setting misspelt", f"--intervention {{rome}} {GIVEN} --fact {{id}} model.dytpe=x", r"ty"
    ),
    Case(
        "never changed", f"--undo {GIVEN}", r"^expected a model directory that `palimpsest apply`"
    ),
    Case(
        "nothing to undo", "--undo --model gone --output out", r"that `palimpsest apply` has writ"
    ),
    Case(
        "undo of a fact", f"--undo {GIVEN} --fact 1", r"expected --undo without --fact and --step"
    ),
    Case(
        "undo of a step", f"--undo {GIVEN} --step 1", r"expected --undo without --fact and --step"
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_request_leaves_nothing(case, call, tiny, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    names = {name: run.path for name, run in runs.items()}
    fact = runs["rome"].facts[0]["fact_id"]
    words = case.words.format(**names, model=tiny.model, ignorant=tiny.ignorant, id=fact)
    before = listed(tmp_path)
    check_one_line(call("apply", *words.split()), case.message)
    assert listed(tmp_path) == before


def test_without_the_runs_facts_nobody_knows_whose_change_is_whose(call, tiny, runs, tmp_path):
    shutil.copytree(runs["rome"].path / "intervention", tmp_path / "run" / "intervention")
    words = ["--intervention", "run", "--model", tiny.model, "--output", "out", "--fact", "1"]
    check_one_line(call("apply", *words), r"expected facts\.json in \S+run, .* name a finished run")
    (tmp_path / "run" / "facts.json").write_text('[{"fact_id": "1"}]')
    check_one_line(call("apply", *words), r"found ValueError: 1 facts for 6 changes; name a fin")


def test_a_fact_that_could_not_be_changed_is_not_applied(call, tiny, runs, tmp_path):
    run = runs["rome"]
    shutil.copytree(run.path, tmp_path / "run")
    place = tmp_path / "run" / "intervention" / "intervention.json"
    described = json.loads(place.read_text())
    fact = run.facts[0]["fact_id"]
    described["change"]["failed"] = {fact: "the search came to no finite loss"}
    place.write_text(json.dumps(described))
    words = ["--intervention", "run", "--model", tiny.model, "--output", "out", "--fact", fact]
    message = rf"expected a fact that was changed, found '{fact}' \('the search came to no finite"
    check_one_line(call("apply", *words), message)


@pytest.fixture
def read_only(tmp_path):
    """A file system that cannot be written."""
    place = tmp_path / "readonly"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a file system can be mounted by root alone")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_place_that_cannot_be_written_is_told(call, tiny, runs, read_only):
    words = ["--intervention", runs["rome_batch"].path, "--model", tiny.model]
    outcome = call("apply", *words, "--output", read_only / "out")
    check_one_line(outcome, r"^cannot write \S+/out: Read-only file system; .* with --output=$")
