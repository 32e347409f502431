"""Edits one after another: what holds after 1, 2, 5, 10, ... of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from palimpsest.record.store import Run
from palimpsest.study.columns import rows_of
from palimpsest.study.intervals import Estimate, estimate
from palimpsest.study.summary import Summary

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


def courses(summaries: Sequence[Summary]) -> list[Course]:
    """The runs that were measured along their edits, and the unchanged model beside them.

    Empty if there is no such run. The unchanged model is shown where it is of the same model.
    """
    edited = [course for summary in summaries if (course := _course(summary))]
    unchanged = [s for s in summaries if s.method == "none"]
    beside = [course for summary in unchanged if (course := _reference(summary, edited))]
    return beside + edited


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


def _course(summary: Summary) -> Course | None:
    facts: dict[int, set[str]] = {}
    for row in summary.run.select("efficacy", "probability"):
        if row.step is not None and row.fact_id is not None:
            facts.setdefault(row.step, set()).add(row.fact_id)
    stages = [_stage(summary.run, s, s, edited, facts) for s, edited in sorted(facts.items())]
    return Course(summary, tuple(stages)) if stages else None


def _reference(unchanged: Summary, edited: Sequence[Course]) -> Course | None:
    """The unchanged model on the facts of the run that shares the most stages with it."""
    same = [c for c in edited if _model(c.summary) == _model(unchanged)]
    known = {row.fact_id for row in unchanged.run.select("efficacy", "probability")}
    if not same or any(c.summary is unchanged for c in edited):
        return None
    beside = max(same, key=lambda c: sum(stage.facts <= known for stage in c.stages))
    facts = {s.step: set(s.facts if s.facts <= known else ()) for s in beside.stages}
    stages = [_stage(unchanged.run, None, step, asked, facts) for step, asked in facts.items()]
    return Course(unchanged, tuple(stages), reference=True)


def _model(summary: Summary) -> Any:
    model = summary.run.run.get("model")
    return model.get("fingerprint") if isinstance(model, Mapping) else model


def _stage(
    run: Run, at: int | None, step: int, edited: set[str], facts: Mapping[int, set[str]]
) -> Stage:
    """The rows whose step is `at`, over the facts edited so far, or over the first of them."""
    first = {fact for k, some in facts.items() if k <= FIRST for fact in some} & edited
    values = {m.key: _value(run, m, at, first if m.first else edited) for m in MEASURES}
    return Stage(step, frozenset(edited), values)


def _value(run: Run, measure: Measure, at: int | None, facts: set[str]) -> Estimate:
    rows = rows_of(*measure.rows, measure.prompt, step=at)(run)
    if at is None and measure.metric == "score":
        rows = []  # one value over all facts, which says nothing of some of them
    return estimate([row for row in rows if row.fact_id is None or row.fact_id in facts])
