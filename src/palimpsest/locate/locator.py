"""What every locator is: something that chooses a site before the target facts are looked at."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Part, Site, check_choice


@dataclass(frozen=True)
class Evidence:
    """What a locator may go by. Target facts are not in it: a layer chosen on them would flatter.

    Attributes:
        seed: of the run.
        lowest: the lowest layer at which the method has room.
        dev: gives the dev facts that the model knows.
        trial: gives how well the method does on the dev facts at a site, in [0, 1].
    """

    seed: int
    lowest: int
    dev: Callable[[], tuple[Fact, ...]]
    trial: Callable[[Site], float]

    def facts(self) -> tuple[Fact, ...]:
        """The dev facts.

        Raises:
            RequestError: there are none.
        """
        found = self.dev()
        if not found:
            raise RequestError(
                "expected dev facts that the model knows, to choose a layer on, found none; raise "
                "facts.dev and facts.shares.dev, or set locate.layer"
            )
        return found


@dataclass(frozen=True)
class Located:
    """A site, and what it was chosen for.

    Attributes:
        site: where the method changes the model.
        scores: by layer, what was compared; empty where nothing was.
    """

    site: Site
    scores: Mapping[int, float] = field(default_factory=dict)


class Locator(ABC):
    """Chooses the site of a method."""

    def asked(self, place: str) -> Any:
        """What it is asked to choose by, to be hashed into a request.

        Args:
            place: the row of the model's usual layers that the method names.
        """
        return self

    @abstractmethod
    def locate(self, model: ModelHandle, part: str, place: str, evidence: Evidence) -> Located:
        """The site for a method that changes `part`.

        Args:
            model: the unchanged model.
            part: of a block.
            place: the method's row among a model's usual layers.
            evidence: what the choice may go by.

        Raises:
            RequestError: there is no such site, or nothing to choose it by.
        """


def candidates(
    model: ModelHandle, layers: list[int] | None, stride: int, lowest: int
) -> tuple[int, ...]:
    """The layers to choose among: those named, or every `stride`-th, from `lowest` on.

    Raises:
        RequestError: the model lacks one, or none is left.
    """
    if layers is not None:
        for layer in layers:
            model.check_layer(layer, "locate.layers")
    among = range(0, model.n_layers, stride) if layers is None else sorted(set(layers))
    found = tuple(layer for layer in among if layer >= lowest)
    if not found:
        raise RequestError(
            f"expected a layer from {lowest} on for this method on {model.name}, found none among "
            f"{list(among)}; mend locate.layers"
        )
    return found


def best(scores: Mapping[int, float]) -> int:
    """The layer with the highest score; the lowest of several such."""
    return max(sorted(scores), key=lambda layer: scores[layer])


def site(layer: int, part: str) -> Site:
    """A layer's site.

    Raises:
        RequestError: no such part.
    """
    check_choice("part", part, Part)
    return Site(layer, part)  # type: ignore[arg-type]
