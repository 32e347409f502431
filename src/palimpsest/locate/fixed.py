"""A layer chosen beforehand: by number, or by the model's own early and late default."""

from dataclasses import dataclass, field
from typing import Any

from palimpsest.errors import RequestError, nearest
from palimpsest.locate.locator import Evidence, Located, Locator
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Part, Site, check_choice


@dataclass(frozen=True)
class Fixed(Locator):
    """The site at a fixed layer.

    Attributes:
        layer: counted from 0; None: by `depth`.
        depth: `early` or `late`.
        depths: by place and depth, the layer for the chosen model (from the model's yaml). A place
            is a part of a block, or `span`: the last of several layers that are changed together.
    """

    layer: int | None = None
    depth: str = "early"
    depths: dict[str, dict[str, int]] = field(default_factory=dict)

    def asked(self, place: str) -> Any:
        """The layer, however it is named."""
        known = self.depths.get(place, {}).get(self.depth)
        layer = known if self.layer is None else self.layer
        return self if layer is None else {"layer": layer}

    def locate(self, model: ModelHandle, part: str, place: str, evidence: Evidence) -> Located:
        """`site`; no evidence is looked at."""
        return Located(self.site(model, part, place))

    def site(self, model: ModelHandle, part: str, place: str) -> Site:
        """The site for a method that changes `part`.

        Args:
            model: the model.
            part: of a block.
            place: the row of `depths`; normally the part.

        Raises:
            RequestError: out of range, or no layer is known for this model.
        """
        check_choice("part", part, Part)
        layer = self._layer(model, place)
        return Site(model.check_layer(layer), part)  # type: ignore[arg-type]

    def _layer(self, model: ModelHandle, place: str) -> int:
        if self.layer is not None:
            return self.layer
        known = self.depths.get(place, {})
        if not known:
            raise RequestError(
                f"expected a layer for {place} of {model.name}, found none in its yaml; "
                f"set locate.layer (0 to {model.n_layers - 1})"
            )
        if self.depth not in known:
            raise RequestError(
                f"expected locate.depth to be one of {', '.join(known)}, found {self.depth!r}; "
                f"{nearest(self.depth, known)}"
            )
        return known[self.depth]
