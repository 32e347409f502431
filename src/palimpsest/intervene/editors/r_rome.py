"""r-ROME (Gupta, Baskaran and Anumanchipalli 2024, arXiv 2403.07175): one key everywhere."""

from dataclasses import dataclass

from torch import Tensor

from palimpsest.intervene.editors.editor import Seen
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.editors.values import Values


@dataclass(frozen=True)
class RRome(Rome):
    """ROME with the mean key wherever ROME's public code puts the bare prompt's.

    `W' = W + (v* − W k̄) uᵀ / (uᵀ k̄)`, u = C⁻¹k̄, v* as ROME finds it: the equation of ROME's paper.
    It is the formula of the r-ROME paper, and no copy of its authors' code.
    ROME's code divides by uᵀk with the bare prompt's k, and where u and k hardly meet one edit is
    large enough to break a model.
    """

    def equation(self, seen: Seen, values: Values) -> tuple[Tensor, Tensor]:
        """k̄ `[F, d_mlp]` and v* − W k̄ `[F, d_model]`."""
        wanted = values.start.double() + values.delta.double()
        return seen.key.mean(1), wanted - seen.value.mean(1)
