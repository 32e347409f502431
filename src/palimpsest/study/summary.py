"""Headline numbers of runs: one summary each, ordered for reading."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palimpsest.record.row import Row
from palimpsest.record.store import Run
from palimpsest.study.columns import HEADLINE, last_step
from palimpsest.study.intervals import Estimate, estimate
from palimpsest.study.labels import labels
from palimpsest.study.recoverable import ZONES, profile


@dataclass(frozen=True)
class Summary:
    """One run in numbers.

    Attributes:
        run: the run.
        label: its name among the runs summarised with it; distinct.
        n_facts: facts that the method was to change, those that it failed on included.
        failed: by fact id, why the method could not change that fact; its values are missing.
        imitates: label (or name) of the run that this control imitates; None if it is no control.
        scopes: what the method changed: `fact`, `relation`.
        oracle_gate: whether the method was told where the subject stands or which prompts matter.
        values: the headline numbers, by column key.
    """

    run: Run
    label: str
    n_facts: int
    failed: Mapping[str, str]
    imitates: str | None
    scopes: tuple[str, ...]
    oracle_gate: bool
    values: Mapping[str, Estimate]

    @property
    def method(self) -> str:
        """The method's name."""
        return self.run.method

    @property
    def failure(self) -> str:
        """How many facts the method failed on, and why; empty if on none."""
        if not self.failed:
            return ""
        causes = "; ".join(dict.fromkeys(self.failed.values()))
        count = f"{len(self.failed):,} of {self.n_facts:,} facts failed"
        return f"{count} ({causes}). They are in no value, and n counts the others."


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


@dataclass(frozen=True, slots=True)
class Detail:
    """One measured quantity of all runs.

    Attributes:
        axis: its panel.
        metric: its name.
        protocol: its definition's name.
        place: what else tells it apart: split, kind of prompt, layer, budget.
        values: one estimate per summary, in order; None where a run has no such row.
    """

    axis: str
    metric: str
    protocol: str
    place: str
    values: tuple[Estimate | None, ...]


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """One summary per run: `none` first, then methods by label, each followed by its controls."""
    named = list(zip(runs, labels(runs), strict=True))
    summaries = [_summary(run, label, named) for run, label in named]
    return sorted(summaries, key=_reading_order)


def curve(rows: Sequence[Row]) -> list[Point]:
    """The values of a quantity by layer; layers without any value are left out."""
    layers: dict[int, list[Row]] = {}
    for row in last_step(rows):
        if row.layer is not None:
            layers.setdefault(row.layer, []).append(row)
    points = [
        Point(layer, estimate(found), all(row.upstream for row in found if row.value is not None))
        for layer, found in sorted(layers.items())
    ]
    return [point for point in points if point.estimate.value is not None]


def details(summaries: Sequence[Summary]) -> list[Detail]:
    """Every measured quantity that is not a curve over layers, averaged over facts.

    What is recoverable, zone by zone, leads them.
    """
    tables = [_quantities(summary.run) for summary in summaries]
    order = {axis: place for place, axis in enumerate(_AXES)}
    keys = sorted({key for table in tables for key in table}, key=lambda k: (order[k[0]], k))
    measured = [
        Detail(*key, tuple(estimate(t[key]) if key in t else None for t in tables)) for key in keys
    ]
    return [*_profiles(summaries), *measured]


def _profiles(summaries: Sequence[Summary]) -> Iterator[Detail]:
    """What is recoverable upstream of each run's change, at its site, downstream, and by asking."""
    found = [profile(summary.run) for summary in summaries]
    for zone in ZONES:
        if any(zone in each for each in found):
            values = tuple(each.get(zone) for each in found)
            yield Detail("recoverability", "recoverable_old", "index", zone, values)


_AXES = ("downstream", "recoverability", "consistency", "localization", "cost")
_QuantityKey = tuple[str, str, str, str]


def _summary(run: Run, label: str, named: Sequence[tuple[Run, str]]) -> Summary:
    return Summary(
        run=run,
        label=label,
        n_facts=_n_facts(run),
        failed=_failed(run),
        imitates=_imitated(run, named),
        scopes=tuple(sorted({row.scope for row in run.rows})),
        oracle_gate=any(row.note is not None and "oracle_gate" in row.note for row in run.rows),
        values={column.key: column.read(run) for column in HEADLINE},
    )


def _n_facts(run: Run) -> int:
    targets = {row.fact_id for row in run.rows if row.split == "target" and row.fact_id is not None}
    return len(targets) or len(run.facts)


def _failed(run: Run) -> dict[str, str]:
    """The target facts of which nothing downstream has a value, with the cause."""
    targets = [r for r in run.rows if r.axis == "downstream" and r.split == "target"]
    rows = [r for r in last_step(targets) if r.fact_id is not None]
    measured = {r.fact_id for r in rows if r.value is not None}
    missing = {str(r.fact_id): r.note for r in rows if r.fact_id not in measured}
    return {fact: note or "no cause given" for fact, note in missing.items()}


def _imitated(run: Run, named: Sequence[tuple[Run, str]]) -> str | None:
    """The label of the run named by `imitates` (its run_id, or its method if there is only one)."""
    wanted = run.run.get("imitates")
    if not wanted:
        return None
    by_id = [label for other, label in named if other.run_id == wanted]
    by_method = [label for other, label in named if other.method == wanted]
    found = by_id or by_method
    return found[0] if len(found) == 1 else str(wanted)


def _reading_order(summary: Summary) -> tuple[Any, ...]:
    control = summary.imitates is not None
    leader = _natural(summary.imitates or summary.label)
    return (summary.method != "none", leader, control, _natural(summary.label))


def _natural(label: str) -> list[tuple[bool, float, str]]:
    """A key that sorts the numbers in a label by size."""
    parts = re.split(r"(\d+(?:\.\d+)?)", label)
    return [(bool(i % 2), float(p) if i % 2 else 0.0, p) for i, p in enumerate(parts)]


def _quantities(run: Run) -> dict[_QuantityKey, list[Row]]:
    """A run's rows that are no curves, by what they measure; several layers stay apart."""
    rows = [r for r in run.rows if r.axis == "cost" or (r.layer is None and r.position is None)]
    layers: dict[str, set[int | None]] = {}
    for row in rows:
        layers.setdefault(row.metric, set()).add(row.layer)
    found: dict[_QuantityKey, list[Row]] = {}
    for row in rows:
        found.setdefault(_quantity(row, len(layers[row.metric]) > 1), []).append(row)
    return {key: last_step(group) for key, group in found.items()}


def _quantity(row: Row, by_layer: bool) -> _QuantityKey:
    kind = (row.prompt_id or "").partition("/")[0]
    parts = [
        row.split,
        "fit prompt, in-sample" if kind == "fit" else kind,
        f"layer {row.layer}" if by_layer and row.layer is not None else None,
        f"budget {row.budget}" if row.budget is not None else None,
    ]
    return (row.axis, row.metric, row.protocol, ", ".join(part for part in parts if part))
