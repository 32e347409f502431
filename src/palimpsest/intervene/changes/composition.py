"""Interventions made of others: several at once, or one after another with a memory of the way."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from palimpsest.intervene.intervention import Intervention, described
from palimpsest.model.difference import Difference
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change


@dataclass(frozen=True, kw_only=True)
class Parts(Intervention):
    """What compositions and histories have in common.

    Attributes:
        parts: the interventions, in order.
    """

    parts: tuple[Intervention, ...]

    def tensors(self) -> dict[str, Tensor]:
        """The parts' tensors, each name led by the part's number."""
        return {
            f"{number}.{name}": tensor
            for number, part in enumerate(self.parts)
            for name, tensor in part.tensors().items()
        }

    def alone(self, fact: int) -> Self:
        """With the parts' changes of that fact, and the parts that all facts share."""
        parts = tuple(p.alone(fact) if p.change.independent else p for p in self.parts)
        return replace(self, change=replace(self.change, independent=False), parts=parts)

    def describe(self) -> dict[str, Any]:
        """With the parts' own descriptions."""
        return super().describe() | {"parts": [part.describe() for part in self.parts]}

    @classmethod
    def from_saved(
        cls,
        description: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        kinds: Mapping[str, type[Intervention]],
    ) -> Self:
        """The intervention that `save` described."""
        by_part: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            number, _, own = name.partition(".")
            by_part.setdefault(number, {})[own] = tensor
        parts = tuple(
            kinds[part["kind"]].from_saved(part, by_part.get(str(number), {}), kinds)
            for number, part in enumerate(description["parts"])
        )
        return cls._from_parts(description, parts)

    @classmethod
    @abstractmethod
    def _from_parts(cls, description: Mapping[str, Any], parts: tuple[Intervention, ...]) -> Self:
        """The intervention that `save` described, its parts being made."""


@dataclass(frozen=True, kw_only=True)
class Composition(Parts):
    """Several changes at once: applied in order, undone in reverse.

    Every part is a change of the model that carries the parts before it.
    """

    kind: ClassVar[str] = "composition"

    @contextmanager
    def changing(self, handle: ModelHandle) -> Iterator[None]:
        """Apply every part while the context lasts."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.changing(handle))
            yield

    def differences(self) -> tuple[Difference, ...]:
        """The parts' differences; several of one layer add up."""
        return tuple(each for part in self.parts for each in part.differences())

    def plus(self, other: Intervention) -> Intervention:
        """Part by part."""
        if not isinstance(other, Composition) or len(other.parts) != len(self.parts):
            return super().plus(other)
        parts = tuple(a.plus(b) for a, b in zip(self.parts, other.parts, strict=True))
        return replace(self, change=joined([self, other]), parts=parts)

    @classmethod
    def _from_parts(cls, description: Mapping[str, Any], parts: tuple[Intervention, ...]) -> Self:
        return cls(change=described(description), model=description["model"], parts=parts)


@dataclass(frozen=True, kw_only=True)
class History(Parts):
    """One change that grew edit by edit; applied, it is the last state.

    Attributes:
        steps: edits so far, by part.
    """

    kind: ClassVar[str] = "history"
    steps: tuple[int, ...]

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """`steps`."""
        return self.steps

    def at(self, step: int) -> Intervention:
        """The change after `step` edits."""
        if step not in self.steps:
            return super().at(step)
        return self.parts[self.steps.index(step)]

    def changing(self, handle: ModelHandle) -> AbstractContextManager[None]:
        """Apply the last state while the context lasts."""
        return self.parts[-1].changing(handle)

    def differences(self) -> tuple[Difference, ...]:
        """The last state's."""
        return self.parts[-1].differences()

    def describe(self) -> dict[str, Any]:
        """With the steps."""
        return super().describe() | {"steps": list(self.steps)}

    @classmethod
    def _from_parts(cls, description: Mapping[str, Any], parts: tuple[Intervention, ...]) -> Self:
        change, steps = described(description), tuple(description["steps"])
        if not parts or [type(step) for step in steps] != [int] * len(parts):
            raise TypeError("a history without a step for each part")
        return cls(change=change, model=description["model"], parts=parts, steps=steps)


def joined(parts: Sequence[Intervention]) -> Change:
    """The change that several make together: it begins where the first one does."""
    first = min(parts, key=lambda part: (part.change.layer is None, part.change.layer or 0))
    failed = {fact: cause for part in parts for fact, cause in part.change.failed.items()}
    fitted_on = dict.fromkeys(split for part in parts for split in part.change.fitted_on)
    return replace(first.change, failed=failed, fitted_on=tuple(fitted_on))
