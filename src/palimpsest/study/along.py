"""Along a sequence of edits: what holds after so many of them, as tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from palimpsest.record.results import Results
from palimpsest.study.figures.along import along
from palimpsest.study.figures.style import styles
from palimpsest.study.sequences import (
    FIRST,
    MEASURES,
    SHOWN,
    Course,
    Measure,
    Stage,
    columns,
    courses,
    gaps,
    heading,
)
from palimpsest.study.study import MOST_RUNS, Block, Figure, Study, too_many
from palimpsest.study.summary import Summary, summarise
from palimpsest.study.table import Cell, Heading, Line, Table

_TITLE = "Along a sequence of edits"
_CAPTION = (
    "One edit after another in the same model, and none undone. Efficacy: over all edits so far. "
    f"Retention: over the first {FIRST} of them, or as many as there are, however many edits "
    "follow. Neighborhood: other subjects of all edits so far. Perplexity: on held-out text. Bars "
    "and small type: 95% intervals over facts. A dotted line: the unchanged model, asked of the "
    "same facts. A gap: no value; the cause is told below."
)


@dataclass(frozen=True)
class Along(Study):
    """What holds along a sequence of edits."""

    def read(self, results: Results) -> Sequence[Block]:
        """Figures and tables by the number of edits; nothing without such runs."""
        shown = courses(results)
        if not shown:
            return ()
        summaries = summarise(results)
        return [*_figures(shown, summaries), _wide(shown), _long(shown), _listed(shown)]


def _figures(shown: Sequence[Course], summaries: Sequence[Summary]) -> list[Figure]:
    """One for each measure, under a common key."""
    if len(shown) > MOST_RUNS:
        caption = f"{_CAPTION} {too_many(len(shown), 'The lines')}"
        return [Figure(name="along", title=_TITLE, caption=caption, chart=None)]
    looks = styles(summaries)
    key = tuple(
        (
            "┄" if course.reference else looks[course.summary.label].glyph,
            looks[course.summary.label].colour,
            course.summary.label,
        )
        for course in shown
    )
    figures = [
        Figure(
            name=f"along-{metric}",
            chart=made.to_plotly_json(),
            numbers="sequence.csv",
            narrow=True,
        )
        for metric, made in along(shown, summaries).items()
    ]
    return [Figure(name="along", title=_TITLE, caption=_CAPTION, chart=None, key=key), *figures]


def _line(course: Course, *cells: Cell) -> Line:
    return Line(
        (course.summary.label, *cells),
        control_of=course.summary.imitates,
        unchanged=course.reference,
        small=("unchanged, same facts",) if course.reference else (),
    )


def _told(stage: Stage | None, measure: Measure) -> Cell:
    if stage is None:
        return None
    return replace(stage.values[measure.key], place=f"after {stage.step:,} edits")


def _wide(shown: Sequence[Course]) -> Table:
    """A line a run, a group of columns a measure."""
    steps = columns(shown)
    failures = [f"{c.summary.label}: {c.summary.failure}" for c in shown if c.summary.failed]
    return Table(
        name="sequence",
        headings=[
            Heading(title="after edits", style="words"),
            *(
                Heading(title=heading(step, shown), group=measure.title, style=measure.style)
                for measure in SHOWN
                for step in steps
            ),
        ],
        lines=[
            _line(course, *(_told(course.at(step), measure) for measure in SHOWN for step in steps))
            for course in shown
        ],
        notes=(*gaps(shown), *failures),
        footnotes=False,
        views=("page",),
    )


def _long(shown: Sequence[Course]) -> Table:
    """A line a run and measure."""
    steps = columns(shown)
    first = Heading(title="along the edits", style="words")
    lines = []
    for course in shown:
        for place, measure in enumerate(SHOWN):
            cells = (_told(course.at(step), measure) for step in steps)
            line = _line(course, measure.title, *cells)
            name = line.cells if place == 0 else ("", *line.cells[1:])
            lines.append(replace(line, cells=name, style=measure.style))
    return Table(
        name="sequence",
        title=_TITLE,
        headings=[
            first,
            Heading(title="after edits", style="words"),
            *(Heading(title=heading(step, shown)) for step in steps),
        ],
        lines=lines,
        footnotes=False,
        views=("terminal",),
    )


def _listed(shown: Sequence[Course]) -> Table:
    """A line a run, number of edits and measure; of `none`, its values on the same facts."""
    names = ("label", "method", "run_id", "step", "metric", "protocol")
    lines = []
    for course in shown:
        run = course.summary.run
        for stage in course.stages:
            for measure in MEASURES:
                found = stage.values[measure.key]
                name: tuple[Cell, ...] = (course.summary.label, run.method, run.run_id)
                name = (*name, stage.step, measure.metric, measure.protocol)
                lines.append(Line((*name, found, found.note)))
    return Table(
        name="sequence",
        headings=[
            *(Heading(title=name, style="words") for name in names),
            Heading(title="value", parts=("value", "low", "high", "n")),
            Heading(title="note", style="words"),
        ],
        lines=lines,
        views=("csv",),
    )
