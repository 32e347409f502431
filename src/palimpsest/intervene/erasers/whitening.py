"""Coordinates in which states have unit variance, and maps that are simple there."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from palimpsest.intervene.erasers.eraser import Affine


@dataclass(frozen=True)
class Whitening:
    """W = S^(−½) on the span of S, none where S has no variance.

    Attributes:
        basis: `[d, r]` eigenvectors of S with variance.
        root: `[r]` square roots of their eigenvalues.
    """

    basis: Tensor
    root: Tensor

    @classmethod
    def of(cls, spread: Tensor) -> Self:
        """From S `[d, d]`, symmetric and positive semidefinite, float64."""
        values, vectors = torch.linalg.eigh(spread)
        present = values > values.max() * len(values) * torch.finfo(values.dtype).eps
        return cls(vectors[:, present], values[present].sqrt())

    def white(self, columns: Tensor) -> Tensor:
        """W columns in the basis' coordinates, `[r, k]` of `[d, k]`."""
        return (self.basis.T @ columns) / self.root[:, None]

    def affine(self, left: Tensor, right: Tensor, mean: Tensor) -> Affine:
        """The map x − W⁺ left rightᵀ W (x − mean).

        Args:
            left: `[r, m]` in white coordinates.
            right: `[r, m]`.
            mean: `[d]`.
        """
        back, to = self.root[:, None] * left, right / self.root[:, None]
        return Affine(self.basis @ back, to.T @ self.basis.T, mean)
