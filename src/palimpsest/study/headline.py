"""What is left, and what was lost: the headline numbers of all runs, and every quantity."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from palimpsest.record.results import Results
from palimpsest.study.columns import HEADLINE
from palimpsest.study.figures import methods
from palimpsest.study.intervals import CLUSTERS
from palimpsest.study.study import MOST_RUNS, Block, Figure, Study, too_many
from palimpsest.study.summary import Summary, details, summarise
from palimpsest.study.table import Heading, Line, Table

GROUPS = (
    ("downstream", "what the model says, of the facts and of everything else"),
    ("recoverability", "what can still be read from its states"),
    ("consistency", "whether it agrees with itself"),
)
"""Groups of headline columns, and a line on each."""

_CAPTION = (
    "One model, the same facts, one ruler. Arrows show the better direction: for an editor, which "
    "writes a new object, and for an eraser, which removes the old one. Small type: 95% intervals "
    "over facts, conditional on the split and on the relations where there are fewer than "
    f"{CLUSTERS}."
)
_CLOSER = (
    "What the strongest attack recovers in each zone by itself, and linear probes at the deepest "
    "measured layer. Frozen probes were trained on the unchanged model; shadow probes on subjects "
    "that the same method has changed, as many for editors as for erasers; retrained ones on all "
    "probe subjects of the changed model, which independent edits leave as they were."
)
_CURVES = (
    "How well a linear probe reads the old object from the state after each layer; a method that "
    "only changed what the model says stays up. Controls have open markers and the colour of the "
    "run they imitate."
)
_TRADE_OFF = (
    "What was kept on untouched subjects against what the strongest attack recovers of the old "
    "object: from the whole changed model, and at or after the change alone. On the right, methods "
    "that change different layers are asked at different states. Bars are 95% intervals."
)
_TWO_HOP = (
    "Answers to questions that the facts entail: a model that agrees with itself about a new "
    "object answers them with the new one."
)


@dataclass(frozen=True)
class Headline(Study):
    """The headline numbers."""

    def read(self, results: Results) -> Sequence[Block]:
        """Their table, every measured quantity, and three figures; nothing without such runs."""
        summaries = summarise(results)
        if not summaries:
            return ()
        return [
            table(summaries),
            closer(summaries),
            *_details(results, summaries),
            *_figures(results, summaries),
        ]


def table(summaries: Sequence[Summary]) -> Table:
    """A line a run: the headline numbers."""
    return Table(
        name="report",
        title="What is left, what was lost",
        caption=_CAPTION,
        headings=_headings(),
        lines=[_line(summary) for summary in summaries],
        groups=GROUPS,
    )


def closer(summaries: Sequence[Summary]) -> Table:
    """A line a run: where the old object can be recovered, and by which probes."""
    columns = [column for column in HEADLINE if column.closer]
    return Table(
        name="recoverable",
        title="Where it can be recovered",
        caption=_CLOSER,
        headings=[
            Heading(title="method", key="label", style="words"),
            *(column.heading() for column in columns),
        ],
        lines=[summary.line(*(summary.values[c.key] for c in columns)) for summary in summaries],
        views=("page", "terminal", "latex"),
    )


def _headings() -> list[Heading]:
    names = ("method", "run_id", "imitates", "n_facts")
    return [
        Heading(title="method", key="label", style="words"),
        *(Heading(title=name, style="words", data=True) for name in names),
        *(column.heading(data=column.closer) for column in HEADLINE),
        Heading(title="n_failed", style="words", data=True),
    ]


def _line(summary: Summary) -> Line:
    run = summary.run
    return summary.line(
        *(run.method, run.run_id, summary.imitates, summary.n_facts),
        *(summary.values[column.key] for column in HEADLINE),
        len(summary.failed),
        note=True,
    )


def _details(results: Results, summaries: Sequence[Summary]) -> list[Table]:
    """Every measured quantity, with a column for each run."""
    shown = len(summaries) <= MOST_RUNS
    names = ("axis", "metric", "protocol", "where")
    found = details(results) if shown else ()
    return [
        Table(
            name="details",
            title="Every measured quantity, and what it cost",
            caption="" if shown else too_many(len(summaries), "Every measured quantity"),
            headings=[
                *(Heading(title=name, style="words") for name in names),
                *(Heading(title=s.label, style="plain") for s in summaries if shown),
            ],
            lines=[Line((d.axis, d.metric, d.protocol, d.place, *d.values)) for d in found],
            footnotes=False,
            folded=True,
            views=("page",),
        )
    ]


def _figures(results: Results, summaries: Sequence[Summary]) -> list[Figure]:
    runs = len(summaries)
    few = runs <= MOST_RUNS
    curves = methods.recoverability(results) if few else None
    shares = methods.two_hop(results) if few else None
    made = [
        _figure("recoverability", "What can still be read, layer by layer", _CURVES, curves),
        _figure("trade_off", "The trade-off", _TRADE_OFF, methods.trade_off(results)),
        _figure("two_hop", "Does the model agree with itself?", _TWO_HOP, shares),
    ]
    if few:
        return [figure for figure in made if figure.chart]
    curves_left_out = replace(made[0], caption=too_many(runs, "The curves"))
    bars_left_out = replace(made[2], caption=too_many(runs, "The bars"))
    named = f"{_TRADE_OFF} The first {MOST_RUNS} of {runs:,} runs are named; a pointer names each."
    dots = [replace(made[1], caption=named)] if made[1].chart else []
    return [curves_left_out, *dots, bars_left_out]


def _figure(name: str, title: str, caption: str, made: Any) -> Figure:
    chart = made.to_plotly_json() if made is not None else None
    return Figure(name=name, title=title, caption=caption, chart=chart, numbers="report.csv")
