"""Does tracing tell where to erase? Erasers at several layers against traces of the same model.

An eraser has one site for all facts of a relation, so what can be compared is layers, not facts:
over the layers, the average indirect effect at a layer against what erasing there removed and cost.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np

from palimpsest.record.results import Results, Run, sql_text
from palimpsest.study.comparable import asked, compared
from palimpsest.study.intervals import STEADY, Estimate, Floats, ends, resampling
from palimpsest.study.localization import among, layer_of, protocols_of, traces_of
from palimpsest.study.ranks import spearman
from palimpsest.study.study import Block, Study
from palimpsest.study.table import SHOWN, Heading, Line, Table
from palimpsest.study.traces import is_trace

POSITIONS = ("last_subject", "last_prompt")
"""Groups of tokens whose effects are compared."""

FEWEST = 4
"""Layers below which a rank correlation says nothing."""

_EXACT = 7
_DRAWS = 5000
_SEED = 20_230_603
_ROUNDING = 1e-9

ByLayer = Mapping[int, Mapping[str, float]]
"""By layer and fact, a number."""

_CAPTION = (
    "Over the layers that were traced and erased at: Spearman’s correlation of the average "
    "indirect effect with what erasing at that layer brought, a mean over facts that no fit has "
    "seen. Removed from probes: what probes trained anew after the erasure lose at the deepest "
    "measured layer; answers removed: what the model no longer says of the relation; cost "
    "elsewhere: what it no longer says of other relations. Small type: 95% intervals, facts "
    "resampled, conditional on these layers; p: the permutation test over layers, conditional on "
    "these facts. The two answer different questions and may disagree; with many lines some p are "
    "small by chance. "
    "erasing.csv has the values by layer too."
)


@dataclass(frozen=True)
class Erasing(Study):
    """Whether layers with larger tracing effects are those where erasing does more."""

    def read(self, results: Results) -> Sequence[Block]:
        """A line for each eraser, kind of traced state and outcome; nothing without both."""
        found = agreements(results)
        return [_shown(found), _listed(found)] if found else ()


@dataclass(frozen=True)
class Outcome:
    """What erasing at a layer brought.

    Attributes:
        name: what it is called.
        rows: the condition of the rows that it is made of, as SQL; more is better for who asks the
            facts.
        deepest: whether only the deepest measured layer counts.
    """

    name: str
    rows: str
    deepest: bool = False


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
            the traced and the held-out facts, conditional on the layers; no interval where nearly
            all resamples order the layers alike.
        p: two-sided, of the permutation test over layers, conditional on the facts; None without a
            correlation.
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


def agreements(results: Results) -> list[Agreement]:
    """One for each eraser and seed, kind of traced state, position and outcome.

    Erasers count that were run at four traced layers or more, beside the run of `none` on the same
    facts. Probes are those trained anew after the erasure, on fresh subjects, at the deepest
    measured layer: what the rest of the model can still use.
    """
    traced = [run for run in results.runs if is_trace(run)]
    erased = _erasures(results) if traced else []
    found: list[Agreement] = []
    for key in sorted({_key(run) for run in erased}):
        group = {layer_of(run): run for run in erased if _key(run) == key}
        first = next(iter(group.values()))
        before = [r for r in results.runs if r.method == "none" and asked(r) == asked(first)]
        shown = traces_of(results, first)
        if before and shown:
            found += _agreements(results, key, group, before[0], shown)
    return found


def _agreements(
    results: Results,
    key: tuple[str, int],
    group: Mapping[int, Run],
    unchanged: Run,
    traced: Sequence[Run],
) -> Iterator[Agreement]:
    values = {outcome.name: _outcomes(results, outcome) for outcome in OUTCOMES}
    kinds = protocols_of(results, traced)
    for protocol, position, outcome in product(kinds, POSITIONS, OUTCOMES):
        effects = _effects(results, traced, protocol, position)
        before = values[outcome.name].get(unchanged.run_id, {})
        after = {n: values[outcome.name].get(run.run_id, {}) for n, run in group.items()}
        brought = {n: _brought(before, found) for n, found in after.items()}
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


def correlated(effects: ByLayer, outcomes: ByLayer) -> tuple[Estimate, float | None]:
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
    value = float(spearman(effect[None], outcome[None])[0])
    if not np.isfinite(value):
        return Estimate(None, n=n, note="the same value at every layer"), None
    drawn = spearman(effects_drawn, outcomes_drawn)
    drawn = drawn[np.isfinite(drawn)]
    low, high = ends(drawn)
    note = None if low is not None else STEADY
    orders = np.array(list(permutations(range(n)))) if n <= _EXACT else _orders(n)
    others = spearman(np.broadcast_to(effect, orders.shape), outcome[orders])
    p = float(np.mean(np.abs(others) >= abs(value) - _ROUNDING))
    return Estimate(value, low, high, n, note), p


def _orders(n: int) -> Any:
    """Random orders of n layers, the given one first."""
    generator = np.random.default_rng(_SEED)
    return np.stack([np.arange(n), *(generator.permutation(n) for _ in range(_DRAWS - 1))])


def _resampled(table: ByLayer) -> tuple[Floats, Floats]:
    """Means over facts by layer, `[layers]` and `[resamples, layers]`.

    Facts that lack a layer are left out.
    """
    layers = sorted(table)
    facts = sorted(set.intersection(*(set(table[layer]) for layer in layers)))
    values = np.array([[table[layer][fact] for fact in facts] for layer in layers])
    weights = resampling(tuple(None for _ in facts))
    means, drawn = values.mean(1), weights @ values.T / weights.sum(1, keepdims=True)
    return means.round(9), drawn.round(9)  # equal but for rounding is a tie


def _means(table: ByLayer) -> dict[int, float]:
    return {layer: float(np.mean(list(values.values()))) for layer, values in table.items()}


def _effects(results: Results, traced: Sequence[Run], protocol: str, position: str) -> ByLayer:
    """Indirect effects by layer and fact; a fact's tokens of one group averaged."""
    compared(results)
    return _by_layer(
        results,
        f"SELECT layer, fact_id, avg(value) FROM compared WHERE {among(traced)} "
        f"AND metric = 'indirect_effect' AND protocol = {sql_text(protocol)} "
        f"AND position = {sql_text(position)} AND value IS NOT NULL AND layer IS NOT NULL "
        "AND fact_id IS NOT NULL GROUP BY ALL ORDER BY ALL",
    )


