"""`palimpsest run` on a checkpoint of each family, with what this random model happens to say."""

import json
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from palimpsest.cli import main
from palimpsest.facts.fact import Prompt
from palimpsest.model.forward import next_token_logprobs, score
from palimpsest.model.handle import ModelHandle
from palimpsest.record.results import Run, load_runs
from tests.architectures.tiny import WORDS, make_handle

FEW = {
    "facts": "counterfact",
    "facts.limit": 2,
    "contexts": 1,
    "intervene.search.steps": 4,
    "intervene.moments.length": 32,
    "locate.layer": 1,
    "model.prefix": "",
    "record": "local",
}
TEMPLATES = ("na {} ro la", "to {} ki", "{} se ma da")
"""The prompt to be edited and two paraphrases."""

SUBJECTS = [" ".join(words) for words in product(WORDS[:8], WORDS[8:12])]


def knowledge(handle: ModelHandle) -> list[dict[str, Any]]:
    """CounterFact records whose true object is what the model says, where that is a word."""
    prompts = [Prompt.fill("fit", TEMPLATES[0], subject) for subject in SUBJECTS]
    likeliest = next_token_logprobs(handle, [handle.encode(p) for p in prompts]).argmax(-1)
    said = [handle.decode([token]).strip() or "ba" for token in likeliest.tolist()]
    scores = score(handle, [handle.encode(p, word) for p, word in zip(prompts, said, strict=True)])
    triples = zip(SUBJECTS, said, scores, strict=True)
    return [record(subject, word) for subject, word, its in triples if its.argmax]


def record(subject: str, true: str) -> dict[str, Any]:
    return {
        "case_id": SUBJECTS.index(subject),
        "requested_rewrite": {
            "prompt": TEMPLATES[0],
            "relation_id": "P1",
            "target_true": {"str": true},
            "target_new": {"str": "pa" if true != "pa" else "te"},
            "subject": subject,
        },
        "paraphrase_prompts": [template.format(subject) for template in TEMPLATES[1:]],
        "neighborhood_prompts": [TEMPLATES[0].format(other) for other in SUBJECTS[:2]],
    }


@pytest.fixture
def run(
    tmp_path: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """Runs the command on a family's checkpoint."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, **more: Any) -> Run:
        facts, text, results = (tmp_path / each for each in ("facts.json", "text.txt", "results"))
        facts.write_text(json.dumps(knowledge(make_handle(name))))
        text.write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
        places = {"model.path": checkpoint(name), "facts.path": facts, "record.dir": results}
        settings = FEW | places | {"intervene.moments.text": text} | more
        assert main(["run", *(f"{key}={value}" for key, value in settings.items())]) == 0
        return load_runs(results)[0]

    return call


def test_a_run_goes_through(name: str, run: Callable[..., Run]) -> None:
    done = run(name)
    assert (done.run["status"], done.run["model"]["name"]) == ("done", name)
    assert {row.axis for row in done.rows} >= {"cost", "downstream", "recoverability"}
    losses = [row.value for row in done.select("value_loss", "last_step")]
    assert len(losses) == 2
    assert all(loss is not None and loss > 0 for loss in losses)


@pytest.mark.parametrize(("setting", "value"), [("dtype", "bfloat16"), ("device_map", "auto")])
def test_a_run_goes_through_as_the_model_is_configured(
    setting: str, value: str, run: Callable[..., Run]
) -> None:
    done = run("gpt2", **{f"model.{setting}": value})
    assert done.run["config"]["model"][setting] == value
