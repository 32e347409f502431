"""One method after another: erase, then write; or write, then erase."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from palimpsest.errors import RequestError
from palimpsest.facts.splits import Splits
from palimpsest.intervene.changes.composition import Composition, Parts, joined
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.intervention import Intervention, Method
from palimpsest.intervene.method import MethodBase, check_method
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site
from palimpsest.record.row import Row


@dataclass(frozen=True)
class InTurn(MethodBase):
    """Two methods, the second fitted on the model that carries the first one's change.

    Either may be such a pair itself. Both changes are undone in reverse, bit for bit.

    Attributes:
        first: the method that is fitted on the unchanged model.
        then: the method that is fitted on what the first has made of it.
        first_layer: of the first; None for the located layer.
        then_layer: of the second; None for the located layer.
    """

    first: Any
    then: Any
    first_layer: int | None = None
    then_layer: int | None = None

    def __post_init__(self) -> None:
        """Check both, and that one of them, and only one, is located.

        Raises:
            RequestError: one lacks something of a method, both have a layer, or neither.
        """
        check_method(type(self.first), "intervene.first")
        check_method(type(self.then), "intervene.then")
        if (self.first_layer is None) == (self.then_layer is None):
            found = "none" if self.first_layer is None else "both"
            raise RequestError(
                "expected a layer in one of intervene.first_layer and intervene.then_layer, the "
                f"other being null for the located layer, found {found}; set one"
            )

    @property
    def located(self) -> Method:
        """The method whose layer is chosen by `locate`."""
        return self.first if self.first_layer is None else self.then  # type: ignore[no-any-return]

    @property
    def part(self) -> str:
        """The located method's."""
        return self.located.part

    @property
    def place(self) -> str:
        """The located method's."""
        return self.located.place

    @property
    def lowest(self) -> int:
        """The lowest layer at which the located method has room."""
        return self.located.lowest

    @property
    def scope(self) -> str:
        """`relation` if either is fitted on a relation's facts."""
        scopes = {self.first.scope, self.then.scope}
        return "relation" if "relation" in scopes else "fact"

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> Composition:
        """Fit the first, and the second on the changed model.

        Raises:
            RequestError: either is refused, the model has no such layer, or both change one W_out
                in a way that does not add up.
        """
        first = self._fitted(self.first, self.first_layer, "first", model, facts, site)
        with first.applied(model):
            then = self._fitted(self.then, self.then_layer, "then", model, facts, site)
        check_apart(first, then)
        return Composition(
            change=together(first, then),
            model=model.fingerprint,
            parts=(first, then),
            diagnostics=apart(first.diagnostics, then.diagnostics),
        )

    def _fitted(
        self,
        method: Method,
        layer: int | None,
        name: str,
        model: ModelHandle,
        facts: Splits,
        site: Site,
    ) -> Intervention:
        if layer is not None:
            number = model.check_layer(layer, f"intervene.{name}_layer")
            site = Site(number, method.part)  # type: ignore[arg-type]
        return method.fit(model, facts, site)


def check_apart(first: Intervention, then: Intervention) -> None:
    """Refuse two changes of one W_out of which the second does not meet the first, or not pass it.

    Raises:
        RequestError: an eraser is folded into a W_out whose independent edits are in no weight; or
            W_out is changed below an eraser of what it gives.
    """
    own = {each.layer for each in first.differences() if each.independent}
    folded = {
        each.change.layer
        for each in leaves(then)
        if isinstance(each, WeightDeltas) and each.change.scope == "relation"
    }
    for layer in own & folded:
        raise RequestError(
            "expected an eraser folded into another W_out than that of independent edits, found "
            f"both at layer {layer}: no weight holds the edits; set protocol=batch or another "
            "layer"
        )
    erased = {
        each.change.layer
        for each in leaves(first)
        if isinstance(each, Erasure) and each.change.part == "mlp"
    }
    for layer in {each.layer for each in then.differences()} & erased:
        raise RequestError(
            "expected W_out to be changed at another layer than what it gives is erased at, found "
            f"both at layer {layer}: what is written would pass the eraser; set another layer, "
            "or erase at part=residual"
        )


def leaves(intervention: Intervention) -> Iterator[Intervention]:
    """What an intervention is made of, itself if it has no parts."""
    if not isinstance(intervention, Parts):
        yield intervention
        return
    for part in intervention.parts:
        yield from leaves(part)


THEN = ", then"
"""Behind the protocol of a second method's row that the first method has as well."""


def apart(first: Iterable[Row], then: Iterable[Row]) -> tuple[Row, ...]:
    """Both methods' rows, no two under one key.

    Two erasers at one layer, or two editors of one fact, measure the same of their own fits.
    """
    rows = {_named(row): row for row in first}
    for row in then:
        while _named(row) in rows:
            row = replace(row, protocol=row.protocol + THEN)
        rows[_named(row)] = row
    return tuple(rows.values())


def _named(row: Row) -> Row:
    return replace(row, value=None, n=0, note=None)


def together(first: Intervention, then: Intervention) -> Change:
    """What the ruler may know of both changes."""
    changes = [first.change, then.change]
    policies = {change.policy for change in changes}
    return replace(
        joined([first, then]),
        scope="relation" if any(c.scope == "relation" for c in changes) else "fact",
        independent=any(change.independent for change in changes),
        policy=policies.pop() if len(policies) == 1 else "all",
        gated=any(change.oracle for change in changes),
    )