def _by_layer(results: Results, query: str) -> dict[Any, dict[str, float]]:
    found: dict[Any, dict[str, float]] = {}
    for group, fact, value in results.query(query):
        found.setdefault(group, {})[fact] = value
    return found


def _outcomes(results: Results, outcome: Outcome) -> dict[str, dict[str, float]]:
    """What an outcome is made of, by run and fact."""
    compared(results)
    deepest = "QUALIFY layer IS NOT DISTINCT FROM max(layer) OVER (PARTITION BY run_id)"
    return _by_layer(
        results,
        f"WITH found AS (SELECT * FROM compared WHERE {outcome.rows} "
        f"{deepest if outcome.deepest else ''}) "
        "SELECT run_id, fact_id, last(value ORDER BY prompt_id NULLS FIRST) FROM found "
        "WHERE value IS NOT NULL AND fact_id IS NOT NULL AND alike GROUP BY ALL ORDER BY ALL",
    )


def _brought(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Unchanged less erased, by fact."""
    return {fact: before[fact] - value for fact, value in after.items() if fact in before}


OUTCOMES = (
    Outcome(
        "probe removed",
        "metric = 'probe_accuracy' AND protocol = 'retrained' AND split = 'test' "
        "AND position = 'last_prompt'",
        deepest=True,
    ),
    Outcome("answers removed", "metric = 'relation_accuracy' AND protocol = 'vocabulary'"),
    Outcome("cost elsewhere", "metric = 'other_accuracy' AND protocol = 'vocabulary'"),
)
"""On facts that no fit has seen: what a fresh probe reads, what the model says of the relation's
test subjects, and what it says of other relations."""


def _erasures(results: Results) -> list[Run]:
    """Runs that erased facts of a relation at one site, by a method and no control."""
    scopes = dict(
        results.query(
            "SELECT run_id, list(DISTINCT scope) FROM rows WHERE axis = 'downstream' GROUP BY ALL"
        )
    )
    return [
        run
        for run in results.runs
        if not is_trace(run)
        and run.run.get("site") is not None
        and not run.run.get("imitates")
        and scopes.get(run.run_id) == ["relation"]
    ]


def _key(run: Run) -> tuple[str, int]:
    return run.method, int(run.run.get("seed") or 0)


def _shown(found: Sequence[Agreement]) -> Table:
    """A line for each agreement."""
    names = ("eraser", "seed", "traced", "at", "outcome", "layers")
    return Table(
        name="erasing",
        title="Does localization tell where to erase?",
        caption=_CAPTION,
        headings=[
            *(Heading(title=name, style="words") for name in names),
            Heading(title="rank correlation", style="decimals"),
            Heading(title="p", style="decimals"),
        ],
        lines=[
            Line((e.method, e.seed, e.protocol, e.position, e.outcome, e.correlation.n,
                  e.correlation, e.p))
            for e in found
        ],
        footnotes=False,
        views=SHOWN,
    )  # fmt: skip


def _listed(found: Sequence[Agreement]) -> Table:
    """One line for each agreement, and one for each of its layers."""
    names = ("method", "seed", "traced", "position", "outcome", "layers")
    lines = []
    for e in found:
        name = (e.method, e.seed, e.protocol, e.position, e.outcome)
        lines.append(Line((*name, e.correlation.n, e.correlation, e.p, None, None, None)))
        for layer, effect in e.effects.items():
            lines.append(Line((*name, None, None, None, layer, effect, e.outcomes[layer])))
    return Table(
        name="erasing",
        headings=[
            *(Heading(title=name, style="words") for name in names),
            Heading(title="correlation", parts=("correlation", "low", "high")),
            *(Heading(title=name, style="words") for name in ("p", "layer", "effect", "value")),
        ],
        lines=lines,
        views=("csv",),
    )
