"""Edits one after another: what holds after 1, 2, 5, 10, ... of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from palimpsest.record.results import Results, sql_text
from palimpsest.study.columns import NOT_MEASURED
from palimpsest.study.comparable import compared, model_of
from palimpsest.study.intervals import Estimate, estimates
from palimpsest.study.samples import picked, samples
from palimpsest.study.summary import Summary, summarise

FIRST = 10
"""As many of the first edits are followed to see what is retained of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One quantity that is followed along a sequence.

    Attributes:
        key: `axis/metric/protocol`, also the name in wandb.
        title: its heading.
        rows: metric and protocol of the rows that it is made of.
        prompt: what the rows' prompt ids begin with.
        first: only over the first edits, instead of over all edits so far.
        style: `share` (two decimals) or `number` (three digits).
        shown: whether it has a panel on the page and its columns in the tables.
    """

    key: str
    title: str
    rows: tuple[str, str]
    prompt: str = ""
    first: bool = False
    style: Literal["share", "number"] = "share"
    shown: bool = False

    @property
    def metric(self) -> str:
        """The metric of the key."""
        return self.key.split("/")[1]

    @property
    def protocol(self) -> str:
        """The protocol of the key."""
        return self.key.split("/")[2]


MEASURES = (
    Measure(
        key="downstream/efficacy/probability",
        title="efficacy",
        rows=("efficacy", "probability"),
        shown=True,
    ),
    Measure(
        key=f"downstream/retention/first_{FIRST}",
        title=f"retention, first {FIRST}",
        rows=("efficacy", "probability"),
        first=True,
        shown=True,
    ),
    Measure(
        key="downstream/paraphrase/probability",
        title="paraphrase",
        rows=("paraphrase", "probability"),
    ),
    Measure(
        key="downstream/neighborhood/probability",
        title="neighborhood",
        rows=("neighborhood", "probability"),
        shown=True,
    ),
    Measure(
        key="downstream/score/harmonic_mean",
        title="score",
        rows=("score", "harmonic_mean"),
    ),
    Measure(
        key="downstream/suppression/candidates",
        title="suppression",
        rows=("suppression", "candidates"),
        prompt="paraphrase",
    ),
    Measure(
        key="downstream/perplexity/heldout_text",
        title="perplexity",
        rows=("perplexity", "heldout_text"),
        style="number",
        shown=True,
    ),
)
"""What is followed, in the order of sequence.csv."""

SHOWN = tuple(measure for measure in MEASURES if measure.shown)
"""What the page and the terminal show."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What was measured after so many edits.

    Attributes:
        step: edits so far.
        facts: ids of the facts edited so far, those that could not be changed included.
        values: by the key of the measure.
    """

    step: int
    facts: frozenset[str]
    values: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class Course:
    """One run along its edits.

    Attributes:
        summary: the run.
        stages: in the order of their steps; never empty.
        reference: the run is the unchanged model, and the stages are its values on the facts of
            another run's stages.
    """

    summary: Summary
    stages: tuple[Stage, ...]
    reference: bool = False

    def at(self, step: int | None) -> Stage | None:
        """The stage after `step` edits, or the last one for None; None if there is none."""
        if step is None:
            return self.stages[-1]
        return next((stage for stage in self.stages if stage.step == step), None)


def courses(results: Results) -> list[Course]:
    """The runs that were measured along their edits, and the unchanged model beside them.

    Empty if there is no such run. The unchanged model is shown where it is of the same model.
    """
    edited = _edited(results)
    if not edited:
        return []
    beside = _beside(results, edited)
    _prepare(results, edited, beside)
    values = _values(results)
    summaries = {summary.run.run_id: summary for summary in summarise(results)}
    shown = [(run_id, stages, True) for run_id, stages in beside.items()]
    shown += [(run_id, edited[run_id], False) for run_id in summaries if run_id in edited]
    return [
        Course(
            summaries[run_id],
            tuple(_stage(values, run_id, step, facts) for step, facts in sorted(stages.items())),
            reference,
        )
        for run_id, stages, reference in shown
    ]


def columns(shown: Sequence[Course]) -> list[int | None]:
    """The steps that tables show: powers of ten below the last edit; None is the last one."""
    last = max((course.stages[-1].step for course in shown), default=0)
    steps = {stage.step for course in shown for stage in course.stages if stage.step < last}
    return [*sorted(step for step in steps if str(step).rstrip("0") == "1"), None]


def heading(step: int | None, shown: Sequence[Course]) -> str:
    """A column of `columns` in words: the number of edits, and `last` where they differ."""
    ends = {course.stages[-1].step for course in shown}
    if step is None and len(ends) > 1:
        return "last"
    return f"{ends.pop() if step is None else step:,}"


def gaps(shown: Sequence[Course]) -> list[str]:
    """For each run, what has no value after which edits, and why."""
    return [line for course in shown for line in _gaps(course)]


def _gaps(course: Course) -> list[str]:
    titles: dict[tuple[str, str], list[str]] = {}
    for measure in SHOWN:
        missing = {s.step: s.values[measure.key] for s in course.stages}
        missing = {step: found for step, found in missing.items() if found.value is None}
        if missing:
            steps = ", ".join(f"{step:,}" for step in missing)
            why = "; ".join(dict.fromkeys(found.note or "" for found in missing.values()))
            titles.setdefault((steps, why), []).append(measure.metric)
    return [
        f"{course.summary.label}: no {', '.join(names)} after {steps} "
        f"{'edit' if steps == '1' else 'edits'}: {why}."
        for (steps, why), names in titles.items()
    ]


Stages = Mapping[int, frozenset[str]]
"""By number of edits so far, the facts that were edited."""


def _edited(results: Results) -> dict[str, Stages]:
    """By run the facts edited so far, of runs that were measured along their edits."""
    compared(results)
    records = results.query(
        "SELECT run_id, step, list(DISTINCT fact_id) FROM compared WHERE metric = 'efficacy' "
        "AND protocol = 'probability' AND step IS NOT NULL AND fact_id IS NOT NULL "
        "GROUP BY ALL ORDER BY ALL"
    )
    found: dict[str, dict[int, frozenset[str]]] = {}
    known = {summary.run.run_id for summary in summarise(results)}
    for run_id, step, facts in records:
        if run_id in known:
            found.setdefault(run_id, {})[step] = frozenset(facts)
    return dict(found)


def _beside(results: Results, edited: Mapping[str, Stages]) -> dict[str, Stages]:
    """By run of the unchanged model the stages of the run that shares the most with it.

    A stage is empty where the unchanged model was not asked of all its facts.
    """
    asked = {
        run_id: frozenset(facts)
        for run_id, facts in results.query(
            "SELECT run_id, list(DISTINCT fact_id) FROM compared WHERE metric = 'efficacy' "
            "AND protocol = 'probability' AND fact_id IS NOT NULL GROUP BY ALL"
        )
    }
    beside: dict[str, Stages] = {}
    for summary in summarise(results):
        unchanged, known = summary.run, asked.get(summary.run.run_id, frozenset())
        same = [
            edited[each.run.run_id]
            for each in summarise(results)
            if each.run.run_id in edited and model_of(each.run) == model_of(unchanged)
        ]
        if summary.method == "none" and same and unchanged.run_id not in edited:
            nearest = max(same, key=lambda stages: _shared(stages, known))
            beside[unchanged.run_id] = {
                step: facts if facts <= known else frozenset() for step, facts in nearest.items()
            }
    return beside


def _shared(stages: Stages, known: frozenset[str]) -> int:
    return sum(facts <= known for facts in stages.values())


_NONE = "(NULL::VARCHAR, 0, NULL::VARCHAR, false)"


def _prepare(results: Results, edited: Mapping[str, Stages], beside: Mapping[str, Stages]) -> None:
    """Tables of the stages, of the facts that count in each, and of which are the first ones."""
    stages, facts = [], []
    for runs, going in ((edited, True), (beside, False)):
        for run_id, by_step in runs.items():
            first = {f for step, some in by_step.items() if step <= FIRST for f in some}
            for step, some in by_step.items():
                stages.append(f"({sql_text(run_id)}, {step}, {step if going else 'NULL::INTEGER'})")
                facts += [
                    f"({sql_text(run_id)}, {step}, {sql_text(f)}, {f in first})" for f in some
                ]
    results.query(
        "CREATE OR REPLACE TEMP TABLE stages AS SELECT * FROM "
        f"(VALUES {', '.join(stages)}) AS v (run_id, stage, after)"
    )
    results.query(
        "CREATE OR REPLACE TEMP TABLE edited AS SELECT * FROM "
        f"(VALUES {', '.join(facts) or _NONE}) AS v (run_id, stage, fact_id, early)"
    )


def _values(results: Results) -> dict[tuple[str, int, int], Estimate]:
    """By run, place in MEASURES and stage."""
    listed = ", ".join(
        f"({place}, {sql_text(m.rows[0])}, {sql_text(m.rows[1])}, {sql_text(m.prompt)}, {m.first})"
        for place, m in enumerate(MEASURES)
    )
    # one score over all facts says nothing of some of them
    condition = """budget IS NULL AND starts_with(coalesce(prompt_id, ''), q.prompt)
        AND step IS NOT DISTINCT FROM after AND NOT (after IS NULL AND q.metric = 'score')
        AND (compared.fact_id IS NULL OR (early IS NOT NULL AND (early OR NOT first)))"""
    found = f"""SELECT * REPLACE (NULL::INTEGER AS step) FROM ({
        picked(condition, "item", "stages.stage")
    })"""
    joined = f"""FROM compared JOIN (VALUES {listed}) AS q (item, metric, protocol, prompt, first)
        ON compared.metric = q.metric AND compared.protocol = q.protocol
        JOIN stages ON compared.run_id = stages.run_id
        LEFT JOIN edited ON edited.run_id = compared.run_id AND edited.stage = stages.stage
            AND edited.fact_id = compared.fact_id"""
    rows = found.replace("FROM compared", joined).replace("SELECT run_id", "SELECT compared.run_id")
    rows = rows.replace(" fact_id,", " compared.fact_id,")
    return dict(estimates(samples(results, rows, ["item", "stage"])))


def _stage(
    values: Mapping[tuple[str, int, int], Estimate], run_id: str, step: int, facts: frozenset[str]
) -> Stage:
    found = {
        measure.key: values.get((run_id, place, step), NOT_MEASURED)
        for place, measure in enumerate(MEASURES)
    }
    return Stage(step, facts, found)
