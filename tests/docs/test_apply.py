"""docs/apply.md keeps its promises: its section on one's own code runs as it stands."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from palimpsest.record.results import load_runs

PAGE = Path(__file__).parents[2] / "docs" / "apply.md"
SECTION = PAGE.read_text(encoding="utf-8").partition("\n## In your own code\n")[2]
OWN, HARNESS = re.findall(r"^```python\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)
FEW = [
    "facts=counterfact", "facts.relations=[P17]", "facts.limit=6", "contexts=1", "record=local",
    "evaluate=quick", "evaluate.probes.least=1", "locate.layer=2",
]  # fmt: skip


@pytest.fixture
def harness(monkeypatch):
    """Stands in for lm-evaluation-harness: padded on the right, it gives the model no mask."""
    lm_eval, models, huggingface = map(ModuleType, ("lm_eval", "models", "huggingface"))

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.model, self.tokenizer = pretrained, tokenizer

    def simple_evaluate(lm, tasks):
        ids = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 0]])
        return {"results": {task: lm.model(ids).logits for task in tasks}}

    huggingface.HFLM, lm_eval.simple_evaluate = HFLM, simple_evaluate
    for name, module in {
        "lm_eval": lm_eval, "lm_eval.models": models, "lm_eval.models.huggingface": huggingface,
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)


def test_its_own_code_runs(call, tiny, harness):
    for method in ("intervene=leace", "intervene=rome"):
        assert (
            call("run", method, *FEW, f"facts.path={tiny.facts}", f"model.path={tiny.model}").code
            == 0
        )
    runs = {run.method: run.path.name for run in load_runs(Path("results/runs"))}
    code = OWN.replace('Pretrained("smollm2")', f'Pretrained(path="{tiny.model}", device="cpu")')
    code = code.replace("ERASED", runs["leace"]).replace("EDITED", runs["rome"])
    told: dict = {}
    exec(code, told)
    model, ids = told["model"].model, told["ids"]
    assert not torch.allclose(told["logits"], model(ids).logits)
    assert told["erased"].shape == told["edited"].shape == (1, ids.shape[1] + 8)
    exec(HARNESS, told)
    plain = told["simple_evaluate"](told["evaluated"], ["lambada_openai"])
    (found,), (unchanged,) = (r["results"].values() for r in (told["found"], plain))
    assert torch.equal(found[:, 0], unchanged[:, 0])  # the sink
    assert not torch.allclose(found[:, 1:], unchanged[:, 1:])
