"""A random subspace of LEACE's rank, taken out: the control of every eraser."""

from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.intervene.erasers.eraser import Affine, Around, Eraser


@dataclass(frozen=True)
class RandomSubspace(Eraser):
    """r(x) = x − Q Qᵀ (x − μ), Q a seeded random orthonormal basis of k − 1 dimensions."""

    def map(self, states: Tensor, labels: Tensor, around: Around) -> Affine:
        """The projection; every site has directions of its own."""
        seed = self.seed + _APART * around.site.layer
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(
            states.shape[1], labels.shape[1] - 1, generator=generator, dtype=torch.float64
        )
        basis = torch.linalg.qr(drawn).Q
        return Affine(basis, basis.T, states.mean(0))


_APART = 1_000_003
"""Between the seeds of layers."""
