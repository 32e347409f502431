"""EMMET (Gupta, Sajnani and Anumanchipalli 2024, arXiv 2403.14236)."""

from dataclasses import dataclass

from palimpsest.errors import check_number
from palimpsest.intervene.editors.spread import Spread


@dataclass(frozen=True)
class Emmet(Spread):
    """ROME's equality constraints for many facts, with MEMIT's z: `Δ = R (Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹`.

    For a single fact that is r-ROME's change but for how the value is found. The public code adds
    `ridge` to the diagonal where there are several facts, which softens the constraints.

    Attributes:
        span: one layer.
        ridge: added to the diagonal of KᵀC⁻¹K of more than one fact.
    """

    span: int = 1
    ridge: float = 0.1

    def __post_init__(self) -> None:
        """Check the ridge too.

        Raises:
            RequestError: it is negative, or what `Spread` refuses.
        """
        super().__post_init__()
        check_number("intervene.ridge", self.ridge, least=0)

    def penalty(self, edits: int) -> float:
        """`ridge`, and none for a single fact."""
        return self.ridge if edits > 1 else 0.0
