"""Does tracing tell where to erase? Erasers at several layers against traces of the same model.

An eraser has one site for all facts of a relation, so what can be compared is layers, not facts:
over the layers, the average indirect effect at a layer against what erasing there removed and cost.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np
from scipy.stats import rankdata

from palimpsest.record.row import Row
from palimpsest.record.results import Run
from palimpsest.study.intervals import Estimate, Floats, resampling
from palimpsest.study.localization import asked, layer_of, model_of
from palimpsest.study.traces import is_trace

POSITIONS = ("last_subject", "last_prompt")
"""Groups of tokens whose effects are compared."""

FEWEST = 4
"""Layers below which a rank correlation says nothing."""

_EXACT = 7
_DRAWS = 5000
_SEED = 20_230_603
_ROUNDING = 1e-9
_NAMES = ("method", "seed", "traced", "position", "outcome", "layers", "correlation", "low", "high")

Table = Mapping[int, Mapping[str, float]]
"""By layer and fact, a number."""


@dataclass(frozen=True)
class Outcome:
    """What erasing at a layer brought.

    Attributes:
        name: what it is called.
        rows: of a run, those it is made of; more is better for who asks the facts.
    """

    name: str
    rows: Callable[[Run], list[Row]]


@dataclass(frozen=True)
class Agreement:
    """Whether layers with larger effects are those where erasing does more.

    Attributes:
        method: the eraser.
        seed: of its runs.
        protocol: of the traces, as `noise/attention_window_10`.
        position: the group of tokens whose effect is taken.
        outcome: what erasing brought: `probe removed`, `answers removed` or `cost elsewhere`.
        effects: AIE by layer.
        outcomes: by layer, the mean over held-out facts of unchanged less erased.
        correlation: Spearman's over layers, n being their number, with a bootstrap interval over
            the traced and the held-out facts.
        p: two-sided, of the permutation test over layers; None without a correlation.
    """

    method: str
    seed: int
    protocol: str
    position: str
    outcome: str
    effects: Mapping[int, float]
    outcomes: Mapping[int, float]
    correlation: Estimate
    p: float | None


def agreements(runs: Sequence[Run]) -> list[Agreement]:
    """One for each eraser and seed, kind of traced state, position and outcome.

    Erasers count that were run at four traced layers or more, beside the run of `none` on the same
    facts. Probes are those trained anew after the erasure, on fresh subjects, at the deepest
    measured layer: what the rest of the model can still use.
    """
    traced = [run for run in runs if is_trace(run)]
    erased = [run for run in runs if not is_trace(run) and _is_erasure(run)]
    found: list[Agreement] = []
    for key in sorted({_key(run) for run in erased}):
        group = {layer_of(run): run for run in erased if _key(run) == key}
        first = next(iter(group.values()))
        unchanged = [run for run in runs if run.method == "none" and asked(run) == asked(first)]
        shown = [run for run in traced if model_of(run) == model_of(first)]
        if unchanged:
            found += _agreements(key, group, unchanged[0], shown)
    return found


def _agreements(
    key: tuple[str, int], group: Mapping[int, Run], unchanged: Run, traced: Sequence[Run]
) -> Iterator[Agreement]:
    protocols = dict.fromkeys(
        row.protocol for run in traced for row in run.rows if row.metric == "indirect_effect"
    )
    for protocol, position, outcome in product(protocols, POSITIONS, OUTCOMES):
        effects = _effects(traced, protocol, position)
        brought = {layer: _brought(run, unchanged, outcome) for layer, run in group.items()}
        layers = sorted(layer for layer in brought if brought[layer] and layer in effects)
        if len(layers) < FEWEST:
            continue
        one, other = ({n: table[n] for n in layers} for table in (effects, brought))
        correlation, p = correlated(one, other)
        yield Agreement(
            *key,
            protocol=protocol,
            position=position,
            outcome=outcome.name,
            effects=_means(one),
            outcomes=_means(other),
            correlation=correlation,
            p=p,
        )


def correlated(effects: Table, outcomes: Table) -> tuple[Estimate, float | None]:
    """Spearman's correlation over layers of two means over facts, and its permutation test.

    The facts of either table are resampled by themselves; a fact keeps all its layers. Up to seven
    layers all their orders are tried, of more 5,000 at random.

    Args:
        effects: by layer and fact; the same layers as `outcomes`.
        outcomes: by layer and fact.
    """
    pairs = [_resampled(table) for table in (effects, outcomes)]
    (effect, effects_drawn), (outcome, outcomes_drawn) = pairs
    n = len(effect)
    value = float(_spearman(effect[None], outcome[None])[0])
    if not np.isfinite(value):
        return Estimate(None, n=n, note="the same value at every layer"), None
    drawn = _spearman(effects_drawn, outcomes_drawn)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    orders = np.array(list(permutations(range(n)))) if n <= _EXACT else _orders(n)
    others = _spearman(np.broadcast_to(effect, orders.shape), outcome[orders])
    p = float(np.mean(np.abs(others) >= abs(value) - _ROUNDING))
    return Estimate(value, float(low), float(high), n), p


def _orders(n: int) -> Any:
    """Random orders of n layers, the given one first."""
    generator = np.random.default_rng(_SEED)
    return np.stack([np.arange(n), *(generator.permutation(n) for _ in range(_DRAWS - 1))])


def _resampled(table: Table) -> tuple[Floats, Floats]:
    """Means over facts by layer, `[layers]` and `[resamples, layers]`.

    Facts that lack a layer are left out.
    """
    layers = sorted(table)
    facts = sorted(set.intersection(*(set(table[layer]) for layer in layers)))
    values = np.array([[table[layer][fact] for fact in facts] for layer in layers])
    weights = resampling(tuple(None for _ in facts))
    return values.mean(1), weights @ values.T / weights.sum(1, keepdims=True)


def _spearman(one: Floats, other: Floats) -> Floats:
    """Row by row; not a number where either is constant."""
    ranks = [rankdata(np.round(x, 9), axis=1) for x in (one, other)]
    a, b = (r - r.mean(1, keepdims=True) for r in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return found


def _means(table: Table) -> dict[int, float]:
    return {layer: float(np.mean(list(values.values()))) for layer, values in table.items()}


# -- what is compared ------------------------------------------------------------------------------


def _effects(traced: Sequence[Run], protocol: str, position: str) -> Table:
    """Indirect effects by layer and fact; a fact's tokens of one group averaged."""
    found: dict[int, dict[str, list[float]]] = {}
    for run in traced:
        for row in run.select("indirect_effect", protocol, position=position):
            if row.value is not None and row.layer is not None:
                found.setdefault(row.layer, {}).setdefault(str(row.fact_id), []).append(row.value)
    return {
        layer: {fact: float(np.mean(values)) for fact, values in facts.items()}
        for layer, facts in found.items()
    }


