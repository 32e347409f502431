"""Codes and bits, against literal versions; what noise and a plain secret must cost."""

import random
from collections import Counter
from itertools import pairwise
from math import log2, sqrt
from statistics import fmean, stdev

import pytest
import torch
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from palimpsest.evaluate.probing.information import blocks, online_code, pointwise
from palimpsest.evaluate.probing.mlp import train_mlps
from palimpsest.evaluate.probing.probes import Reduced, fit, train_all
from tests.evaluate.test_probes import sample

SEEDS = 60


def noise(seed: int, n: int = 64, width: int = 16, classes: int = 4) -> tuple[Tensor, list[str]]:
    """States, and labels that have nothing to do with them."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n, width, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator).tolist()
    return states, [f"class {label}" for label in labels]


def literal_code(states: Tensor, labels: list[str], c: float, seed: int) -> float:
    """Block by block, a scikit-learn probe each, label by label."""
    order = list(range(len(labels)))
    random.Random(f"online_code/{seed}").shuffle(order)
    scaled = StandardScaler().fit_transform(states.double().numpy())[order]
    sent = [labels[n] for n in order]
    classes = sorted(set(labels))
    ends = [0, *blocks(len(labels))]
    bits = 0.0
    for start, end in pairwise(ends):
        seen = sorted(set(sent[:start]))
        if len(seen) < 2:
            bits += (end - start) * log2(len(classes))
            continue
        probe = LogisticRegression(C=c, max_iter=9999, tol=1e-10).fit(scaled[:start], sent[:start])
        new = len(classes) - len(seen)
        for n in range(start, end):
            chances = dict(
                zip(probe.classes_, probe.predict_proba(scaled[n : n + 1])[0], strict=True)
            )
            of_seen = chances.get(sent[n], 0.0) * start / (start + new)
            bits -= log2(of_seen if sent[n] in seen else 1 / (start + new))
    return bits


def test_blocks_end_at_the_fractions_of_voita_and_titov() -> None:
    assert blocks(1000) == [1, 2, 4, 8, 16, 32, 62, 125, 250, 500, 1000]
    assert blocks(40) == [1, 2, 5, 10, 20, 40]
    assert blocks(1) == [1]


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_code_is_the_literal_one(classes: int, spread: float) -> None:
    places = [sample(classes, 48, 12, seed, spread)[0] for seed in (0, 1)]
    labels = sample(classes, 48, 12)[1]
    lost = torch.full_like(places[0], torch.nan)
    found = online_code(Reduced.of(torch.stack([*places, lost])), labels, 0.1, 3)
    for states, bits in zip(places, found.tolist(), strict=False):
        assert bits == pytest.approx(literal_code(states, labels, 0.1, 3), rel=1e-4)
    assert found[2].isnan()


def test_noise_costs_its_length_and_a_plain_secret_far_less() -> None:
    lengths = []
    for seed in range(10):
        states, labels = noise(seed, n=160)
        lengths.append(float(online_code(Reduced.of(states[None]), labels, 1e-3, seed)))
    assert fmean(lengths) == pytest.approx(160 * log2(4), rel=0.05)
    states, labels = sample(4, 160, 16, spread=0.1)
    assert float(online_code(Reduced.of(states[None]), labels, 0.1, 0)) < 0.4 * 160 * log2(4)


def test_bits_by_fact_are_the_literal_ones_and_sum_to_the_information() -> None:
    states, labels = sample(3, 60, 12)
    labels = [*labels[:50], *[labels[0]] * 10]  # so that the classes are not equally frequent
    fresh, truth = sample(3, 40, 12, seed=1)
    (probe,) = train_all(states[None], labels, 0.1)
    found = pointwise(probe, fresh, truth, labels)
    weight, bias = probe.weight.double(), probe.bias
    total = 0.0
    for n, name in enumerate(truth):
        scores = [float(weight[k] @ fresh[n].double() + bias[k]) for k in range(3)]
        powers = [2 ** (score / 0.6931471805599453) for score in scores]
        chance = powers[probe.classes.index(name)] / sum(powers)
        bits = log2(chance) - log2(Counter(labels)[name] / 60)
        assert float(found[n]) == pytest.approx(bits, abs=1e-9)
        total += bits
    assert float(found.sum()) == pytest.approx(total)
    # H(Y) − H(Y | X) of the paper, both as means over the held-out states.
    before = fmean(-log2(Counter(labels)[name] / 60) for name in truth)
    after = fmean(-float(x) / 0.6931471805599453 for x in probe.logprobs(fresh, truth))
    assert float(found.mean()) == pytest.approx(before - after)


def test_a_state_that_is_not_finite_tells_nothing() -> None:
    states, labels = sample(3, 60, 12)
    (probe,) = train_all(states[None], labels, 0.1)
    lost = states[:2].clone()
    lost[0, 0] = torch.inf
    assert pointwise(probe, lost, labels[:2], labels).isfinite().tolist() == [False, True]
    assert pointwise(probe, states[:0], [], labels).shape == (0,)


# -- what noise may not show -----------------------------------------------------------------------

MOST = int(binom.ppf(0.999, SEEDS, 0.05))
"""Of so many seeds, at a level of 5%, no more may find something in noise."""


def test_labels_that_mean_nothing_have_no_information() -> None:
    found = 0
    for seed in range(SEEDS):
        states, labels = noise(seed)
        fresh, truth = noise(seed + 1000)
        (probe,) = train_all(states[None], labels, 0.01)
        bits = pointwise(probe, fresh, truth, labels).tolist()
        found += fmean(bits) / (stdev(bits) / sqrt(len(bits))) > 1.645
    assert found <= MOST


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_on_permuted_labels_probes_find_something_no_oftener_than_the_level(kind: str) -> None:
    """Held-out labels are uniform, so that hits of any probe are binomial; a place is a seed."""
    labels = noise(0)[1]
    reduced = Reduced.of(torch.stack([noise(seed)[0] for seed in range(SEEDS)]))
    if kind == "linear":
        probes = fit(reduced, labels, 0.01)
    else:
        (probes,), _ = train_mlps(reduced, [labels], 16, 0)
    limit = int(binom.ppf(0.95, 64, 1 / 4))
    hits = []
    for seed, probe in enumerate(probes):
        fresh, truth = noise(seed + 1000)
        hits.append(sum(a == b for a, b in zip(probe.predict(fresh), truth, strict=True)))
    assert sum(hit > limit for hit in hits) <= MOST
    assert abs(fmean(hits) / 64 - 1 / 4) < 4 * sqrt(3 / 16 / 64 / SEEDS)
