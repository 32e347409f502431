"""Linear probes: which object can be read off a state."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """A multinomial logistic regression on standardized states, as one affine map.

    Attributes:
        weight: `[classes, d_model]` float32, standardization folded in.
        bias: `[classes]`.
        classes: the objects, sorted.
    """

    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]

    def predict(self, states: Tensor) -> list[str | None]:
        """The most likely object for each of the states `[n, d_model]`; None if not finite."""
        scores = states @ self.weight.T + self.bias
        finite = scores.isfinite().all(1).tolist()
        guesses = scores.argmax(1).tolist()
        return [self.classes[g] if f else None for g, f in zip(guesses, finite, strict=True)]


def train(states: Tensor, labels: Sequence[str], c: float) -> Probe:
    """Fit scikit-learn's logistic regression.

    Args:
        states: `[n, d_model]`.
        labels: the object of each state; at least two different ones.
        c: inverse strength of the L2 penalty on standardized states.

    Returns:
        The probe; one that predicts nothing if a state is not finite.
    """
    classes = tuple(sorted(set(labels)))
    if not states.isfinite().all():
        blank = torch.full((len(classes), states.shape[1]), torch.nan)
        return Probe(blank, blank[:, 0], classes)
    scaler = StandardScaler().fit(states.double().numpy())
    scaled = torch.from_numpy(scaler.transform(states.double().numpy()))
    # The penalized solution lies in the span of the rows: fit in that basis, of rank ≤ n.
    u, s, basis = torch.linalg.svd(scaled, full_matrices=False)
    regression = LogisticRegression(C=c, max_iter=300)
    regression.fit((u * s).numpy(), [classes.index(label) for label in labels])
    coefficients = torch.from_numpy(regression.coef_) @ basis / torch.from_numpy(scaler.scale_)
    bias = torch.from_numpy(regression.intercept_) - coefficients @ torch.from_numpy(scaler.mean_)
    if len(classes) == 2:  # scikit-learn gives one row for two classes
        coefficients, bias = (torch.cat([-x, x]) for x in (coefficients, bias))
    return Probe(coefficients.float(), bias.float(), classes)
