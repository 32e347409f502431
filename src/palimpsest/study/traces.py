"""Causal tracing in numbers: views of finished runs of `palimpsest trace`.

Meng et al. 2022 (arXiv 2202.05262, section 2). The indirect effect of a state is what restoring it
brings back of the true object's probability; its average over facts (AIE) is told for each group of
positions and each layer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from palimpsest.record.results import Results, Run, sql_text
from palimpsest.study.columns import NOT_MEASURED
from palimpsest.study.comparable import compared
from palimpsest.study.intervals import Estimate, Floats
from palimpsest.study.labels import labels
from palimpsest.study.samples import measured
from palimpsest.study.summary import TRACE

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
        chances: the same as `effects` of single facts, by metric, corruption and fact id.
    """

    run: Run
    label: str
    corruptions: tuple[str, ...]
    protocols: tuple[str, ...]
    layers: tuple[int, ...]
    effects: Mapping[tuple[str, str], Estimate]
    curves: Mapping[str, Curves]
    cells: Mapping[str, Mapping[str, Cells]]
    chances: Mapping[tuple[str, str, str], float | None]

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
    return run.method == TRACE


@lru_cache(maxsize=2)
def views(results: Results) -> tuple[TraceView, ...]:
    """One view of each run of causal tracing; other runs are left out."""
    found = [run for run in results.runs if is_trace(run)]
    named = zip(found, labels(found), strict=True)
    return tuple(_view(results, run, label) for run, label in named)


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


def _view(results: Results, run: Run, label: str) -> TraceView:
    compared(results)
    own = f"run_id = {sql_text(run.run_id)}"
    effects = f"{own} AND metric IN ({', '.join(map(sql_text, EFFECTS))})"
    corruptions = [
        corruption
        for (corruption,) in results.query(
            f"SELECT protocol FROM compared WHERE {effects} GROUP BY ALL "
            "ORDER BY min(axis || metric), protocol"
        )
    ]
    means = {key[1:]: value for key, value in measured(results, effects, _KINDS_OF).items()}
    traced = results.query(
        f"SELECT DISTINCT protocol, layer FROM compared WHERE {own} "
        f"AND metric = {sql_text(_EFFECT)} AND value IS NOT NULL"
    )
    protocols = sorted({protocol for protocol, _ in traced}, key=_order)
    curves = _curves(results, own)
    return TraceView(
        run=run,
        label=label,
        corruptions=tuple(corruptions),
        protocols=tuple(protocols),
        layers=tuple(sorted({layer for _, layer in traced if layer is not None})),
        effects={(m, c): means.get((m, c), NOT_MEASURED) for m in EFFECTS for c in corruptions},
        curves={protocol: curves.get(protocol, {}) for protocol in protocols},
        cells=_cells(results, own),
        chances=_chances(results, effects),
    )


_KINDS_OF = ("metric", "protocol")


def _chances(results: Results, condition: str) -> dict[tuple[str, str, str], float | None]:
    records = results.query(
        f"SELECT metric, protocol, fact_id, first(value) FROM compared WHERE {condition} "
        "AND fact_id IS NOT NULL GROUP BY ALL"
    )
    return {(metric, corruption, fact): value for metric, corruption, fact, value in records}


def _order(protocol: str) -> tuple[str, int, str]:
    """A key that puts what is restored in the order of figures."""
    corruption, kind = split(protocol)
    name = kind if kind in _KINDS else kind.rpartition("_")[0]
    places = list(_KINDS)
    return corruption, places.index(name) if name in places else len(places), kind


def _curves(results: Results, own: str) -> dict[str, Curves]:
    """AIE of the named groups of positions, by protocol, in the order of the prompt."""
    groups = ", ".join(map(sql_text, GROUPS))
    condition = (
        f"{own} AND metric = {sql_text(_EFFECT)} AND position IN ({groups}) AND layer IS NOT NULL"
    )
    found = measured(results, condition, ["protocol", "position", "layer"])
    order = {group: place for place, group in enumerate(GROUPS)}
    curves: dict[str, dict[str, dict[int, Estimate]]] = {}
    for key, value in sorted(found.items(), key=lambda item: (order[item[0][2]], *item[0][1:])):
        _, protocol, group, layer = key
        if value.value is not None:
            curves.setdefault(protocol, {}).setdefault(group, {})[layer] = value
    return dict(curves)


def _cells(results: Results, own: str) -> dict[str, dict[str, dict[tuple[int, int], float]]]:
    found: dict[str, dict[str, dict[tuple[int, int], float]]] = {}
    for fact, protocol, position, layer, value in results.query(
        f"SELECT fact_id, protocol, position, layer, value FROM compared WHERE {own} "
        f"AND metric = {sql_text(_EFFECT)} AND fact_id IS NOT NULL AND layer IS NOT NULL "
        "AND value IS NOT NULL AND starts_with(position, 'token/')"
    ):
        if token := _TOKEN.fullmatch(position):
            found.setdefault(fact, {}).setdefault(protocol, {})[int(token[1]), layer] = value
    return found


def _traced_fact(view: TraceView, fact: Mapping[str, Any]) -> TracedFact:
    first, last = fact["subject_tokens"]
    name = fact["fact_id"]
    chances = {c: view.chances.get(("clean_probability", c, name)) for c in view.corruptions}
    corrupted = {c: view.chances.get(("corrupted_probability", c, name)) for c in view.corruptions}
    return TracedFact(
        fact=fact,
        tokens=tuple(fact["tokens"]),
        subject=(first, last),
        clean=next((p for p in chances.values() if p is not None), None),
        corrupted={c: p for c, p in corrupted.items() if p is not None},
        maps={protocol: fact_map(view, fact, protocol) for protocol in view.protocols},
    )
