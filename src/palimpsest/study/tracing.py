"""Causal tracing as tables, figures and pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from palimpsest.record.results import Results
from palimpsest.study.figures import pictures, tracing
from palimpsest.study.study import Block, Figure, Panel, Panels, Picture, Study
from palimpsest.study.table import Cell, Heading, Line, Table
from palimpsest.study.text import value_text
from palimpsest.study.traces import (
    EFFECTS,
    GROUPS,
    TraceView,
    aie_rows,
    corruption_text,
    hidden_facts,
    kind_text,
    peak,
    split,
    traced_facts,
    views,
)

_CAPTION = (
    "A prompt is run clean and with its subject corrupted; then corrupted with one state restored "
    "to what it was in the clean run. The indirect effect of a state is what that brings back of "
    "the probability of the object’s first token after the prompt, a mean over corrupted samples; "
    "its average over facts (AIE) is told for each group of positions and each layer, for a window "
    "that of its centre. Small type: 95% intervals over facts; those of the largest AIE take its "
    "place as given. Late blocks at the last token give most of the total effect back by "
    "construction; so the last subject token has columns of its own. The pictures are also in "
    "figures/, as PNG and PDF."
)
_FACTS = (
    "Fact by fact: rows are the tokens of the prompt, a star marks the subject’s. Grey: not "
    "traced; before the subject nothing differs, and the effect is zero."
)


@dataclass(frozen=True)
class Tracing(Study):
    """Which states bring a fact back."""

    def read(self, results: Results) -> Sequence[Block]:
        """A table of the largest effects, and the figures of each run; nothing without traces."""
        found = views(results)
        if not found:
            return ()
        blocks: list[Block] = [_peaks(found), _listed(found)]
        blocks += [_brief(view, corruption) for view in found for corruption in view.corruptions]
        for view in found:
            blocks += [*_figures(view, len(found) > 1), *_panels(view)]
            blocks += _pictures(view, len(found) > 1)
        return blocks


def _peaks(found: Sequence[TraceView]) -> Table:
    """A line a run, corruption and kind of state: where the average effect is largest."""
    notes = [
        f"{view.label}: {effect.note}."
        for view in found
        for corruption in view.corruptions
        for effect in (view.effects[metric, corruption] for metric in EFFECTS)
        if effect.note
    ]
    return Table(
        name="trace",
        title="Causal tracing",
        caption=_CAPTION,
        headings=[
            Heading(title="run", style="words"),
            Heading(title="corrupted by", style="words"),
            *(Heading(title=title, short=title.replace(" probability", ""), style="plain")
              for title in EFFECTS.values()),
            Heading(title="restored", style="words"),
            Heading(title="largest AIE", style="plain"),
            Heading(title="at", style="words"),
            Heading(title="layer", style="words"),
            Heading(title="largest at last subject token", short="at last subject", style="plain"),
            Heading(title="layer", style="words"),
        ],
        lines=[line for view in found for c in view.corruptions for line in _lines(view, c)],
        notes=tuple(dict.fromkeys(notes)),
        footnotes=False,
        views=("page",),
    )  # fmt: skip


def _lines(view: TraceView, corruption: str) -> Iterator[Line]:
    """The first line of a corruption tells its means too."""
    means = (view.effects[metric, corruption] for metric in EFFECTS)
    lead: tuple[Cell, ...] = (view.label, corruption_text(corruption), *means)
    protocols = [p for p in view.protocols if split(p)[0] == corruption]
    tops = [(protocol, top) for protocol in protocols if (top := peak(view, protocol))]
    if not tops:
        yield Line((*lead, "no group of positions was traced", *[None] * 5))
    for protocol, top in tops:
        subject = peak(view, protocol, "last_subject")
        own: tuple[Cell, ...] = (
            kind_text(split(protocol)[1]),
            top.estimate,
            GROUPS[top.group],
            top.layer,
            subject.estimate if subject else None,
            subject.layer if subject else None,
        )
        yield Line((*lead, *own))
        lead = ("", "", None, None, None)


def _brief(view: TraceView, corruption: str) -> Table:
    """The same of one run and corruption, for a terminal."""
    means = [
        f"{title} {value_text(view.effects[metric, corruption], 'share')}"
        for metric, title in EFFECTS.items()
    ]
    told = [view.effects[metric, corruption].note for metric in EFFECTS]
    missing = [f"{note}." for note in dict.fromkeys(told) if note]
    whole = _peaks([view])
    lines = [replace(line, cells=line.cells[5:]) for line in _lines(view, corruption)]
    return replace(
        whole,
        title=f"{view.label}, corrupted by {corruption_text(corruption)}",
        headings=whole.headings[5:],
        lines=lines,
        notes=("  ".join(means), *missing),
        views=("terminal",),
    )


def _listed(found: Sequence[TraceView]) -> Table:
    """A line a run, kind, position group and layer: AIE, interval and number of facts."""
    names = ("label", "run_id", "corruption", "kind", "position", "layer")
    return Table(
        name="trace",
        headings=[
            *(Heading(title=name, style="words") for name in names),
            Heading(title="value", parts=("value", "low", "high", "n")),
            Heading(title="note", style="words"),
        ],
        lines=[
            Line((view.label, view.run.run_id, corruption, kind, group, layer, effect, effect.note))
            for view in found
            for corruption, kind, group, layer, effect in aie_rows(view)
        ],
        views=("csv",),
    )


def _figures(view: TraceView, several: bool) -> list[Figure]:
    name = f"trace-{view.run.run_id}"
    made = {"average": tracing.average(view), "aie": tracing.curves(view)}
    figures = [
        Figure(name=f"{name}-{what}", chart=figure.to_plotly_json(), numbers="trace.csv")
        for what, figure in made.items()
        if figure is not None
    ]
    title = [Figure(name=name, chart=None, subtitle=view.label)] if several else []
    return [*title, *figures]


def _panels(view: TraceView) -> list[Panels]:
    """The heat maps of the first facts."""
    hidden = hidden_facts(view)
    more = f" {hidden} more facts are in rows.parquet." if hidden else ""
    name = f"trace-{view.run.run_id}-fact"
    panels = tuple(
        Panel(
            fact=traced.fact,
            figure=Figure(
                name=f"{name}-{place}", chart=tracing.fact(view, traced).to_plotly_json()
            ),
        )
        for place, traced in enumerate(traced_facts(view))
    )
    return [Panels(caption=_FACTS + more, panels=panels, first_open=True)] if panels else []


def _pictures(view: TraceView, several: bool) -> list[Picture]:
    """For papers, in a folder for each run if there are several."""
    folder = f"{view.run.path.resolve().name}/" if several else ""
    return [Picture(folder + name, partial(draw, view)) for name, draw in pictures.of(view)]
