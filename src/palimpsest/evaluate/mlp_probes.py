"""Probes with a hidden layer at every layer of the model: what is there, but not linearly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from palimpsest.errors import check_at_least
from palimpsest.evaluate.probing.measuring import ProbeMeasure
from palimpsest.evaluate.probing.training import Kit, Where, train_mlp_kit


@dataclass(frozen=True)
class MLPProbes(ProbeMeasure):
    """Held-out probes with one hidden layer for the true object, frozen and retrained.

    Attributes:
        stride: every how many layers states are read; the last layer always is.
        least: subjects a class that a relation needs for its probes, on average.
        hidden: units of the hidden layer.
    """

    version: ClassVar[int] = 2
    name: ClassVar[str] = "mlp_probes"
    kind: ClassVar[str] = "mlp"

    hidden: int = 64

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: one is too small.
        """
        super().__post_init__()
        check_at_least("evaluate.mlp_probes.hidden", self.hidden, 1)

    def settings(self) -> dict[str, Any]:
        """What frozen probes depend on."""
        return {"hidden": self.hidden}

    def train(
        self,
        states: Mapping[Where, Tensor],
        labels: Sequence[str],
        dev: Mapping[Where, Tensor],
        truth: Sequence[str],
        seed: int,
    ) -> Kit:
        """Probes and controls; nothing is chosen on dev facts."""
        return train_mlp_kit(states, labels, self.hidden, seed)
