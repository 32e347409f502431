"""The undertext map: layer by token, how legible the old and the new object are, by method."""

from collections import defaultdict
from collections.abc import Mapping

from palimpsest.record.store import Run

METRICS = {"legibility_old": "old object", "legibility_new": "new object"}
"""What is read, and the headings of the columns."""

Map = Mapping[tuple[str, int], float]
"""A share by token group and layer."""


def undertext(run: Run, metric: str) -> Map:
    """The share of target facts whose object a probe names; relations weigh by their facts.

    Probes trained anew come before those of the unchanged model.
    """
    found = [row for row in run.rows if row.metric == metric and row.value is not None]
    anew = [row for row in found if row.protocol == "retrained"]
    sums: dict[tuple[str, int], float] = defaultdict(float)
    counts: dict[tuple[str, int], int] = defaultdict(int)
    for row in anew or found:
        place = row.position or "", row.layer or 0
        sums[place] += (row.value or 0.0) * row.n
        counts[place] += row.n
    return {place: total / counts[place] for place, total in sums.items()}