def _brought(run: Run, unchanged: Run, outcome: Outcome) -> dict[str, float]:
    """Unchanged less erased, by fact."""
    before, after = (_by_fact(outcome.rows(each)) for each in (unchanged, run))
    return {fact: before[fact] - value for fact, value in after.items() if fact in before}


def _by_fact(rows: Sequence[Row]) -> dict[str, float]:
    return {str(row.fact_id): row.value for row in rows if row.value is not None and row.fact_id}


def _read(run: Run) -> list[Row]:
    rows = run.select("probe_accuracy", "retrained", split="test", position="last_prompt")
    deepest = max((row.layer for row in rows if row.layer is not None), default=None)
    return [row for row in rows if row.layer == deepest]


OUTCOMES = (
    Outcome("probe removed", _read),
    Outcome("answers removed", lambda run: run.select("relation_accuracy", "vocabulary")),
    Outcome("cost elsewhere", lambda run: run.select("other_accuracy", "vocabulary")),
)
"""On facts that no fit has seen: what a fresh probe reads, what the model says of the relation's
test subjects, and what it says of other relations."""


def _is_erasure(run: Run) -> bool:
    """Whether facts of a relation were erased at one site, by a method and no control."""
    scopes = {row.scope for row in run.rows if row.axis == "downstream"}
    known = run.run.get("site") is not None and not run.run.get("imitates")
    return known and scopes == {"relation"}


def _key(run: Run) -> tuple[str, int]:
    return run.method, int(run.run.get("seed") or 0)


# -- as a table ------------------------------------------------------------------------------------


def to_csv(found: Sequence[Agreement]) -> str:
    """One line for each agreement, and one for each of its layers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_NAMES, "p", "layer", "effect", "value"])
    for each in found:
        name = [each.method, each.seed, each.protocol, each.position, each.outcome]
        value = each.correlation
        writer.writerow([*name, value.n, value.value, value.low, value.high, each.p, "", "", ""])
        for layer, effect in each.effects.items():
            writer.writerow([*name, *[""] * 5, layer, effect, each.outcomes[layer]])
    return text.getvalue()
