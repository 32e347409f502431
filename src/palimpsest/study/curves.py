"""Curves: what was measured layer by layer, for many runs at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.record.results import Results
from palimpsest.study.intervals import Estimate, estimates
from palimpsest.study.samples import Key, picked, samples


@dataclass(frozen=True, slots=True)
class Point:
    """One layer of a curve.

    Attributes:
        layer: the block after which the state was read; -1 is the embedding output.
        estimate: the value there.
        upstream: whether the change cannot reach it.
    """

    layer: int
    estimate: Estimate
    upstream: bool


def curves(results: Results, condition: str, by: Sequence[str] = ()) -> dict[Key, list[Point]]:
    """The values of some rows by layer; layers without any value are left out.

    Args:
        results: the runs.
        condition: SQL; rows that meet it and have a layer.
        by: columns that tell curves apart.

    Returns:
        by run id and the values of `by`.
    """
    rows = picked(f"({condition}) AND layer IS NOT NULL", *by, "layer")
    found = samples(results, rows, [*by, "layer"], by)
    values = estimates({key: sample for key, sample in found.items() if sample.present})
    made: dict[Key, list[Point]] = {}
    for key, value in values.items():
        *whose, layer = key
        made.setdefault(tuple(whose), []).append(Point(layer, value, found[key].upstream))
    return {key: sorted(points, key=lambda point: point.layer) for key, points in made.items()}
