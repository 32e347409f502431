"""Causal tracing in numbers: views of finished runs of `palimpsest trace`.

Meng et al. 2022 (arXiv 2202.05262, section 2). The indirect effect of a state is what restoring it
brings back of the true object's probability; its average over facts (AIE) is told for each group of
positions and each layer.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.record.row import Row
from palimpsest.record.store import Run
from palimpsest.study.intervals import Estimate, Floats, estimate
from palimpsest.study.labels import labels

GROUPS = {
    "first_subject": "first subject token",
    "middle_subject": "middle subject tokens",
    "last_subject": "last subject token",
    "first_subsequent": "first subsequent token",
    "further": "further tokens",
    "last_prompt": "last prompt token",
}
"""The groups of positions in the order of the prompt, in words."""

EFFECTS = {
    "clean_probability": "clean probability",
    "corrupted_probability": "corrupted probability",
    "total_effect": "total effect",
}
"""What is told once for a corruption, in words."""

MAX_FACTS = 12
"""Facts with a heat map of their own; rows.parquet holds the others."""

_KINDS = {
    "residual": "hidden state",
    "mlp_window": "MLP output",
    "attention_window": "attention output",
    "residual_mlp_severed": "hidden state, MLPs severed",
    "residual_attention_severed": "hidden state, attention severed",
}
_CORRUPTIONS = {"noise": "noise", "other_subject": "another subject"}
_EFFECT = "indirect_effect"
_TOKEN = re.compile(r"token/(\d+)")

Curves = Mapping[str, Mapping[int, Estimate]]
"""AIE by position group, then by layer; only where there is a value."""

Cells = Mapping[tuple[int, int], float]
"""One fact's indirect effects by token and layer; only where there is a value."""


@dataclass(frozen=True)
class TraceView:
    """One run of causal tracing in numbers.

    A protocol is a corruption and what was restored, as in the rows: `noise/mlp_window_10`.

    Attributes:
        run: the run.
        label: its name among the runs viewed with it; distinct.
        corruptions: those of the run.
        protocols: those of the run with a value, in the order of figures.
        layers: restored blocks, or centres of restored windows, that have a value.
        effects: clean and corrupted probability and total effect, by metric and corruption.
        curves: AIE by protocol.
        cells: by fact id, then by protocol; of facts whose tokens were traced one by one.
    """

    run: Run
    label: str
    corruptions: tuple[str, ...]
    protocols: tuple[str, ...]
    layers: tuple[int, ...]
    effects: Mapping[tuple[str, str], Estimate]
    curves: Mapping[str, Curves]
    cells: Mapping[str, Mapping[str, Cells]]

    @property
    def groups(self) -> tuple[str, ...]:
        """The position groups with a value, in the order of the prompt."""
        found = {group for curves in self.curves.values() for group in curves}
        return tuple(group for group in GROUPS if group in found)

    def title(self, protocol: str) -> str:
        """A protocol in words; the corruption only where the run has several."""
        corruption, kind = split(protocol)
        text = kind_text(kind)
        return f"{text} ({corruption_text(corruption)})" if len(self.corruptions) > 1 else text


@dataclass(frozen=True, slots=True)
class TracedFact:
    """One fact whose tokens were traced one by one.

    Attributes:
        fact: as facts.json tells it.
        tokens: the texts of its tokens.
        subject: first and last index of the subject's tokens, both inclusive.
        clean: probability of the object's first token after the prompt; None if not measured.
        corrupted: the same by corruption.
        maps: indirect effects by protocol, `[tokens, layers]`, NaN where there is none.
    """

    fact: Mapping[str, Any]
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    clean: float | None
    corrupted: Mapping[str, float]
    maps: Mapping[str, Floats]


@dataclass(frozen=True, slots=True)
class Peak:
    """Where the AIE of a protocol is largest.

    Attributes:
        group: the position group.
        layer: the restored block, or the centre of the restored window.
        estimate: the AIE there; its interval takes the place as given.
    """

    group: str
    layer: int
    estimate: Estimate


def is_trace(run: Run) -> bool:
    """Whether a run traced facts instead of changing them."""
    return run.method == "trace"


def views(runs: Sequence[Run]) -> list[TraceView]:
    """One view of each run of causal tracing, in the given order; other runs are left out."""
    found = [run for run in runs if is_trace(run)]
    return [_view(run, label) for run, label in zip(found, labels(found), strict=True)]


def split(protocol: str) -> tuple[str, str]:
    """A protocol's corruption and what it restores."""
    corruption, _, kind = protocol.partition("/")
    return corruption, kind


def kind_text(kind: str) -> str:
    """What is restored, in words, e.g. `MLP output, window of 10`."""
    name, _, size = kind.rpartition("_")
    if size.isdigit() and name in _KINDS:
        return f"{_KINDS[name]}, window of {size}"
    return _KINDS.get(kind, kind.replace("_", " "))


def corruption_text(corruption: str) -> str:
    """How the subject is corrupted, in words."""
    return _CORRUPTIONS.get(corruption, corruption.replace("_", " "))


def average_map(view: TraceView, protocol: str) -> Floats:
    """AIE of a protocol, `[groups, layers]`, NaN where there is none."""
    found = np.full((len(view.groups), len(view.layers)), np.nan)
    for row, group in enumerate(view.groups):
        for layer, value in view.curves[protocol].get(group, {}).items():
            found[row, view.layers.index(layer)] = value.value
    return found


def band(curve: Mapping[int, Estimate]) -> tuple[list[int], list[float], list[float]]:
    """The layers of a curve that have an interval, and its lower and upper ends there."""
    found = [(k, e.low, e.high) for k, e in curve.items() if e.low is not None]
    return (
        [layer for layer, _, _ in found],
        [low for _, low, _ in found],
        [high for _, _, high in found if high is not None],
    )


