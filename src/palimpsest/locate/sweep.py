"""The layer at which the method itself does best, on dev facts."""

from dataclasses import dataclass

from palimpsest.errors import check_at_least
from palimpsest.locate.locator import Evidence, Located, Locator, best, candidates, site
from palimpsest.model.handle import ModelHandle


@dataclass(frozen=True)
class Sweep(Locator):
    """The method is fitted on the dev facts at every layer, and judged on their unseen prompts.

    Attributes:
        layers: to be tried; None: every `stride`-th.
        stride: distance of the tried layers.
    """

    layers: list[int] | None = None
    stride: int = 3

    def __post_init__(self) -> None:
        """Check the stride.

        Raises:
            RequestError: it is below 1.
        """
        check_at_least("locate.stride", self.stride, 1)

    def locate(self, model: ModelHandle, part: str, place: str, evidence: Evidence) -> Located:
        """The tried layer with the best trial; of several such the lowest.

        Raises:
            RequestError: no dev facts, or no layer that the method has room for.
        """
        evidence.facts()
        among = candidates(model, self.layers, self.stride, evidence.lowest)
        scores = {layer: evidence.trial(site(layer, part)) for layer in among}
        return Located(site(best(scores), part), scores)
