"""The linear algebra of editors: second moments factored once, then small systems in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.errors import RequestError


@dataclass(frozen=True)
class Inverse:
    """C⁻¹, as its Cholesky factor.

    Attributes:
        factor: lower triangular `[d, d]` float64, C = factor factorᵀ.
    """

    factor: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "Inverse":
        """Factor C `[d, d]` float64, which is overwritten: beside the factor nothing is kept.

        Raises:
            RequestError: C is singular.
        """
        width = moments.shape[0]
        scale = moments.diagonal().sqrt()
        by_column = moments.mT  # as LAPACK has it: no copy is made
        info = torch.empty((), dtype=torch.int32, device=moments.device)
        torch.linalg.cholesky_ex(by_column, out=(by_column, info))
        found = cls(by_column)
        if int(info) != 0 or not found._least(scale) > width * torch.finfo(scale.dtype).eps:
            raise RequestError(
                f"expected second moments of full rank {width}, found a singular matrix; raise "
                f"intervene.moments.tokens to at least {10 * width} (ten tokens a dimension), or "
                "where units are dead on any text take an editor without C, such as rome_plain"
            )
        return found

    def _least(self, scale: Tensor) -> float:
        """About the least eigenvalue of C scaled to a unit diagonal, by inverse iteration.

        Rounding leaves pivots that should be zero far above it, the last one most of all.
        """
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(4, len(scale), generator=generator, dtype=scale.dtype).to(scale.device)
        growth = torch.ones_like(rows[:, 0])
        for _ in range(3):
            rows = rows / rows.norm(dim=1, keepdim=True)
            rows = self.apply(rows * scale) * scale
            growth = rows.norm(dim=1)
        return 1 / float(growth.max())

    def apply(self, rows: Tensor) -> Tensor:
        """C⁻¹ applied to each row of `[n, d]` float64."""
        below = torch.linalg.solve_triangular(self.factor, rows.T, upper=False)
        solution: Tensor = torch.linalg.solve_triangular(self.factor.mT, below, upper=True)
        return solution.T


def unit_response(direction: Tensor, key: Tensor) -> Tensor:
    """Each direction scaled so that its product with its own key is 1, `[F, d]`."""
    return direction / (direction * key).sum(1, keepdim=True)


def dual(direction: Tensor, key: Tensor) -> Tensor:
    """Rows L with L K = 1: `(U Kᵀ)⁻¹ U` for directions and keys `[F, d]`; NaN of such.

    Raises:
        RequestError: the keys are linearly dependent.
    """
    gram = direction @ key.T
    if not gram.isfinite().all():
        return torch.full_like(direction, torch.nan)
    condition = float(torch.linalg.cond(gram))
    if not condition < 1e12:
        raise RequestError(
            "expected facts whose keys are linearly independent, found a condition number of "
            f"{condition:.1e} over {len(key)} facts; drop facts that share a subject and all that "
            "comes before it"
        )
    solution: Tensor = torch.linalg.solve(gram, direction)
    return solution


def ridge(direction: Tensor, key: Tensor, ridge: float) -> Tensor:
    """Rows `(U Kᵀ + ridge 1)⁻¹ U` of each group, `[G, n, d]` for directions and keys of that shape.

    With U = K C⁻¹ this is `Kᵀ (ridge C + K Kᵀ)⁻¹` (Woodbury): n × n systems in place of d × d ones.
    """
    identity = torch.eye(key.shape[1], dtype=key.dtype, device=key.device)
    solution: Tensor = torch.linalg.solve(direction @ key.mT + ridge * identity, direction)
    return solution


def change_norm(left: Tensor, right: Tensor) -> Tensor:
    """‖Σ_j right_j left_jᵀ‖ of each group in Frobenius norm, from two r × r Gram matrices.

    Args:
        left: `[G, r, d]`.
        right: `[G, r, e]`.

    Returns:
        `[G]`.
    """
    return ((left @ left.mT) * (right @ right.mT)).sum((1, 2)).clamp(min=0).sqrt()
