import warnings

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from palimpsest.evaluate.probes import Probe, train
from palimpsest.evaluate.recoverability import embeddings
from palimpsest.facts.fact import Prompt
from palimpsest.model.handle import ModelHandle

OBJECTS = ("Japan", "France", "Italy", "New Zealand", "Chad")


def sample(
    classes: int, n: int, width: int, seed: int = 0, spread: float = 2.0
) -> tuple[Tensor, list[str]]:
    """States of unequal scale and offset around class means that overlap."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    which = torch.arange(n) % classes
    states = means[which] + spread * torch.randn(n, width, generator=generator)
    return states * torch.logspace(-2, 2, width) + 5, [OBJECTS[i] for i in which.tolist()]


@pytest.mark.parametrize("c", [0.01, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize(("n", "width"), [(60, 12), (24, 40)])
def test_a_probe_is_scikit_learns_own_pipeline(classes: int, n: int, width: int, c: float) -> None:
    states, labels = sample(classes, n, width)
    fresh, truth = sample(classes, 400, width, seed=1)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, tol=1e-8))
    pipeline.fit(states.double().numpy(), labels)

    probe = train(states, labels, c)

    assert probe.classes == tuple(sorted(set(labels))) == tuple(pipeline.classes_)
    wanted = list(pipeline.predict(fresh.double().numpy()))
    agree = sum(a == b for a, b in zip(probe.predict(fresh), wanted, strict=True))
    assert agree >= 396  # of 400; the solvers stop at a tolerance
    # ... where the pipeline is neither perfect nor always says the same.
    assert 1 / classes < sum(a == b for a, b in zip(wanted, truth, strict=True)) / 400 < 1
    assert len(set(wanted)) == classes


def test_the_scores_are_scikit_learns_up_to_its_tolerance() -> None:
    states, labels = sample(3, 60, 12)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=5000, tol=1e-8))
    pipeline.fit(states.double().numpy(), labels)
    probe = train(states, labels, 1.0)
    mine = (states @ probe.weight.T + probe.bias).softmax(-1)
    theirs = torch.from_numpy(pipeline.predict_proba(states.double().numpy()))
    assert float((mine - theirs).abs().max()) < 0.01


def test_features_that_never_change_do_no_harm() -> None:
    states, labels = sample(3, 60, 12)
    padded = torch.cat([states, torch.full((60, 3), 7.0), torch.zeros(60, 1)], 1)
    fresh, _ = sample(3, 200, 12, seed=1)
    again = torch.cat([fresh, torch.full((200, 3), 7.0), torch.zeros(200, 1)], 1)
    probe = train(padded, labels, 1.0)
    assert bool(torch.isfinite(probe.weight).all())
    assert probe.predict(again) == train(states, labels, 1.0).predict(fresh)


def test_a_feature_that_starts_to_change_later_is_not_read() -> None:
    states, labels = sample(2, 40, 6)
    padded = torch.cat([states, torch.full((40, 1), 7.0)], 1)
    moved = torch.cat([states, torch.full((40, 1), 1e4)], 1)
    probe = train(padded, labels, 1.0)
    assert probe.predict(moved) == probe.predict(padded)


def test_separable_classes_are_told_apart() -> None:
    states, labels = sample(4, 80, 32, spread=0.1)
    fresh, truth = sample(4, 200, 32, seed=1, spread=0.1)
    assert train(states, labels, 0.01).predict(fresh) == truth


def test_a_probe_converges_in_silence() -> None:
    states, labels = sample(5, 100, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(states, labels, 0.01)


def test_a_probe_of_two_classes_has_a_row_for_each() -> None:
    probe = train(*sample(2, 40, 6), 1.0)
    assert probe.weight.shape == (2, 6)
    assert probe.bias.shape == (2,)
    assert probe.weight.dtype == torch.float32


def test_a_probe_predicts_its_likeliest_class() -> None:
    probe = Probe(torch.eye(3), torch.tensor([0.0, 0.0, 1.5]), ("a", "b", "c"))
    states = torch.tensor([[2.0, 0, 0], [1.0, 0, 0], [0, 3.0, 1.0]])
    assert probe.predict(states) == ["a", "c", "b"]
    assert probe.predict(torch.empty(0, 3)) == []


# -- the bare names --------------------------------------------------------------------------------


def test_embeddings_are_means_over_the_subjects_tokens(model: ModelHandle) -> None:
    table = model.model.get_input_embeddings().weight
    prompts = [
        Prompt.fill("fit", "The city of {} is in", "Llanfair"),
        Prompt.fill("fit", "{} is in", "Paris"),
        Prompt("fit", "The city of"),
    ]
    rows = [model.encode(prompt, owner=n) for n, prompt in enumerate(prompts)]
    assert rows[0].subject is not None
    assert rows[0].subject[1] - rows[0].subject[0] >= 2
    found = embeddings(model, rows)
    for row, mean in zip(rows, found, strict=True):
        first, last = row.subject or (0, len(row.ids) - 1)
        wanted = sum(table[row.ids[at]] for at in range(first, last + 1)) / (last + 1 - first)
        torch.testing.assert_close(mean, wanted)


def test_embeddings_do_not_depend_on_the_words_around_the_name(model: ModelHandle) -> None:
    prompts = [
        Prompt.fill("a", "The city of {} is in", "Paris"),
        Prompt.fill("b", "In {},", "Paris"),
    ]
    one, two = embeddings(model, [model.encode(prompt) for prompt in prompts])
    assert torch.equal(one, two)
