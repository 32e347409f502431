"""EMMET (Gupta, Sajnani and Anumanchipalli 2024, arXiv 2403.14236)."""

from dataclasses import dataclass

from palimpsest.intervene.spread import Spread


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

    def penalty(self, edits: int) -> float:
        """`ridge`, and none for a single fact."""
        return self.ridge if edits > 1 else 0.0
