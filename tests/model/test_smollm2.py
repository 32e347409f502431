from pathlib import Path

import pytest
import torch
from torch import Tensor

from palimpsest.facts.fact import Prompt
from palimpsest.model.forward import forward, greedy, score
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.model.partial import Resume
from palimpsest.model.site import Site
from palimpsest.model.tokens import collate
from tests.model.tiny import relative

pytestmark = pytest.mark.model

CITY = "The city of {} is in the country of"
CITIES = {"Paris": "France", "Osaka": "Japan", "Naples": "Italy"}


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> ModelHandle:
    return Pretrained(path=str(smollm2_dir), prefix="\n", device="cpu").load()


def test_paris_is_in_france(smollm2: ModelHandle) -> None:
    row = smollm2.encode(Prompt.fill("fit", CITY, "Paris"))
    assert smollm2.decode(greedy(smollm2, [row], 1)[0]) == " France"
    told = [smollm2.encode(Prompt.fill("fit", CITY, "Paris"), name) for name in CITIES.values()]
    assert [one.argmax for one in score(smollm2, told)] == [True, False, False]


@torch.no_grad()
def test_an_object_of_several_tokens_is_scored_token_by_token(smollm2: ModelHandle) -> None:
    prompt = Prompt.fill("fit", "{} is in the city of", "The Kremlin")
    names = ["Saint Petersburg", "Saint", "Kuala Lumpur", "Antananarivo"]
    rows = [smollm2.encode(prompt, name, owner=0) for name in names]
    assert len(rows[3].ids) - rows[3].prompt > 2
    for row, one in zip(rows, score(smollm2, rows), strict=True):
        logprobs = smollm2.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        steps = [float(logprobs[at - 1, row.ids[at]]) for at in range(row.prompt, len(row.ids))]
        assert one.logprob == pytest.approx(sum(steps), rel=1e-4)
        assert one.tokens == len(steps)


@torch.no_grad()
def test_resuming_equals_the_full_pass(smollm2: ModelHandle) -> None:
    names = [*CITIES, "Llanfairpwllgwyngyll"]
    rows = [smollm2.encode(Prompt.fill("fit", CITY, name), "France") for name in names]
    starts = torch.tensor([row.at("last_subject") for row in rows])
    assert len(set(starts.tolist())) > 1
    generator = torch.Generator().manual_seed(0)
    pushes = torch.randn(len(rows), 1, smollm2.width, generator=generator) * 10

    def push(states: Tensor) -> Tensor:
        assert smollm2.running is not None
        here = smollm2.running.positions == starts[:, None]
        return states + here[..., None] * pushes

    batch = collate(rows, smollm2.device)
    plain = forward(smollm2, batch)
    with smollm2.hooked([(smollm2.module(Site(12, "mlp")), push)]):
        full = forward(smollm2, batch)
        rest = Resume.capture(smollm2, batch, 12, starts).run(smollm2)
    for n, (row, start) in enumerate(zip(rows, starts.tolist(), strict=True)):
        last = len(row.ids) - 1
        assert relative(rest[n, : last + 1 - start], full[n, start : last + 1]) < 1e-4
        assert relative(plain[n, last], full[n, last]) > 0.01
