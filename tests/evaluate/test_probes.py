import warnings

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from palimpsest.evaluate.probes import embeddings
from palimpsest.evaluate.probing.probes import Probe, Reduced, choose, middle, train_all
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


def train(states: Tensor, labels: list[str], c: float) -> Probe:
    """At one place."""
    (probe,) = train_all(states[None], labels, c)
    return probe


def converged(states: Tensor, labels: list[str], c: float) -> Pipeline:
    """scikit-learn's own, until nothing moves."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=9999, tol=1e-10))
    return pipeline.fit(states.double().numpy(), labels)


def chances(probe: Probe, states: Tensor) -> Tensor:
    return probe.scores(states).softmax(1)


@pytest.mark.parametrize("c", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize(("n", "width"), [(60, 12), (24, 40)])
def test_a_probe_is_scikit_learns_own_pipeline(classes: int, n: int, width: int, c: float) -> None:
    states, labels = sample(classes, n, width)
    fresh, _ = sample(classes, 400, width, seed=1)
    pipeline = converged(states, labels, c)

    probe = train(states, labels, c)

    assert probe.classes == tuple(sorted(set(labels))) == tuple(pipeline.classes_)
    wanted = torch.from_numpy(pipeline.predict_proba(fresh.double().numpy()))
    assert float((chances(probe, fresh) - wanted).abs().max()) < 1e-4
    assert float(wanted.std(0).min()) > 1e-4  # which are not all the same
    tied = wanted.topk(2).values.diff().abs()[:, 0] < 1e-4
    assert bool(((chances(probe, fresh).argmax(1) == wanted.argmax(1)) | tied).all())
    weight = torch.from_numpy(pipeline[1].coef_ / pipeline[0].scale_)
    weight = torch.cat([-weight, weight]) / 2 if classes == 2 else weight
    assert float((probe.weight - weight).norm() / weight.norm()) < 1e-4


def test_all_places_at_once_are_each_by_itself() -> None:
    """Of different scales, one of them not finite, one of them constant."""
    found = [sample(3, 60, 12, seed, spread) for seed, spread in ((0, 2.0), (3, 0.1), (4, 30.0))]
    labels = found[0][1]
    places = [states for states, _ in found]
    lost = places[0].clone()
    lost[7, 3] = torch.inf
    fresh, _ = sample(3, 50, 12, seed=9)
    probes = train_all(torch.stack([*places, lost, torch.ones(60, 12)]), labels, 0.1)
    for states, probe in zip(places, probes, strict=False):
        alone = train(states, labels, 0.1)
        assert float((chances(alone, fresh) - chances(probe, fresh)).abs().max()) < 1e-4
    assert probes[3].predict(fresh) == [None] * 50
    uniform = torch.full((50, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(chances(probes[4], fresh), uniform)


def test_log_probabilities_are_those_of_the_scores() -> None:
    states, labels = sample(3, 60, 12)
    probe = train(states, labels, 0.1)
    found = probe.logprobs(states[:9], labels[:9])
    for n, label in enumerate(labels[:9]):
        wanted = chances(probe, states[n : n + 1])[0, probe.classes.index(label)].log()
        assert float(found[n]) == pytest.approx(float(wanted))


# -- the strength ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.5, 2.0, 8.0, 32.0])
def test_the_strength_is_the_one_with_the_least_log_loss_on_held_out_states(spread: float) -> None:
    strengths = [0.1, 0.001, 1.0, 0.01]
    places = torch.stack([sample(4, 80, 20, seed, spread)[0] for seed in (0, 1)])
    held = torch.stack([sample(4, 24, 20, seed, spread)[0] for seed in (5, 6)])
    labels, truth = sample(4, 80, 20)[1], sample(4, 24, 20)[1]
    losses = {}
    for c in strengths:
        fitted = [converged(states, labels, c) for states in places]
        found = [
            -pipeline.predict_log_proba(states.double().numpy())[n, sorted(set(labels)).index(name)]
            for pipeline, states in zip(fitted, held, strict=True)
            for n, name in enumerate(truth)
        ]
        losses[c] = sum(found) / len(found)
    assert choose(Reduced.of(places), labels, strengths, held, truth) == min(losses, key=losses.get)


def test_easy_states_choose_weak_penalties_and_noise_strong_ones() -> None:
    def chosen(spread: float) -> float:
        states, labels = sample(4, 80, 20, 0, spread)
        held, truth = sample(4, 2000, 20, 5, spread)
        return choose(Reduced.of(states[None]), labels, [1e-4, 1e-2, 1.0], held[None], truth)

    assert (chosen(0.1), chosen(1000.0)) == (1.0, 1e-4)


def test_places_that_are_not_finite_choose_nothing() -> None:
    states, labels = sample(4, 80, 20, 0, 0.1)
    held, truth = sample(4, 24, 20, 5, 0.1)
    lost = torch.full_like(states, torch.nan)
    both, of_both = torch.stack([states, lost]), torch.stack([held, held])
    assert choose(Reduced.of(both), labels, [1e-4, 1e-2, 1.0], of_both, truth) == 1.0
    assert choose(Reduced.of(lost[None]), labels, [1e-4, 1e-2, 1.0], held[None], truth) == 1e-2
    assert (middle([1.0, 3.0, 2.0]), middle([4.0, 1.0, 2.0, 3.0])) == (2.0, 3.0)


# -- what may go wrong -----------------------------------------------------------------------------


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
