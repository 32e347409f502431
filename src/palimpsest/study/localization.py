"""Does localization inform editing? Edits at several layers against traces of the same facts.

The question and its regressions are those of Hase, Bansal, Kim, Ghandeharioun 2023 (arXiv
2301.04213); `palimpsest.study.regression` has the statistics.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from palimpsest.record.results import Run
from palimpsest.study.regression import MARGIN, Observation, Study, study
from palimpsest.study.traces import is_trace

LEAST_EFFECT = 0.05
"""A fact whose total effect is below this has too little for a state to bring back."""

POSITION = "last_subject"
"""Where the effect is read: the token that editors write at."""

_FEWEST_FACTS, _FEWEST_LAYERS = 3, 2
_NAMES = ("method", "objective", "seed", "traced")
R2 = ("layer", "effect", "both", "corrected")
"""The R² of a study that views show."""


@dataclass(frozen=True)
class Finding:
    """What the effect of one kind of state tells of the success of one kind of edit.

    Attributes:
        method: the editor.
        objective: what it pursued: `inject`, `erase`, `amplify`, `force`, `trace_reversal`.
        seed: of its runs.
        protocol: of the traces, as `noise/mlp_window_10`.
        study: the regressions; None with the cause in `note`.
        left_out: facts with a total effect below `LEAST_EFFECT`.
        note: why there is no study.
    """

    method: str
    objective: str
    seed: int
    protocol: str
    study: Study | None
    left_out: int = 0
    note: str | None = None


def findings(runs: Sequence[Run], margin: float = MARGIN) -> list[Finding]:
    """One finding for each editor, objective and seed, and each kind of traced state.

    Edits count that changed facts one by one at one layer. Success is measured against the run of
    `none` on the same facts; without one, or without traces of the same model, there is nothing.

    Args:
        runs: finished runs of all kinds.
        margin: the increase of R² that matters.
    """
    traced = [run for run in runs if is_trace(run)]
    edits = [run for run in runs if not is_trace(run) and _is_edit(run)]
    found: list[Finding] = []
    for key in sorted({_key(run) for run in edits}):
        group = [run for run in edits if _key(run) == key]
        unchanged = [run for run in runs if run.method == "none" and asked(run) == asked(group[0])]
        shown = [run for run in traced if model_of(run) == model_of(group[0])]
        if len({layer_of(run) for run in group}) >= _FEWEST_LAYERS and unchanged:
            found += _findings(group, unchanged[0], shown, margin)
    return found


def _findings(
    group: Sequence[Run], unchanged: Run, traced: Sequence[Run], margin: float
) -> Iterator[Finding]:
    method, objective, seed = _key(group[0])[:3]
    protocols = dict.fromkeys(
        row.protocol for run in traced for row in run.rows if row.metric == "indirect_effect"
    )
    reached = [(run, success(run, unchanged, objective)) for run in group]
    for protocol in protocols:
        effects, left_out = restored_shares(traced, protocol)
        observations = [
            Observation(fact, relation, layer_of(run), value, effects[fact, layer_of(run)])
            for run, values in reached
            for (fact, relation), value in values.items()
            if (fact, layer_of(run)) in effects
        ]
        facts = {each.fact_id for each in observations}
        layers = {each.layer for each in observations}
        if len(facts) < _FEWEST_FACTS or len(layers) < _FEWEST_LAYERS:
            note = f"{len(facts)} facts and {len(layers)} layers were both traced and edited"
            yield Finding(method, objective, seed, protocol, None, len(left_out), note)
        else:
            made = study(observations, margin)
            yield Finding(method, objective, seed, protocol, made, len(left_out & facts))


def success(run: Run, unchanged: Run, objective: str) -> dict[tuple[str, str | None], float]:
    """How well an edit worked by fact and relation, a mean over prompts that no fit has seen.

    p is the probability of the wanted or unwanted object as a whole string, p₀ that in the
    unchanged model. To write an object: (p − p₀) / (1 − p₀); to remove one (`erase`, and
    `trace_reversal`, which takes the answer to what noise leaves of it): (p₀ − p) / p₀, at least 0.

    Args:
        run: with rows of `old_probability` and `new_probability`.
        unchanged: the same of no change.
        objective: what the edit pursued.
    """
    metric = "new_probability" if objective == "inject" else "old_probability"
    before, after = _chances(unchanged, metric), _chances(run, metric)
    reached: dict[tuple[str, str | None], list[float]] = {}
    for (fact, relation, prompt), p in after.items():
        p0 = before.get((fact, relation, prompt))
        if p0 is not None:
            share = _removed(p, p0) if objective in ("erase", "trace_reversal") else _written(p, p0)
            reached.setdefault((fact, relation), []).append(share)
    return {key: fmean(values) for key, values in reached.items()}


def _written(p: float, p0: float) -> float:
    return (p - p0) / (1 - p0) if p0 < 1 else 1.0


def _removed(p: float, p0: float) -> float:
    return max(0.0, (p0 - p) / p0) if p0 > 0 else 1.0


def _chances(run: Run, metric: str) -> dict[tuple[str, str | None, str], float]:
    """Probabilities by fact, relation and prompt, after the last edit, on unseen prompts."""
    return {
        (str(row.fact_id), row.relation, str(row.prompt_id)): row.value
        for row in run.select(metric, "string", step=None)
        if row.value is not None and row.prompt_id != "fit"
    }


def restored_shares(
    traced: Sequence[Run], protocol: str
) -> tuple[dict[tuple[str, int], float], set[str]]:
    """The share of the total effect that restoring a state brings back, by fact and layer.

    Returns:
        the shares at the subject's last token, and the facts left out for too small an effect.
    """
    corruption = protocol.partition("/")[0]
    shares: dict[tuple[str, int], float] = {}
    left_out: set[str] = set()
    for run in traced:
        totals = {row.fact_id: row.value for row in run.select("total_effect", corruption)}
        for row in run.select("indirect_effect", protocol, position=POSITION):
            total = totals.get(row.fact_id)
            if row.value is None or total is None or row.layer is None:
                continue
            if total < LEAST_EFFECT:
                left_out.add(str(row.fact_id))
            else:
                shares[str(row.fact_id), row.layer] = row.value / total
    return shares, left_out


def to_csv(found: Sequence[Finding]) -> str:
    """One line for each quantity of each finding."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_NAMES, "quantity", "layer", "value", "low", "high", "n", "verdict", "note"])
    for finding in found:
        name = [finding.method, finding.objective, finding.seed, finding.protocol]
        if finding.study is None:
            writer.writerow([*name, *[""] * 7, finding.note])
            continue
        for quantity, layer, value in _quantities(finding.study):
            numbers = [value.value, value.low, value.high, value.n]
            verdict, reason = finding.study.verdict, finding.study.reason
            writer.writerow([*name, quantity, layer, *numbers, verdict, value.note or reason])
    return text.getvalue()


