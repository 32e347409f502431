"""Measure: one part of the ruler, as the ruler asks it."""

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, runtime_checkable

from palimpsest.evaluate.scene import Scene
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from palimpsest.record.row import Row


@runtime_checkable
class Measure(Protocol):
    """Asks one thing of a changed model. A frozen dataclass of settings is enough to be one.

    Attributes:
        version: raised whenever the same settings give other values; part of the measure's key, so
            that values of two versions are never compared.
        along: a sequence of edits is measured along the way too, not only at its end.
    """

    version: ClassVar[int]
    along: ClassVar[bool]

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> Any:
        """What the measure is relative to, taken from the unchanged model; None if nothing."""
        ...

    def measure(self, scene: Scene, prepared: Any) -> Iterator[Row]:
        """The rows. A value that cannot be had is a row with a null and the cause."""
        ...
