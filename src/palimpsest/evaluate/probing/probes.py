"""Linear probes: which object can be read off a state, at all places of a relation at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

GRADIENT = 1e-6
"""Largest gradient left, in coordinates in which the curvature is about 1."""

TOGETHER = 2_000_000
"""Numbers of features solved for at once: 16 MB, which a processor's cache still holds."""

EVALUATIONS = 2000
"""Of the loss, at most; what is regularized as a probe is needs a few dozen."""


@dataclass(frozen=True)
class Probe:
    """A classifier of states: an affine map to scores, after one hidden layer if there is one.

    Attributes:
        weight: `[classes, inputs]` float32; of a linear probe, standardization folded in.
        bias: `[classes]` float64.
        classes: the objects, sorted.
        hidden: weight `[units, d_model]` float32 and bias `[units]` float64 of the layer of ReLU
            before it, with standardization folded in; None for a linear probe.
    """

    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    hidden: tuple[Tensor, Tensor] | None = None

    def scores(self, states: Tensor) -> Tensor:
        """Log-odds `[n, classes]` float64 of states `[n, d_model]`; NaN where not finite."""
        inner = states.double()
        lost = ~inner.isfinite().all(1)
        if self.hidden is not None:
            inner = (inner @ self.hidden[0].double().T + self.hidden[1]).relu()
        scores = inner @ self.weight.double().T + self.bias
        return scores.masked_fill(lost[:, None] | ~scores.isfinite(), torch.nan)

    def predict(self, states: Tensor, barred: Sequence[str | None] = ()) -> list[str | None]:
        """The most likely object for each of the states `[n, d_model]`; None if not finite.

        Args:
            states: `[n, d_model]`.
            barred: `[n]` an object that is no answer, by state; none are if empty.
        """
        scores = self.scores(states)
        finite = scores.isfinite().all(1).tolist()
        for row, name in enumerate(barred):
            if name in self.classes:
                scores[row, self.classes.index(name)] = -torch.inf
        guesses = scores.argmax(1).tolist()
        return [self.classes[g] if f else None for g, f in zip(guesses, finite, strict=True)]

    def logprobs(self, states: Tensor, objects: Sequence[str]) -> Tensor:
        """Log p `[n]` (nats) of an object of the probe's for each state; NaN if not finite."""
        index = indices(objects, self.classes)
        return self.scores(states).log_softmax(1).gather(1, index[:, None])[:, 0]


@dataclass(frozen=True)
class Reduced:
    """Standardized states of several places, in a basis of the span of their rows.

    Attributes:
        features: `[places, n, m]` float64, m = min(n, d_model), columns orthogonal, largest first.
        basis: `[places, d_model, m]`, orthonormal.
        mean: `[places, d_model]` of the states.
        scale: `[places, d_model]`, their standard deviation; 1 of what never changes.
        finite: `[places]`, whether all states of the place are; the others count as zeros.
    """

    features: Tensor
    basis: Tensor
    mean: Tensor
    scale: Tensor
    finite: Tensor

    @classmethod
    def of(cls, states: Tensor) -> "Reduced":
        """Of states `[places, n, d_model]`. A penalized solution lies in the rows' span."""
        finite = states.isfinite().flatten(1).all(1)
        states = torch.where(finite[:, None, None], states, 0.0).double()
        mean, scale = states.mean(1), _scale(states)
        scaled = (states - mean[:, None]) / scale[:, None]
        n, width = states.shape[1:]
        frame = None
        if n < width:
            frame, upper = torch.linalg.qr(scaled.mT)
            scaled = upper.mT
        rotation = torch.linalg.eigh(scaled.mT @ scaled).eigenvectors.flip(-1)
        basis = rotation if frame is None else frame @ rotation
        return cls(scaled @ rotation, basis, mean, scale, finite)

    def project(self, states: Tensor) -> Tensor:
        """Other states `[places, k, d_model]` as features `[places, k, m]`."""
        return ((states.double() - self.mean[:, None]) / self.scale[:, None]) @ self.basis

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of features as maps of states; NaN at places that are not finite.

        Args:
            weight: `[places, r, ≤ m]`, of the first features.
            bias: `[places, r]`.

        Returns:
            float32 `[places, r, d_model]`, float64 `[places, r]`.
        """
        lost = ~self.finite[:, None]
        basis = self.basis[..., : weight.shape[-1]]
        whole = (weight.double() @ basis.mT / self.scale[:, None]).float()
        bias = bias - (whole.double() @ self.mean[:, :, None])[..., 0]
        return whole.masked_fill(lost[..., None], torch.nan), bias.masked_fill(lost, torch.nan)


def _scale(states: Tensor) -> Tensor:
    """Standard deviations `[places, d_model]`, by scikit-learn's rule of what is constant."""
    variance, mean = states.var(1, correction=0), states.mean(1)
    n, eps = states.shape[1], torch.finfo(states.dtype).eps
    constant = variance <= n * eps * variance + (n * mean * eps).square()
    return variance.sqrt().masked_fill(constant, 1.0)


