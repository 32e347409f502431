"""Any layer: the control of every locator."""

import random
from dataclasses import dataclass

from palimpsest.locate.locator import Evidence, Located, Locator, candidates, site
from palimpsest.model.handle import ModelHandle


@dataclass(frozen=True)
class Random(Locator):
    """A layer drawn uniformly, by the run's seed.

    Attributes:
        layers: to draw from; None: all.
    """

    layers: list[int] | None = None

    def locate(self, model: ModelHandle, part: str, place: str, evidence: Evidence) -> Located:
        """A layer that the method has room for; the same for every method that has the same room.

        Raises:
            RequestError: there is none.
        """
        among = candidates(model, self.layers, 1, evidence.lowest)
        draw = random.Random(f"locate/{evidence.seed}")
        return Located(site(draw.choice(among), part))