def peak(view: TraceView, protocol: str, group: str | None = None) -> Peak | None:
    """Where the AIE of a protocol is largest: anywhere, or within one group of positions.

    Late blocks at the last token give most of the total effect back by construction: there the
    largest AIE of hidden states usually is, whatever happens at the subject.

    Returns:
        The place and its AIE; None where no such position was traced.
    """
    curves = view.curves[protocol]
    groups = curves if group is None else curves.keys() & {group}
    found = [Peak(name, layer, e) for name in groups for layer, e in curves[name].items()]
    return max(found, key=lambda peak: peak.estimate.value or 0.0, default=None)


def fact_map(view: TraceView, fact: Mapping[str, Any], protocol: str) -> Floats:
    """A fact's indirect effects, `[tokens, layers]`, NaN where there is none."""
    found = np.full((len(fact["tokens"]), len(view.layers)), np.nan)
    for (token, layer), value in view.cells[fact["fact_id"]].get(protocol, {}).items():
        found[token, view.layers.index(layer)] = value
    return found


def traced_facts(view: TraceView) -> list[TracedFact]:
    """The facts with a heat map: the first of those whose tokens were traced one by one."""
    traced = [fact for fact in view.run.facts if fact["fact_id"] in view.cells]
    return [_traced_fact(view, fact) for fact in traced[:MAX_FACTS]]


def hidden_facts(view: TraceView) -> int:
    """How many facts have values for their tokens and no heat map of their own."""
    return max(len(view.cells) - MAX_FACTS, 0)


def aie_rows(view: TraceView) -> list[tuple[str, str, str, int, Estimate]]:
    """AIE by corruption, kind, position group and layer."""
    return [
        (*split(protocol), group, layer, found)
        for protocol, curves in view.curves.items()
        for group, by_layer in curves.items()
        for layer, found in by_layer.items()
    ]


def to_csv(found: Sequence[TraceView]) -> str:
    """One line per run, kind, position group and layer: AIE, interval and number of facts."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    place = ["label", "run_id", "corruption", "kind", "position", "layer"]
    writer.writerow([*place, "value", "low", "high", "n", "note"])
    for view in found:
        for *where, e in aie_rows(view):
            identity = [view.label, view.run.run_id]
            writer.writerow([*identity, *where, e.value, e.low, e.high, e.n, e.note])
    return text.getvalue()


def _view(run: Run, label: str) -> TraceView:
    rows = [row for row in run.rows if row.metric == _EFFECT]
    measured = {(row.protocol, row.layer) for row in rows if row.value is not None}
    protocols = sorted({protocol for protocol, _ in measured}, key=_order)
    corruptions = dict.fromkeys(row.protocol for row in run.rows if row.metric in EFFECTS)
    curves = _curves(rows)
    return TraceView(
        run=run,
        label=label,
        corruptions=tuple(corruptions),
        protocols=tuple(protocols),
        layers=tuple(sorted({layer for _, layer in measured if layer is not None})),
        effects={(m, c): estimate(run.select(m, c)) for m in EFFECTS for c in corruptions},
        curves={protocol: curves.get(protocol, {}) for protocol in protocols},
        cells=_cells(rows),
    )


def _order(protocol: str) -> tuple[str, int, str]:
    """A key that puts what is restored in the order of figures."""
    corruption, kind = split(protocol)
    name = kind if kind in _KINDS else kind.rpartition("_")[0]
    places = list(_KINDS)
    return corruption, places.index(name) if name in places else len(places), kind


def _curves(rows: Sequence[Row]) -> dict[str, Curves]:
    """AIE of the named groups of positions, by protocol, in the order of the prompt."""
    found: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in rows:
        if row.position in GROUPS and row.layer is not None:
            layers = found.setdefault((row.protocol, row.position), {})
            layers.setdefault(row.layer, []).append(row)
    curves: dict[str, dict[str, Mapping[int, Estimate]]] = {}
    for protocol, group in sorted(found, key=lambda key: list(GROUPS).index(key[1])):
        layers = found[protocol, group]
        estimates = {layer: estimate(layers[layer]) for layer in sorted(layers)}
        if present := {k: e for k, e in estimates.items() if e.value is not None}:
            curves.setdefault(protocol, {})[group] = present
    return dict(curves)


def _cells(rows: Sequence[Row]) -> dict[str, dict[str, dict[tuple[int, int], float]]]:
    found: dict[str, dict[str, dict[tuple[int, int], float]]] = {}
    for row in rows:
        token = _TOKEN.fullmatch(row.position or "")
        if token and row.fact_id is not None and row.layer is not None and row.value is not None:
            cells = found.setdefault(row.fact_id, {}).setdefault(row.protocol, {})
            cells[int(token[1]), row.layer] = row.value
    return found


def _traced_fact(view: TraceView, fact: Mapping[str, Any]) -> TracedFact:
    first, last = fact["subject_tokens"]
    chances = {c: _of_fact(view.run, "clean_probability", c, fact) for c in view.corruptions}
    corrupted = {c: _of_fact(view.run, "corrupted_probability", c, fact) for c in view.corruptions}
    return TracedFact(
        fact=fact,
        tokens=tuple(fact["tokens"]),
        subject=(first, last),
        clean=next((p for p in chances.values() if p is not None), None),
        corrupted={c: p for c, p in corrupted.items() if p is not None},
        maps={protocol: fact_map(view, fact, protocol) for protocol in view.protocols},
    )


def _of_fact(run: Run, metric: str, corruption: str, fact: Mapping[str, Any]) -> float | None:
    rows = run.select(metric, corruption, fact_id=fact["fact_id"])
    return rows[0].value if rows else None
