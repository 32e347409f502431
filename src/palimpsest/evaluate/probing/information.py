"""How much of an object a state tells, in bits: online codes and V-information.

A probe's accuracy says how often its best guess is right; a codelength also counts how many
subjects it took to learn, and V-information how sure it is.
"""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import log, log2

import torch
from torch import Tensor

from palimpsest.evaluate.probing.probes import Probe, Reduced, indices, solve

FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Of the subjects, where one block of the code ends and the next probe is trained."""


def blocks(n: int) -> list[int]:
    """Ends of the blocks of n labels, at least one label each."""
    return sorted({max(1, round(n * fraction)) for fraction in FRACTIONS})


def online_code(reduced: Reduced, labels: Sequence[str], c: float, seed: int) -> Tensor:
    """Bits `[places]` that send the labels to somebody who has the states.

    The prequential code of Voita and Titov 2020 (arXiv 2003.12298, section 2.2): each block by the
    probe trained on all blocks before it, the first and those after a single class uniformly. An
    object that none of the t labels before has shares the probability m / (t + m) with the other
    m − 1 such objects (it would cost infinitely much); where all were seen the probe's own counts.

    Args:
        reduced: the states; standardized over all of them, as both sides have them.
        labels: the object of each state; at least two different ones.
        c: inverse strength of the probes' penalty.
        seed: of the order in which the labels are sent.

    Returns:
        float64; NaN where states are not finite.
    """
    classes = sorted(set(labels))
    order = list(range(len(labels)))
    random.Random(f"online_code/{seed}").shuffle(order)
    features, targets = reduced.features[:, order], indices(labels, classes)[order]
    ends = blocks(len(labels))
    bits = torch.full((len(features),), ends[0] * log2(len(classes)), dtype=torch.float64)
    for sent, end in pairwise(ends):
        block = slice(sent, end)
        logprobs = _predicted(features, targets, len(classes), sent, block, c)
        bits -= logprobs.gather(2, targets[block].expand(len(bits), -1)[..., None]).sum(
            (1, 2)
        ) / log(2)
    return bits.masked_fill(~reduced.finite, torch.nan)


def _predicted(
    features: Tensor, targets: Tensor, classes: int, sent: int, block: slice, c: float
) -> Tensor:
    """Log p `[places, block, classes]` (nats) after so many labels."""
    seen, known = targets[:sent].unique(return_inverse=True)
    shape = (len(features), block.stop - block.start, classes)
    if len(seen) < 2:
        return torch.full(shape, -log(classes), dtype=torch.float64)
    weight, bias = solve(features[:, :sent], known, len(seen), c)
    scores = features[:, block] @ weight.mT + bias[:, None]
    new = classes - len(seen)
    found = torch.full(shape, -log(sent + new), dtype=torch.float64)
    found[..., seen] = scores.log_softmax(-1) + log(sent / (sent + new))
    return found


def pointwise(probe: Probe, states: Tensor, truth: Sequence[str], labels: Sequence[str]) -> Tensor:
    """log₂ p(y | x) − log₂ p(y) `[n]` of states and their objects; NaN where not finite.

    Ethayarajh et al. 2022 (arXiv 2110.08420, equation 4). The mean over held-out states is the
    V-information of Xu et al. 2020 (arXiv 2002.10689), V being the regularized linear probes: below
    0 where the probe does worse than the constant.

    Args:
        probe: of the states.
        states: `[n, d_model]`.
        truth: their objects, all among the probe's.
        labels: what the probe was trained on; p(y) is the share of y among them.
    """
    shares = Counter(labels)
    prior = torch.tensor([log(shares[name] / len(labels)) for name in truth], dtype=torch.float64)
    return (probe.logprobs(states, truth) - prior) / log(2)
