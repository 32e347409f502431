"""Does localization inform editing? Edits at several layers against traces of the same facts.

The question and its regressions are those of Hase, Bansal, Kim, Ghandeharioun 2023 (arXiv
2301.04213); `palimpsest.study.regression` has the statistics.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from palimpsest.record.results import Results, Run, sql_text
from palimpsest.study.comparable import asked, compared, model_of
from palimpsest.study.intervals import Estimate
from palimpsest.study.regression import MARGIN, Observation, Regressions, regress
from palimpsest.study.study import Block, Study
from palimpsest.study.table import SHOWN, Cell, Heading, Line, Table
from palimpsest.study.traces import is_trace

LEAST_EFFECT = 0.05
"""A fact whose total effect is below this has too little for a state to bring back."""

POSITION = "last_subject"
"""Where the effect is read: the token that editors write at."""

_FEWEST_FACTS, _FEWEST_LAYERS = 3, 2
R2 = {
    "layer": "R² layer",
    "effect": "R² effect",
    "both": "R² both",
    "corrected": "increase beyond chance",
}
"""The R² that the page and the terminal show, in words."""

_CAPTION = (
    "Success of each fact’s edit at each layer, on wordings that no fit has seen, regressed on the "
    "layer alone, on the share of the total effect that restoring the layer’s state at the "
    "subject’s last token brings back, and on both (an intercept and a slope a layer). The "
    "increase is that of both over the layer, less what permuted effects add. Small type: 95% "
    "intervals over facts. localization.csv has the rank correlation at every layer too."
)


@dataclass(frozen=True)
class Localization(Study):
    """Whether the tracing effect at a layer tells how well an edit there works.

    Attributes:
        margin: the increase of R² that matters.
    """

    margin: float = MARGIN

    def read(self, results: Results) -> Sequence[Block]:
        """A line for each kind of edit and of traced state; nothing without both."""
        found = findings(results, self.margin)
        return [_shown(found), _listed(found)] if found else ()


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
    study: Regressions | None
    left_out: int = 0
    note: str | None = None


def findings(results: Results, margin: float = MARGIN) -> list[Finding]:
    """One finding for each editor, objective and seed, and each kind of traced state.

    Edits count that changed facts one by one at one layer. Success is measured against the run of
    `none` on the same facts; without one, or without traces of the same model, there is nothing.

    Args:
        results: finished runs of all kinds.
        margin: the increase of R² that matters.
    """
    runs = results.runs
    edits = [run for run in runs if not is_trace(run) and _is_edit(run)]
    found: list[Finding] = []
    for key in sorted({_key(run) for run in edits}):
        group = [run for run in edits if _key(run) == key]
        unchanged = [run for run in runs if run.method == "none" and asked(run) == asked(group[0])]
        shown = traces_of(results, group[0])
        if len({layer_of(run) for run in group}) >= _FEWEST_LAYERS and unchanged and shown:
            found += _findings(results, group, unchanged[0], shown, margin)
    return found


def traces_of(results: Results, run: Run) -> list[Run]:
    """The runs that traced facts in the model that a run changed."""
    return [each for each in results.runs if is_trace(each) and model_of(each) == model_of(run)]


def protocols_of(results: Results, traced: Sequence[Run]) -> list[str]:
    """The kinds of states that some runs traced."""
    compared(results)
    records = results.query(
        f"SELECT DISTINCT protocol FROM compared WHERE {among(traced)} "
        "AND metric = 'indirect_effect' ORDER BY protocol"
    )
    return [protocol for (protocol,) in records]


def among(runs: Sequence[Run]) -> str:
    """The condition that a row is of one of some runs, as SQL."""
    return f"run_id IN ({', '.join(sql_text(run.run_id) for run in runs)})"


def _findings(
    results: Results, group: Sequence[Run], unchanged: Run, traced: Sequence[Run], margin: float
) -> Iterator[Finding]:
    method, objective, seed = _key(group[0])[:3]
    reached = [(run, success(results, run, unchanged, objective)) for run in group]
    for protocol in protocols_of(results, traced):
        effects, left_out = restored_shares(results, traced, protocol)
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
            made = regress(observations, margin)
            yield Finding(method, objective, seed, protocol, made, len(left_out & facts))


def success(
    results: Results, run: Run, unchanged: Run, objective: str
) -> dict[tuple[str, str | None], float]:
    """How well an edit worked by fact and relation, a mean over prompts that no fit has seen.

    p is the probability of the wanted or unwanted object as a whole string, p₀ that in the
    unchanged model. To write an object: (p − p₀) / (1 − p₀); to remove one (`erase`, and
    `trace_reversal`, which takes the answer to what noise leaves of it): (p₀ − p) / p₀, at least 0.

    Args:
        results: that hold both runs.
        run: with rows of `old_probability` and `new_probability`.
        unchanged: the same of no change.
        objective: what the edit pursued.
    """
    metric = "new_probability" if objective == "inject" else "old_probability"
    before, after = (_chances(results, each, metric) for each in (unchanged, run))
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


def _chances(
    results: Results, run: Run, metric: str
) -> dict[tuple[str, str | None, str | None], float]:
    """Probabilities by fact, relation and prompt, after the last edit, on unseen prompts."""
    compared(results)
    records = results.query(
        f"SELECT fact_id, relation, prompt_id, value FROM compared WHERE {among([run])} "
        f"AND metric = {sql_text(metric)} AND protocol = 'string' AND step IS NULL AND alike "
        "AND value IS NOT NULL AND prompt_id IS DISTINCT FROM 'fit' ORDER BY ALL"
    )
    return {(fact, relation, prompt): value for fact, relation, prompt, value in records}


def restored_shares(
    results: Results, traced: Sequence[Run], protocol: str
) -> tuple[dict[tuple[str, int], float], set[str]]:
    """The share of the total effect that restoring a state brings back, by fact and layer.

    Returns:
        the shares at the subject's last token, and the facts left out for too small an effect.
    """
    compared(results)
    corruption = protocol.partition("/")[0]
    records = results.query(
        f"""WITH own AS (SELECT * FROM compared WHERE {among(traced)} AND value IS NOT NULL),
        totals AS (
            SELECT run_id, fact_id, value AS total FROM own
            WHERE metric = 'total_effect' AND protocol = {sql_text(corruption)}
        )
        SELECT fact_id, layer, value, total FROM own JOIN totals USING (run_id, fact_id)
        WHERE metric = 'indirect_effect' AND protocol = {sql_text(protocol)}
            AND position = {sql_text(POSITION)} AND layer IS NOT NULL
        ORDER BY run_id, fact_id, layer"""
    )
    shares = {
        (fact, layer): value / total
        for fact, layer, value, total in records
        if total >= LEAST_EFFECT
    }
    return shares, {fact for fact, _, _, total in records if total < LEAST_EFFECT}


def _shown(found: Sequence[Finding]) -> Table:
    """A line for each finding."""
    names = ("edit", "objective", "seed", "traced", "facts")
    return Table(
        name="localization",
        title="Does localization inform editing?",
        caption=_CAPTION,
        headings=[
            *(Heading(title=name, style="words") for name in names),
            *(
                Heading(title=title, short=title.removeprefix("increase "), style="decimals")
                for title in R2.values()
            ),
            Heading(title="the effect", style="words"),
        ],
        lines=[_line(finding) for finding in found],
        footnotes=False,
        views=SHOWN,
    )


def _line(finding: Finding) -> Line:
    name = (finding.method, finding.objective, finding.seed, finding.protocol)
    left_out = f"; {finding.left_out} facts with too small a total effect are left out"
    more = left_out if finding.left_out else ""
    made = finding.study
    if made is None:
        missing = [Estimate(None, note=finding.note)] * len(R2)
        return Line((*name, None, *missing, f"{finding.note}{more}"))
    numbers = (getattr(made, quantity) for quantity in R2)
    return Line((*name, made.n_facts, *numbers, f"{made.verdict}: {made.reason}{more}"))


def _listed(found: Sequence[Finding]) -> Table:
    """One line for each quantity of each finding."""
    names = ("method", "objective", "seed", "traced", "quantity", "layer")
    lines = []
    for finding in found:
        name: tuple[Cell, ...]
        name = (finding.method, finding.objective, finding.seed, finding.protocol)
        made = finding.study
        if made is None:
            lines.append(Line((*name, *[None] * 4, finding.note)))
            continue
        for quantity, layer, value in _quantities(made):
            note = value.note or made.reason
            lines.append(Line((*name, quantity, layer, value, made.verdict, note)))
    return Table(
        name="localization",
        headings=[
            *(Heading(title=name, style="words") for name in names),
            Heading(title="value", parts=("value", "low", "high", "n")),
            Heading(title="verdict", style="words"),
            Heading(title="note", style="words"),
        ],
        lines=lines,
        views=("csv",),
    )


def _quantities(found: Regressions) -> Iterator[tuple[str, int | None, Estimate]]:
    """R² by what explains it, and the rank correlation at every layer."""
    for name in (*R2, "increase", "increase_additive", "both_additive"):
        yield f"r2_{name}", None, getattr(found, name)
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


def _config(run: Run) -> Mapping[str, Any]:
    return run.run.get("config") or {}


def layer_of(run: Run) -> int:
    """The layer that a run changes."""
    return int(run.run["site"]["layer"])
