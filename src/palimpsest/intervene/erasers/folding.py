"""What erasers that are folded into weights share: every token, no gate, a shift that may be lost.

A map r(x) = P x + (1 − P) μ on all tokens, with P = 1 − L R, is a change of the weights on either
side of the site: no hook, a plain checkpoint.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from palimpsest.errors import RequestError
from palimpsest.facts.splits import Splits
from palimpsest.intervene.changes.composition import Composition, joined
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.erasers.leace import Leace
from palimpsest.intervene.intervention import Intervention
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Part, Site
from palimpsest.record.row import Row


@dataclass(frozen=True)
class FoldedLeace(Leace):
    """LEACE on all tokens, as a change of weights."""

    policy: str = "all"

    sites_of: ClassVar[tuple[Part, ...]]
    """The parts at which its weights can hold it."""
    weights: ClassVar[str]
    """What is changed, for messages."""

    def __post_init__(self) -> None:
        """Check that weights can hold what is asked for.

        Raises:
            RequestError: another part, policy or gate, or as of `Leace`.
        """
        super().__post_init__()
        for name, valid in (("part", self.sites_of), ("policy", ("all",)), ("gate", ("always",))):
            if getattr(self, name) not in valid:
                raise RequestError(
                    f"expected intervene.{name}={' or '.join(valid)} for a change of "
                    f"{self.weights}, which acts on every token, found {getattr(self, name)!r}; "
                    "take intervene=leace for others"
                )

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Intervention:
        """LEACE, folded into the weights.

        Raises:
            RequestError: as of `Leace`.
        """
        found = super().fit(model, facts, site)
        erasures = found.parts if isinstance(found, Composition) else (found,)
        parts = tuple(
            part
            for each in erasures
            if isinstance(each, Erasure)
            for part in self.fold(model, each)
        )
        rows = (*found.diagnostics, *(row for part in parts for row in part.diagnostics))
        if len(parts) == 1:
            return replace(parts[0], diagnostics=rows)
        return Composition(
            change=joined(parts), model=model.fingerprint, parts=parts, diagnostics=rows
        )

    @abstractmethod
    def fold(self, model: ModelHandle, erasure: Erasure) -> tuple[Intervention, ...]:
        """The erasure of one site as changes of weights."""


def shift_left_out(erasure: Erasure) -> Row:
    """How large the shift is that a matrix without a bias cannot have: ‖(1 − P) μ‖ / ‖μ‖."""
    shift = erasure.proj_left @ (erasure.proj_right @ erasure.bias)
    return Row(
        axis="cost", scope="relation", split="fit", layer=erasure.change.layer,
        metric="shift_left_out", protocol="share_of_mean",
        value=float(shift.norm() / erasure.bias.norm()), n=1,
    )  # fmt: skip
