"""Probes with a hidden layer: what is there to read, though in no linear way."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from palimpsest.evaluate.probing.probes import Probe, Reduced, indices

COMPONENTS = 128
"""Principal components of the states that are read, at most."""

STEPS = 300
PATIENCE = 50
"""Steps without a better held-out loss after which training stops."""

RATE = 0.01
DECAY = 3.0
HELD_OUT = 5
"""One subject in so many trains nothing and chooses the step."""


def train_mlps(
    reduced: Reduced, labels: Sequence[Sequence[str]], hidden: int, seed: int
) -> tuple[list[list[Probe]], Tensor]:
    """Fit one hidden layer of ReLU at every place, for several labelings of the same states.

    Adam with decoupled weight decay on the whole sample, on the first principal components, scaled
    to a mean square of 1; the step with the least loss on a held-out fifth of the subjects is kept.

    Args:
        reduced: the states of the places.
        labels: by labeling the object of each state, all with the same objects.
        hidden: units.
        seed: of the weights and of the held-out fifth.

    Returns:
        by labeling, a probe for each place; and the accuracy `[labelings, places]` on the subjects
        that were trained on.
    """
    classes = tuple(sorted(set(labels[0])))
    inputs, size = _inputs(reduced)
    targets = torch.stack([indices(each, classes) for each in labels])
    n = inputs.shape[1]
    generator = torch.Generator().manual_seed(seed)
    order, fifth = torch.randperm(n, generator=generator), max(1, n // HELD_OUT)
    held, kept = order[:fifth], order[fifth:]
    shape = (len(labels), len(inputs))
    start = _start(shape, inputs.shape[2], hidden, len(classes), generator)
    found = _descend(start, inputs, targets, kept, held)
    hits = _scores(found, inputs[:, kept]).argmax(-1) == targets[:, None, kept]
    per_labeling = zip(*found, strict=True)
    probes = [_probes(reduced, parts, size, classes) for parts in per_labeling]
    return probes, hits.double().mean(-1)


def _inputs(reduced: Reduced) -> tuple[Tensor, Tensor]:
    """Components `[places, n, k]` float32, and by what they were divided `[places, 1, 1]`."""
    components = reduced.features[..., :COMPONENTS]
    size = components.square().mean((1, 2), keepdim=True).sqrt()
    size = torch.where(size > 0, size, 1.0)
    return (components / size).float(), size


def _start(
    shape: tuple[int, int], inputs: int, hidden: int, classes: int, generator: torch.Generator
) -> list[Tensor]:
    """Weights and biases of both layers, `[labelings, places, ...]`; alike at every place."""
    first = torch.randn(hidden, inputs, generator=generator) * (2 / inputs) ** 0.5
    second = torch.randn(classes, hidden, generator=generator) * (1 / hidden) ** 0.5
    shapes = (first, torch.zeros(hidden), second, torch.zeros(classes))
    return [part.expand(*shape, *part.shape).clone().requires_grad_() for part in shapes]


def _scores(parts: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """`[labelings, places, n, classes]` of inputs `[places, n, k]`."""
    first, first_bias, second, second_bias = parts
    inner = (inputs @ first.mT + first_bias[..., None, :]).relu()
    return inner @ second.mT + second_bias[..., None, :]


def _losses(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean log-loss `[labelings, places]` over `[labelings, n]` targets."""
    wanted = targets[:, None].expand(scores.shape[:-1])
    return cross_entropy(scores.movedim(-1, 1), wanted, reduction="none").mean(-1)


def _descend(
    parts: list[Tensor], inputs: Tensor, targets: Tensor, kept: Tensor, held: Tensor
) -> list[Tensor]:
    """The weights of each problem's best step."""
    adam = torch.optim.AdamW(parts, lr=RATE, weight_decay=DECAY)
    best = [part.detach().clone() for part in parts]
    least = torch.full(parts[0].shape[:2], torch.inf)
    since = torch.zeros_like(least)
    for _ in range(STEPS):
        adam.zero_grad()
        _losses(_scores(parts, inputs[:, kept]), targets[:, kept]).sum().backward()
        adam.step()
        with torch.no_grad():
            now = _losses(_scores(parts, inputs[:, held]), targets[:, held])
            better = (now < least) & (since < PATIENCE)
            least, since = torch.where(better, now, least), torch.where(better, 0, since + 1)
            for old, new in zip(best, parts, strict=True):
                old[better] = new[better]
        if bool((since >= PATIENCE).all()):
            break
    return best


def _probes(
    reduced: Reduced, parts: Sequence[Tensor], size: Tensor, classes: tuple[str, ...]
) -> list[Probe]:
    """Each place's weights as a probe of states."""
    first, first_bias, second, second_bias = parts
    hidden = zip(*reduced.folded(first / size, first_bias.double()), strict=True)
    outer = zip(second, second_bias.double(), strict=True)
    return [Probe(w, b, classes, h) for (w, b), h in zip(outer, hidden, strict=True)]
