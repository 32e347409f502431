"""Mean projection: the orthogonal projection that erases (Haghighatkhah et al. 2022)."""

from dataclasses import dataclass

from torch import Tensor

from palimpsest.errors import check_number
from palimpsest.intervene.erasers.eraser import (
    Affine,
    Around,
    Eraser,
    cross_covariance,
    orthonormal,
)


@dataclass(frozen=True)
class MeanProjection(Eraser):
    """r(x) = x − Q Qᵀ (x − μ), Q an orthonormal basis of Σ_xz's columns.

    The span of the differences of class means (arXiv 2212.10678; spectral attribute removal, Shao
    et al. 2023, takes the same subspace). On the fit sample the cross-covariance is zero, as with
    LEACE; states change more.

    Attributes:
        tolerance: singular values of Σ_xz below this share of the largest are none.
    """

    tolerance: float = 1e-9

    def __post_init__(self) -> None:
        """Check the tolerance too.

        Raises:
            RequestError: it is negative, or as of `Eraser`.
        """
        super().__post_init__()
        check_number("intervene.tolerance", self.tolerance, least=0)

    def map(self, states: Tensor, labels: Tensor, around: Around) -> Affine:
        """The projection."""
        basis = orthonormal(cross_covariance(states, labels), self.tolerance)
        return Affine(basis, basis.T, states.mean(0))
