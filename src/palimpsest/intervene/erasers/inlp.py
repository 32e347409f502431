"""Iterative null-space projection (Ravfogel et al. 2020, arXiv 2004.07667)."""

from dataclasses import dataclass

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from palimpsest.errors import check_at_least, check_number
from palimpsest.intervene.erasers.eraser import Affine, Around, Eraser, orthonormal


@dataclass(frozen=True)
class Inlp(Eraser):
    """A classifier is trained, its directions are projected out, and again: no guarantee.

    Each round fits a multinomial logistic regression on states divided by their common standard
    deviation, over four fifths of the sample, and takes out its row space (k − 1 dimensions). It
    ends when the classifier does no better than the largest class on the other fifth, or after
    `rounds`. The last map is r(x) = x − Q Qᵀ (x − μ), Q spanning all the directions.

    Attributes:
        rounds: at most.
        c: inverse strength of the classifiers' L2 penalty.
    """

    rounds: int = 20
    c: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers too.

        Raises:
            RequestError: no round, a penalty that is none, or as of `Eraser`.
        """
        super().__post_init__()
        check_at_least("intervene.rounds", self.rounds, 1)
        check_number("intervene.c", self.c, above=0)

    def map(self, states: Tensor, labels: Tensor, around: Around) -> Affine:
        """The projection."""
        mean = states.mean(0)
        centred = states - mean
        scaled = centred / centred.std()
        names = labels.argmax(1)
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(self.seed))
        judged, learned = order[: len(order) // 5], order[len(order) // 5 :]
        chance = float(torch.bincount(names[judged]).max() / len(judged)) if len(judged) else 1.0
        basis = scaled.new_empty(len(mean), 0)
        for _ in range(self.rounds):
            rest = scaled - (scaled @ basis) @ basis.T
            if len(names[learned].unique()) < 2 or basis.shape[1] >= len(mean):
                break
            probe = LogisticRegression(C=self.c, max_iter=200)
            probe.fit(rest[learned].numpy(), names[learned].numpy())
            if probe.score(rest[judged].numpy(), names[judged].numpy()) <= chance:
                break
            rows = torch.from_numpy(probe.coef_)
            rows = rows - rows.mean(0) if len(rows) > 1 else rows
            found = rows.T - basis @ (basis.T @ rows.T)
            basis = torch.cat([basis, orthonormal(found, 1e-9)], 1)
        return Affine(basis, basis.T, mean)
