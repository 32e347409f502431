import pytest
import torch
from torch import Tensor

from palimpsest.evaluate.probing import mlp as module
from palimpsest.evaluate.probing.mlp import train_mlps
from palimpsest.evaluate.probing.probes import Probe, Reduced, train_all
from palimpsest.intervene.erasers.leace import fit_leace
from tests.evaluate.test_probes import sample


def product(n: int, seed: int, width: int = 12) -> tuple[Tensor, list[str]]:
    """The class is the sign of the product of two features: no mean and no covariance tells it."""
    states = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    positive = (states[:, 0] * states[:, 1] > 0).tolist()
    return states.double(), ["same" if sign else "other" for sign in positive]


def mlp(states: Tensor, labels: list[str], seed: int = 0, hidden: int = 64) -> Probe:
    ((probe,),), _ = train_mlps(Reduced.of(states[None]), [labels], hidden, seed)
    return probe


def accuracy(probe: Probe, states: Tensor, labels: list[str]) -> float:
    hits = [a == b for a, b in zip(probe.predict(states), labels, strict=True)]
    return sum(hits) / len(hits)


def test_after_leace_nothing_is_linear_and_an_mlp_finds_what_is_not() -> None:
    """Theorem 3.1 of Belrose et al. 2023: zero cross-covariance, and no linear probe helps."""
    states, labels = product(500, 0)
    names = sorted(set(labels))
    concept = torch.eye(2, dtype=torch.float64)[[names.index(label) for label in labels]]
    eraser = fit_leace(states, concept, 1e-6)
    erased = eraser.of(states)

    (linear,) = train_all(erased[None], labels, 1.0)
    loss = float(-linear.logprobs(erased, labels).mean())
    constant = float(-(concept.mean(0) * concept.mean(0).log()).sum())
    assert abs(loss - constant) < 1e-6

    fresh, truth = product(1000, 1)
    assert accuracy(linear, eraser.of(fresh), truth) < 0.56
    assert accuracy(mlp(erased, labels), eraser.of(fresh), truth) > 0.75


def test_a_linear_secret_is_found_by_both() -> None:
    states, labels = sample(4, 160, 32, spread=0.1)
    fresh, truth = sample(4, 200, 32, seed=1, spread=0.1)
    (linear,) = train_all(states[None], labels, 0.01)
    assert accuracy(linear, fresh, truth) == 1.0
    assert accuracy(mlp(states, labels), fresh, truth) > 0.95


def test_what_is_read_is_the_trained_network_itself() -> None:
    """Accuracy on the training subjects, as told, is that of the probe put to raw states."""
    states, labels = sample(3, 60, 12)
    ((probe,),), told = train_mlps(Reduced.of(states[None]), [labels], 16, 5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    kept = order[12:].tolist()
    assert float(told) == accuracy(probe, states[kept], [labels[n] for n in kept])
    assert 1 / 3 < float(told) < 1


def test_the_held_out_fifth_trains_nothing_and_chooses_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one step there is nothing to choose: its labels cannot matter."""
    states, labels = sample(2, 100, 8)
    held = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:20].tolist()
    turned = list(labels)
    for n in held:
        turned[n] = next(name for name in set(labels) if name != labels[n])
    assert not torch.equal(mlp(states, labels, 3).weight, mlp(states, turned, 3).weight)
    monkeypatch.setattr(module, "STEPS", 1)
    assert torch.equal(mlp(states, labels, 3).weight, mlp(states, turned, 3).weight)


def test_places_and_labelings_do_not_depend_on_their_neighbours() -> None:
    (one, labels), (two, _) = sample(3, 60, 12), sample(3, 60, 12, 7, 0.1)
    lost = torch.full_like(one, torch.nan)
    turned = labels[1:] + labels[:1]
    places = Reduced.of(torch.stack([one, two, lost]))
    (mine, control), told = train_mlps(places, [labels, turned], 16, 0)
    fresh, _ = sample(3, 50, 12, seed=9)
    for n, states in enumerate((one, two)):
        for found, by in ((mine, labels), (control, turned)):
            alone = mlp(states, by, 0, 16)
            torch.testing.assert_close(
                found[n].scores(fresh), alone.scores(fresh), rtol=1e-3, atol=1e-3
            )
    assert mine[2].predict(fresh) == [None] * 50
    assert told.shape == (2, 3)


def test_a_state_that_is_not_finite_is_not_read() -> None:
    """ReLU would turn −∞ into a number."""
    states, labels = sample(3, 60, 12)
    probe = mlp(states, labels, 0, 16)
    for value in (torch.nan, torch.inf, -torch.inf):
        lost = states[:2].clone()
        lost[0] = value
        assert [guess is None for guess in probe.predict(lost)] == [True, False]


def test_the_seed_alone_decides() -> None:
    states, labels = sample(3, 60, 12)
    torch.manual_seed(1)
    first = mlp(states, labels, 0, 16)
    torch.manual_seed(2)
    again, other = mlp(states, labels, 0, 16), mlp(states, labels, 1, 16)
    assert torch.equal(first.scores(states), again.scores(states))
    assert not torch.equal(first.scores(states), other.scores(states))
