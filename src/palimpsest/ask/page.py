"""The findings as one self-contained page."""

from collections.abc import Iterator
from dataclasses import dataclass

import jinja2

from palimpsest.ask import text
from palimpsest.ask.bench import Findings
from palimpsest.ask.reading import Reading, Said, legibility
from palimpsest.errors import visible


@dataclass(frozen=True, slots=True)
class Bar:
    """One layer of a strip: height in percent, and what is said on pointing at it."""

    height: int
    tip: str
    changed: bool


@dataclass(frozen=True, slots=True)
class Strip:
    """How legible one object is, layer by layer."""

    which: str
    name: str
    bars: tuple[Bar, ...]
    last: int


def render(findings: Findings) -> str:
    """The page as text: every word of the user's or the model's is escaped."""
    return _template().render(
        found=findings,
        paraphrases=list(_paraphrases(findings)),
        questions=list(_questions(findings)),
        failures=text.about_failures(findings),
        premises=text.about_premises(findings),
        strips=[(reading, _strips(findings, reading)) for reading in findings.readings],
        collision=text.about_collision(findings),
        collateral=text.about_collateral(findings),
        fits=text.about_fits(findings),
        before=findings.unchanged.neighbors,
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("palimpsest.ask"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"visible": visible, "share": text.share, "place": text.place}
    return environment.get_template("ask.html.j2")


def _paraphrases(findings: Findings) -> Iterator[tuple[str, list[Said]]]:
    for number, prompt in enumerate(findings.inquiry.fact.paraphrases):
        yield prompt.text, [reading.paraphrases[number] for reading in findings.readings]


def _questions(findings: Findings) -> Iterator[tuple[str, str, str, list[Said]]]:
    for number, question in enumerate(findings.inquiry.questions):
        said = [reading.questions[number] for reading in findings.readings]
        yield question.prompt.text, question.old[0], question.new[0], said


def _strips(findings: Findings, reading: Reading) -> list[Strip]:
    """The old object's and the new one's; none where their first tokens are the same."""
    if not reading.ranks:
        return []
    names = (("old", findings.inquiry.old), ("new", findings.inquiry.new))
    return [
        Strip(which, name, tuple(_bars(findings, reading, number)), reading.ranks[-1][number])
        for number, (which, name) in enumerate(names)
    ]


def _bars(findings: Findings, reading: Reading, number: int) -> Iterator[Bar]:
    for layer, ranks in enumerate(reading.ranks):
        height = round(100 * legibility(ranks[number], findings.vocabulary))
        tip = f"layer {layer}: rank {ranks[number]:,} of {findings.vocabulary:,}"
        yield Bar(height, tip, layer == reading.change.layer)
