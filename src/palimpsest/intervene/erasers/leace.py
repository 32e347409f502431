"""LEACE, least-squares concept erasure (Belrose et al. 2023, arXiv 2306.03819), of objects."""

from dataclasses import dataclass, replace

import torch
from concept_erasure import LeaceFitter
from torch import Tensor

from palimpsest.errors import RequestError, check_number
from palimpsest.intervene.erasers.eraser import Affine, Around, Eraser, relative_cross_covariance

RESIDUAL_LIMIT = 1e-9
"""Largest residual cross-covariance on the fit sample, relative to the one before erasure."""


@dataclass(frozen=True)
class Leace(Eraser):
    """*Which object* of a relation, made unreadable to every linear probe at each site.

    Fitted through the concept-erasure package. On the fitted sample the cross-covariance of erased
    states and concept is zero (theorem 3.1 and equation 1 of the paper); on fresh subjects leakage
    falls with n/d.

    Attributes:
        svd_tol: singular values of the whitened cross-covariance below this are dropped.
    """

    svd_tol: float = 1e-6

    def __post_init__(self) -> None:
        """Check the tolerance too.

        Raises:
            RequestError: it is not above 0, or as of `Eraser`.
        """
        super().__post_init__()
        check_number("intervene.svd_tol", self.svd_tol, above=0)

    @property
    def imitates(self) -> "Leace | None":
        """For the shuffled control, the same with the true labels."""
        return replace(self, shuffled=False) if self.shuffled else None

    def map(self, states: Tensor, labels: Tensor, around: Around) -> Affine:
        """LEACE's map.

        Raises:
            RequestError: the tolerance leaves some of the concept.
        """
        return erased(fit_leace(states, labels, self.svd_tol), states, labels)


def erased(affine: Affine, states: Tensor, labels: Tensor) -> Affine:
    """The map itself, if it leaves no cross-covariance on the sample.

    Raises:
        RequestError: it leaves some of the concept.
    """
    residual = relative_cross_covariance(states, affine.of(states), labels)
    if not residual < RESIDUAL_LIMIT:
        raise RequestError(
            f"expected LEACE to leave a relative cross-covariance below {RESIDUAL_LIMIT:.0e} "
            f"on its fit sample, found {residual:.1e}; lower intervene.svd_tol, which stays above 0"
        )
    return affine


def fit_leace(states: Tensor, labels: Tensor, svd_tol: float) -> Affine:
    """LEACE of states `[n, d]` and one-hot labels `[n, k]`, both float64."""
    fitter = LeaceFitter(states.shape[1], labels.shape[1], dtype=torch.float64, svd_tol=svd_tol)
    fitter.update(states, labels)
    eraser = fitter.eraser
    return Affine(eraser.proj_left.clone(), eraser.proj_right.clone(), eraser.bias.clone())