def indices(labels: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Each label's number among the classes, `[n]`."""
    number = {name: n for n, name in enumerate(classes)}
    return torch.tensor([number[label] for label in labels], dtype=torch.long)


def solve(features: Tensor, targets: Tensor, classes: int, c: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regressions of several places.

    Minimizes C Σ −log p(y | x) + ½ ‖W‖² of each, the intercept not penalized: the objective of
    scikit-learn's `LogisticRegression`, which for two classes has one row of weights, the
    difference of two, so that here the penalty of the two counts twice.

    Args:
        features: `[places, n, m]` float64.
        targets: `[n]`, from 0 to `classes` − 1, each of which occurs.
        classes: at least 2.
        c: inverse strength of the penalty.

    Returns:
        weight `[places, classes, m]` and bias `[places, classes]`.
    """
    size = max(1, TOGETHER // max(1, features[0].numel()))
    groups = [_search(group, targets, classes, c) for group in features.split(size)]
    weights, biases = zip(*groups, strict=True)
    return torch.cat(weights), torch.cat(biases)


def _search(features: Tensor, targets: Tensor, classes: int, c: float) -> tuple[Tensor, Tensor]:
    """One L-BFGS over the places of a group.

    Coordinates are scaled by the curvature at W = 0, which changes the path and not the solution.
    """
    places, n, m = features.shape
    penalty = 2.0 if classes == 2 else 1.0
    pace = (penalty + c / classes * features.square().sum(1)).rsqrt()[:, None]
    scaled, step = features * pace, (classes / (c * n)) ** 0.5
    weight = torch.zeros(places, classes, m, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(places, classes, dtype=torch.float64, requires_grad=True)
    wanted = targets.expand(places, n)
    search = torch.optim.LBFGS(
        [weight, bias],
        max_iter=EVALUATIONS,
        max_eval=EVALUATIONS,
        tolerance_grad=GRADIENT,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        scores = weight @ scaled.mT + step * bias[..., None]
        found = c * cross_entropy(scores, wanted, reduction="sum")
        found = found + penalty / 2 * (weight * pace).square().sum()
        found.backward()
        return found

    search.step(loss)
    return (weight * pace).detach(), step * bias.detach()


def fit(reduced: Reduced, labels: Sequence[str], c: float) -> list[Probe]:
    """Linear probes of all places, in their order.

    Args:
        reduced: the states.
        labels: the object of each state; at least two different ones.
        c: inverse strength of the L2 penalty on standardized states.
    """
    classes = tuple(sorted(set(labels)))
    solved = solve(reduced.features, indices(labels, classes), len(classes), c)
    return [Probe(w, b, classes) for w, b in zip(*reduced.folded(*solved), strict=True)]


def train_all(states: Tensor, labels: Sequence[str], c: float) -> list[Probe]:
    """Fit scikit-learn's logistic regression on standardized states at every place.

    Args:
        states: `[places, n, d_model]`.
        labels: the object of each state; at least two different ones.
        c: inverse strength of the L2 penalty on standardized states.

    Returns:
        a probe for each place; one that predicts nothing where a state is not finite.
    """
    return fit(Reduced.of(states), labels, c)


def choose(
    reduced: Reduced,
    labels: Sequence[str],
    strengths: Sequence[float],
    states: Tensor,
    truth: Sequence[str],
) -> float:
    """The strength whose probes have the least mean log-loss on held-out states.

    Args:
        reduced: what the probes are trained on.
        labels: its objects.
        strengths: to choose from; of equal ones the smallest is taken.
        states: `[places, k, d_model]`, of other subjects.
        truth: their objects, all among the labels.

    Returns:
        one strength for all places; the middle one if nothing is finite.
    """
    classes = tuple(sorted(set(labels)))
    targets, wanted = indices(labels, classes), indices(truth, classes)
    features = reduced.project(states)
    sound = reduced.finite & features.isfinite().flatten(1).all(1)
    losses = {}
    for c in sorted(strengths):
        weight, bias = solve(reduced.features, targets, len(classes), c)
        scores = weight @ features.mT + bias[..., None]
        loss = cross_entropy(scores, wanted.expand(len(scores), -1), reduction="none")
        losses[c] = float(loss[sound].mean()) if bool(sound.any()) else 0.0
    return min(losses, key=losses.__getitem__) if bool(sound.any()) else middle(strengths)


def middle(strengths: Sequence[float]) -> float:
    """The middle strength; of an even number the upper of the two."""
    return sorted(strengths)[len(strengths) // 2]
