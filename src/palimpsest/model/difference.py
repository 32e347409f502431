"""W' − W: what a change of weights leaves in the model, whoever made it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

RELATIVE_RANK = 1e-5
"""Singular values below this share of the largest count as none: the factors are float32."""


@dataclass(frozen=True)
class Difference:
    """`ΔW_f = right[f]ᵀ left[f]`, added to W_out of one layer.

    There is one ΔW for each fact if the change is independent, otherwise a single one (F = 1).

    Attributes:
        layer: whose W_out.
        left: `[F, r, d_mlp]` float32.
        right: `[F, r, d_model]` float32.
        independent: whether each prompt feels its own fact's ΔW, which no weight holds.
    """

    layer: int
    left: Tensor
    right: Tensor
    independent: bool = False

    @property
    def facts(self) -> int:
        """F."""
        return self.left.shape[0]

    def matrix(self, fact: int) -> Tensor:
        """ΔW of one fact, `[d_model, d_mlp]` float32."""
        return self.right[fact].T @ self.left[fact]

    def norms(self) -> Tensor:
        """`[F]` Frobenius norms of ΔW, float64."""
        left, right = self.left.double(), self.right.double()
        squares: Tensor = ((left @ left.mT) * (right @ right.mT)).sum((-2, -1))
        return squares.clamp(min=0).sqrt()

    def directions(self, fact: int, most: int) -> Tensor:
        """ΔW's leading left singular vectors, `[k, d_model]` float64, k at most `most` or its rank.

        What ΔW writes to the residual stream lies in their span; each one's sign is arbitrary.
        """
        left, right = self.left[fact].double(), self.right[fact].double()
        small: Tensor = right.T @ torch.linalg.qr(left.T, "r").R.T  # the same on the left as ΔW
        vectors, values, _ = torch.linalg.svd(small, full_matrices=False)
        rank = int((values > RELATIVE_RANK * values[0]).sum())
        leading: Tensor = vectors.T[: min(rank, most)]
        return leading

    def plus(self, other: "Difference") -> "Difference":
        """The sum of two changes of one W_out; one that all facts share is added to each."""
        facts = max(self.facts, other.facts)
        lefts = [each.left.expand(facts, -1, -1) for each in (self, other)]
        rights = [each.right.expand(facts, -1, -1) for each in (self, other)]
        independent = self.independent or other.independent
        return Difference(self.layer, torch.cat(lefts, 1), torch.cat(rights, 1), independent)


def merged(differences: Iterable[Difference]) -> tuple[Difference, ...]:
    """One difference a layer, in the order of layers: W' − W tells no two changes apart."""
    found: dict[int, Difference] = {}
    for each in differences:
        found[each.layer] = found[each.layer].plus(each) if each.layer in found else each
    return tuple(found[layer] for layer in sorted(found))
