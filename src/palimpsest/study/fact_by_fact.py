"""What each method made of each fact: the model's own words, and its objects' ranks by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from palimpsest.record.results import Results
from palimpsest.study.comparable import compared
from palimpsest.study.figures.ranks import rank_curves, ranks
from palimpsest.study.study import MOST_RUNS, Block, Figure, Panel, Panels, Study, too_many
from palimpsest.study.summary import Summary, summarise
from palimpsest.study.table import Heading, Line, Table, Words

MOST_FACTS = 60
"""Facts with a panel of their own; the page stays light, and rows.parquet holds the others."""

_CAPTION = (
    "What the model continues each prompt with, before and after (in colour where that is the old "
    "or the new object); open a fact for all methods and for the rank of both objects by layer."
)
_HEADINGS = (
    Heading(title="method", style="words"),
    Heading(title="the model continues", style="words"),
    Heading(title="most probable next tokens", style="words"),
)

Told = tuple[Summary, Mapping[str, Any]]
"""A run, and what its facts.json tells of a fact."""


@dataclass(frozen=True)
class FactByFact(Study):
    """What each method made of each fact."""

    def read(self, results: Results) -> Sequence[Block]:
        """A panel for each of the first facts; nothing where no run tells of any."""
        summaries = summarise(results)
        if len(summaries) > MOST_RUNS:
            told = too_many(len(summaries), "Each fact’s answers")
            caption = f"{told} They are in each run’s facts.json."
            return [Panels(title="Fact by fact", caption=caption, panels=())]
        answers = _answers(summaries)
        if not answers:
            return ()
        hidden = len(answers) - MOST_FACTS
        more = f" {hidden} more facts are in rows.parquet and facts.json." if hidden > 0 else ""
        panels = _panels(results, dict(list(answers.items())[:MOST_FACTS]))
        return [Panels(title="Fact by fact", caption=_CAPTION + more, panels=panels)]


def _answers(summaries: Sequence[Summary]) -> dict[str, list[Told]]:
    """By fact what each run tells of it; `none` leads the summaries, and so each list."""
    answers: dict[str, list[Told]] = {}
    for summary in summaries:
        for fact in summary.run.facts:
            answers.setdefault(str(fact["fact_id"]), []).append((summary, fact))
    return answers


def _panels(results: Results, answers: Mapping[str, list[Told]]) -> tuple[Panel, ...]:
    curves, causes = rank_curves(results, list(answers)), _unranked(results)
    made = []
    for place, (fact_id, told) in enumerate(answers.items()):
        figure = ranks(results, curves, fact_id)
        chart = figure.to_plotly_json() if figure is not None else None
        note = f"Its objects have no rank: {causes.get(fact_id, 'not measured')}."
        made.append(
            Panel(
                fact=told[0][1],
                table=_table(fact_id, told),
                figure=Figure(name=f"fact-{place}", chart=chart) if chart else None,
                note="" if chart else note,
            )
        )
    return tuple(made)


def _unranked(results: Results) -> dict[str, str]:
    """By fact the causes that the rows name for missing ranks of its old object."""
    compared(results)
    causes: dict[str, dict[str, None]] = {}
    order = {summary.run.run_id: place for place, summary in enumerate(summarise(results))}
    records = results.query(
        "SELECT DISTINCT run_id, fact_id, note FROM compared WHERE metric = 'lens_rank_old' "
        "AND protocol = 'logit_lens' AND value IS NULL AND note <> '' AND fact_id IS NOT NULL"
    )
    for _, fact_id, note in sorted(records, key=lambda r: (order.get(r[0], -1), *r[1:])):
        causes.setdefault(fact_id, {})[note] = None
    return {fact_id: "; ".join(notes) for fact_id, notes in causes.items()}


def _table(fact_id: str, told: Sequence[Told]) -> Table:
    """A line a run: what the model says of the fact."""
    lines = [
        Line(
            (summary.label, Words(str(fact.get("answer") or ""), _tone(fact)), _top(fact)),
            control_of=summary.imitates,
            unchanged=summary.method == "none",
            small=("before any change",) if summary.method == "none" else (),
        )
        for summary, fact in told
    ]
    return Table(name=fact_id, headings=_HEADINGS, lines=lines, views=("page",))


def _top(fact: Mapping[str, Any]) -> str:
    return " · ".join(f"{text} {chance:.2f}" for text, chance in fact.get("top") or ())


def _tone(fact: Mapping[str, Any]) -> Literal["", "old", "new"]:
    """Which object the answer starts with: `old`, `new` or neither (empty)."""
    answer = str(fact.get("answer") or "").strip().casefold()
    pairs: tuple[tuple[Literal["old", "new"], str], ...] = (("old", "true"), ("new", "new"))
    for name, key in pairs:
        wanted = str(fact.get(key) or "").strip().casefold()
        if wanted and answer.startswith(wanted):
            return name
    return ""