def _quantities(found: Study) -> Iterator[tuple[str, int | str, Any]]:
    """R² by what explains it, and the rank correlation at every layer."""
    for name in (*R2, "increase", "increase_additive", "both_additive"):
        yield f"r2_{name}", "", getattr(found, name)
    for layer, value in found.correlations.items():
        yield "rank_correlation", layer, value


def _is_edit(run: Run) -> bool:
    """Whether facts were changed one by one at one layer, by an editor and no control."""
    own = _config(run).get("intervene")
    independent = isinstance(own, Mapping) and own.get("protocol") == "independent"
    return independent and not run.run.get("imitates") and own.get("span", 1) == 1  # type: ignore[union-attr]


def _key(run: Run) -> tuple[str, str, int]:
    own = _config(run)["intervene"]
    objective = (own.get("search") or own).get("objective", "inject")
    return run.method, str(objective), int(run.run.get("seed") or 0)


def asked(run: Run) -> tuple[Any, ...]:
    """What two runs must share to be compared: model, facts and their splits, ruler, seed."""
    facts, config = run.run.get("facts") or {}, _config(run)
    plan = json.dumps([config.get("facts"), config.get("evaluate")], sort_keys=True)
    return model_of(run), facts.get("fingerprint"), run.run.get("seed"), plan


def model_of(run: Run) -> Any:
    """The fingerprint of the model that a run is about."""
    return (run.run.get("model") or {}).get("fingerprint")


def _config(run: Run) -> Mapping[str, Any]:
    return run.run.get("config") or {}


def layer_of(run: Run) -> int:
    """The layer that a run changes."""
    return int(run.run["site"]["layer"])
