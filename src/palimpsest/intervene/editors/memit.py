"""MEMIT, mass editing of memory (Meng et al. 2022b, arXiv 2210.07229)."""

from dataclasses import dataclass

from palimpsest.errors import check_number
from palimpsest.intervene.editors.spread import Spread


@dataclass(frozen=True)
class Memit(Spread):
    """Least squares at each layer, old associations held by C: `Δ = R Kᵀ (λC + K Kᵀ)⁻¹`.

    λ weighs what a layer held before against what is written (equation 14, with C₀ = λC). A single
    key k is met to the share kᵀC⁻¹k / (λ + kᵀC⁻¹k), and kᵀC⁻¹k is d_mlp on average: λ has to be
    read against d_mlp.

    Attributes:
        weight: λ; the public code has 15,000 for GPT-J (d_mlp 16,384), 20,000 for GPT-2 XL (6,400).
    """

    weight: float = 15_000.0

    def __post_init__(self) -> None:
        """Check λ too.

        Raises:
            RequestError: it is not above 0, or what `Spread` refuses.
        """
        super().__post_init__()
        check_number("intervene.weight", self.weight, above=0)

    def penalty(self, edits: int) -> float:
        """λ: by Woodbury's identity `Kᵀ (λC + K Kᵀ)⁻¹ = (Kᵀ C⁻¹ K + λ 1)⁻¹ Kᵀ C⁻¹`."""
        return self.weight
