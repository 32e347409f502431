"""The tuned lens: a planted map is found, held-out text decides, nothing else is asked."""

from functools import partial
from pathlib import Path

import pytest
import torch

from palimpsest.errors import RequestError
from palimpsest.evaluate import tuned_lens as module
from palimpsest.evaluate.tuned_lens import TunedLens, divergence, lens_rows, regression
from palimpsest.model.forward import forward, logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.sample import sample
from palimpsest.model.tokens import Tokens, collate
from palimpsest.record.row import Row

SMALL = TunedLens(tokens=512, steps=30, batch=64, lr=1e-3)


def test_regression_finds_a_planted_map() -> None:
    generator = torch.Generator().manual_seed(0)
    states, matrix, bias = (
        torch.randn(*size, generator=generator) for size in ((400, 8), (8, 8), (8,))
    )
    found = regression(states, states @ matrix.T + bias, 1e-9)
    assert torch.allclose(found[0], matrix, atol=1e-4)
    assert torch.allclose(found[1], bias, atol=1e-4)


def test_the_divergence_is_that_of_the_last_layer(model: ModelHandle) -> None:
    """The identity on final states has none; of others it is the sum over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    states, final = torch.randn(2, 6, model.width, generator=generator)
    identity = torch.eye(model.width), torch.zeros(model.width)
    assert float(divergence(model, *identity, final, final)) == pytest.approx(0, abs=1e-6)
    p, q = (torch.softmax(logits(model, model.final_norm(x)), -1) for x in (final, states))
    by_hand = sum(
        float(a * (a.log() - b.log()))
        for row, other in zip(p, q, strict=True)
        for a, b in zip(row, other, strict=True)
    )
    found = float(divergence(model, *identity, states, final))
    assert found == pytest.approx(by_hand / 6, rel=1e-4)


def test_translators_come_nearer_to_the_last_layer(model: ModelHandle) -> None:
    trained = SMALL.train(model, [0, 2, 3])
    assert set(trained) == {0, 2}  # the last layer is read as it is
    plain = TunedLens(tokens=512, steps=0).train(model, [0, 2, 3])
    for layer, lens in trained.items():
        assert lens.divergence < 0.8 * lens.untuned
        assert lens.divergence <= plain[layer].divergence + 1e-6
        assert lens.untuned == pytest.approx(plain[layer].untuned)


def test_a_lens_reads_states_as_the_model_would(model: ModelHandle) -> None:
    """On fresh text, the tuned reading is nearer to the model's than the untuned one."""
    lens = SMALL.train(model, [2])[2]
    ids = sample(model, 20, 20, torch.Generator().manual_seed(5))
    batch = collate([Tokens(tuple(row), len(row)) for row in ids.tolist()], model.device)
    kept = {}
    with torch.no_grad(), model.hooked([(model.blocks[2], lambda h: kept.update(h=h))]):
        final = torch.log_softmax(logits(model, forward(model, batch)), -1)
    read = [
        torch.log_softmax(logits(model, model.final_norm(x)), -1)
        for x in (kept["h"], lens.of(kept["h"]))
    ]
    gaps = [float((final.exp() * (final - other)).sum(-1)[:, 1:].mean()) for other in read]
    assert gaps[1] < gaps[0]


def test_training_is_cached_and_the_same_again(
    model: ModelHandle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SMALL.train(model, [1])
    monkeypatch.setattr(module, "sample", None)  # nothing is computed twice
    again = SMALL.train(model, [1])
    assert torch.equal(first[1].matrix, again[1].matrix)
    assert first[1].divergence == again[1].divergence
    monkeypatch.undo()
    monkeypatch.setenv("PALIMPSEST_CACHE", str(cache / "other"))
    assert torch.equal(SMALL.train(model, [1])[1].matrix, first[1].matrix)


def test_rows_tell_both_divergences(model: ModelHandle) -> None:
    trained = SMALL.train(model, [0, 3])
    rows = list(lens_rows(partial(Row, axis="recoverability", scope="fact"), trained))
    assert [(row.layer, row.protocol) for row in rows] == [(0, "tuned_lens"), (0, "logit_lens")]
    assert [row.value for row in rows] == [trained[0].divergence, trained[0].untuned]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 10}, "evaluate.tuned_lens.tokens.*at least 128"),
        ({"steps": -1}, "evaluate.tuned_lens.steps"),
        ({"batch": 0}, "evaluate.tuned_lens.batch"),
        ({"lr": 0.0}, "evaluate.tuned_lens.lr"),
        ({"ridge": 0.0}, "evaluate.tuned_lens.ridge"),
        ({"seed": -1}, "evaluate.tuned_lens.seed"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TunedLens(**options)
