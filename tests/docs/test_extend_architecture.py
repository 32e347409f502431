"""docs/extend-architecture.md keeps its promises: with its blocks alone, Qwen3 passes and runs."""

import json
import random
import re
from pathlib import Path

import pytest

from palimpsest.errors import RequestError
from palimpsest.model import architecture
from palimpsest.model.architecture import TABLE, Architecture
from palimpsest.model.site import NORMS
from palimpsest.record.results import load_runs
from tests.architectures import test_exam as exam
from tests.architectures.test_run import FEW, knowledge
from tests.architectures.tiny import TINY, WORDS, Tiny, make_handle, padded, ragged

PAGE = (Path(__file__).parents[2] / "docs" / "extend-architecture.md").read_text(encoding="utf-8")
ROW, MINIATURE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
[(YAML, NAME)] = re.findall(
    r"^```yaml\n(# model/(\S+)\.yaml\n.*?)^```$", PAGE, re.DOTALL | re.MULTILINE
)


@pytest.fixture(autouse=True)
def without(monkeypatch):
    """A table without Qwen3, and a cache of the test's own models."""
    rest = {name: row for name, row in TABLE.items() if name != "qwen3"}
    monkeypatch.setattr(architecture, "TABLE", rest)
    return rest


@pytest.fixture
def added(without, monkeypatch):
    """The page's row in that table, and its miniature under a name of its own."""
    without.update(eval(f"{{{ROW}}}", {"Architecture": Architecture}))
    [tiny] = eval(f"{{{MINIATURE}}}", {"Tiny": Tiny}).values()
    monkeypatch.setitem(TINY, "page", tiny)
    return "page"


def test_the_page_s_row_and_miniature_are_those_of_the_library():
    assert eval(f"{{{ROW}}}", {"Architecture": Architecture}) == {"qwen3": TABLE["qwen3"]}
    assert eval(f"{{{MINIATURE}}}", {"Tiny": Tiny}) == {"qwen3": TINY["qwen3"]}


def test_without_the_row_it_is_refused():
    with pytest.raises(RequestError, match=r"model_type 'qwen3' .* docs/extend-architecture\.md"):
        make_handle("qwen3")


def test_with_the_row_it_passes_the_exam(added):
    handle = make_handle(added)
    exam.test_its_parts_are_found(added, handle)
    exam.test_w_out_takes_keys_to_values(handle)
    exam.test_a_square_w_out_takes_keys_to_values(added)
    exam.test_states_and_logits_are_those_of_transformers(handle)
    for side in ("left", "right"):
        batch = padded(ragged(), side)
        exam.test_a_block_adds_what_attention_and_mlp_give(added, batch)
        for part in NORMS:
            exam.test_its_readers_are_all_that_a_norm_gives_to(handle, part, batch)
        exam.test_padding_reaches_no_token(handle, batch)
        exam.test_a_delta_of_its_own_is_a_changed_weight_for_each_row(handle, batch)


@pytest.fixture
def conf(tmp_path):
    """The page's yaml in a directory of configuration."""
    place = tmp_path / "conf" / "model" / f"{NAME}.yaml"
    place.parent.mkdir(parents=True)
    place.write_text(YAML, encoding="utf-8")
    return "conf"


def test_the_yaml_composes(conf, call):
    outcome = call("run", "--config-dir", conf, f"model={NAME}", "--cfg", "job")
    assert (outcome.code, outcome.err) == (0, "")
    for line in ("_target_: palimpsest.model.load.Pretrained", "path: Qwen/Qwen3-0.6B", "late: 22"):
        assert f"  {line}\n" in outcome.out


def test_a_run_with_row_and_yaml(added, conf, call, tmp_path):
    handle = make_handle(added)
    handle.model.save_pretrained("checkpoint")
    handle.tokenizer.save_pretrained("checkpoint")
    Path("facts.json").write_text(json.dumps(knowledge(handle)))
    Path("text.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    settings = FEW | {
        "model": NAME,
        "model.path": "checkpoint",
        "model.dtype": "float32",
        "facts.path": "facts.json",
        "intervene.moments.text": "text.txt",
        "record.dir": "results",
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    outcome = call("run", "--config-dir", conf, *words)
    assert outcome.code == 0, outcome.err
    [run] = load_runs(Path("results"))
    assert run.run["config"]["model"]["depths"]["mlp"] == {"early": 5}
    assert {row.axis for row in run.rows} >= {"cost", "downstream", "recoverability"}
