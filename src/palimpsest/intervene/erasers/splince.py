"""SPLINCE (Holstege, Ravfogel, Wouters 2025, arXiv 2506.10703): erase one, keep another."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from palimpsest.errors import RequestError, nearest
from palimpsest.facts.fact import Fact
from palimpsest.intervene.erasers.eraser import (
    Affine,
    Around,
    Concept,
    concept,
    cross_covariance,
    nothing_to_erase,
    orthonormal,
    states_of,
)
from palimpsest.intervene.erasers.leace import Leace, erased
from palimpsest.intervene.erasers.whitening import Whitening
from palimpsest.record.row import Row

TOLERANCE = 1e-9
"""Singular values below this share of the largest are none."""


ANGLE = 1e-8
"""Squared sine of an angle below which a direction of the concept counts as kept."""


@dataclass(frozen=True)
class Splince(Leace):
    """Erase *which object* of one relation, and leave what tells others' objects apart as it is.

    With x the states of the relation that is erased, z its objects, x' and y those of a relation
    that is kept, and W = (Σ_xx^½)⁺, let A = span(W Σ_xz), B = span(W Σ_x'y), M the orthogonal
    projection onto B's complement, and Q an orthonormal basis of A. Then

        r(x) = x − W⁺ Q (Qᵀ M Q)⁻¹ Qᵀ M W (x − E x).

    In white coordinates it takes A to zero and leaves B: Cov(r(x), z) = 0 on the fit sample, and
    Cov(r(x'), y) = Cov(x', y) on the kept facts, which are of other subjects than those that the
    ruler asks. Among the maps with both properties it changes x least, since on what is orthogonal
    to A and B it does nothing. The paper has two labels of the same states; here the second
    relation has states of its own.

    Attributes:
        keep: the relation that is kept; None for every other relation with two objects or more that
            two or more subjects have.
    """

    keep: str | None = None

    @property
    def imitates(self) -> "Splince | None":
        """For the shuffled control, the same with the true labels."""
        return replace(self, shuffled=False) if self.shuffled else None

    def map(self, states: Tensor, labels: Tensor, around: Around) -> Affine:
        """The map.

        Raises:
            RequestError: no relation to keep, or keeping it keeps the concept.
        """
        kept = [
            cross_covariance(self._states(around, each), each.labels)
            for each in self.kept(around.facts.kept, around.model.width)
        ]
        centred = states - states.mean(0)
        whitening = Whitening.of(centred.T @ centred / len(states))
        taken = orthonormal(whitening.white(cross_covariance(states, labels)), TOLERANCE)
        spared = orthonormal(whitening.white(torch.cat(kept, 1)), TOLERANCE)
        aside = taken - spared @ (spared.T @ taken)
        inner = taken.T @ aside  # its eigenvalues: squared sines of the angles between both
        if not float(torch.linalg.eigvalsh(inner).min()) > ANGLE:
            raise RequestError(
                "expected a relation that is not a combination of the kept ones, found that "
                f"sparing {spared.shape[1]} directions leaves no way to take out "
                f"{taken.shape[1]}; name one relation in intervene.keep"
            )
        right = torch.linalg.solve(inner, aside.T).T
        return erased(whitening.affine(taken, right, states.mean(0)), states, labels)

    def kept(self, facts: Sequence[Fact], width: int) -> list[Concept]:
        """The kept relations' facts and labels; objects of a single subject are left out.

        Raises:
            RequestError: none, or none of that name.
        """
        named = sorted({fact.relation for fact in facts})
        if self.keep is not None and self.keep not in named:
            listed = ", ".join(named) or "none"
            raise RequestError(
                f"expected intervene.keep to be another relation of the data ({listed}), found "
                f"{self.keep!r}; {nearest(self.keep, named)}"
            )
        groups = [_shared(facts, name) for name in named if self.keep in (None, name)]
        found = [concept(g, width) for g in groups if len({fact.true for fact in g}) > 1]
        if not found:
            raise RequestError(
                "expected facts of another relation with two objects or more that several subjects "
                f"have, found none among {len(facts)}; set intervene.keep or use other facts"
            )
        return found

    def beside(self, affine: Affine, around: Around) -> Iterator[Row]:
        """How far the kept cross-covariances have moved, on kept facts and on the ruler's."""
        site = around.site
        for split, facts in (("kept", around.facts.kept), ("others", around.facts.others)):
            for each in self._judged(facts, around.model.width):
                states = self._states(around, each)
                before, after = (
                    cross_covariance(x, each.labels) for x in (states, affine.of(states))
                )
                note = nothing_to_erase(states, each.labels, around.model.model.dtype)
                moved = float((after - before).norm() / before.norm()) if note is None else None
                yield Row(
                    axis="cost", scope="relation", relation=each.facts[0].relation, split=split,
                    layer=site.layer, metric="cross_covariance_moved", protocol="relative",
                    value=moved, n=0 if moved is None else len(each.facts),
                    note=note,
                )  # fmt: skip

    def _states(self, around: Around, concept: Concept) -> Tensor:
        """States `[n, d_model]` of a kept relation's facts at the site."""
        return states_of(around.model, concept.facts, [around.site], self.position)[0]

    def _judged(self, facts: Sequence[Fact], width: int) -> list[Concept]:
        """As `kept`, and nothing where there is nothing to judge."""
        names = sorted({fact.relation for fact in facts} if self.keep is None else {self.keep})
        groups = [_shared(facts, name) for name in names]
        return [concept(g, width) for g in groups if len({fact.true for fact in g}) > 1]


def _shared(facts: Sequence[Fact], relation: str) -> list[Fact]:
    """A relation's facts whose object another subject has too."""
    mine = [fact for fact in facts if fact.relation == relation]
    sizes = Counter(fact.true for fact in mine)
    return [fact for fact in mine if sizes[fact.true] > 1]
