"""The findings in a terminal, one column a method."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from palimpsest.ask import text
from palimpsest.ask.bench import Findings, Reply
from palimpsest.ask.reading import Reading, Said
from palimpsest.ask.text import share
from palimpsest.errors import visible

OLD, NEW, NEITHER, FAINT = "dark_orange", "dodger_blue1", "", "dim"
_STYLES = {"old": OLD, "new": NEW, "neither": NEITHER}

NARROWEST = 72
"""Columns below which nothing is set."""


def show(findings: Findings, console: Console) -> None:
    """Print everything: answers, paraphrases, questions, strips, collateral."""
    console.width = max(console.width, NARROWEST)
    console.print(_title(findings))
    _section(console, "Answer", "greedy continuation; probability of old, new as whole strings")
    console.print(_answers(findings))
    _notes(console, text.about_failures(findings))
    _section(console, "Paraphrases", "seen by no fit")
    console.print(_said_table(findings, _paraphrases(findings)))
    _section(console, "Entailed questions", "do the answers follow from the new object?")
    if findings.inquiry.questions:
        console.print(_said_table(findings, _questions(findings)))
        _notes(console, text.about_premises(findings))
    else:
        none = "None: nothing is known to follow from these objects; ask with --question."
        _notes(console, [none])
    _section(
        console,
        "Legibility by layer",
        "1 − log(rank)/log(V) under the logit lens, prompt's last token",
    )
    _strips(findings, console)
    _section(console, "Collateral", "facts that should stay; probability of their object")
    if findings.neighbors:
        console.print(_collateral(findings))
    _notes(console, [text.about_collateral(findings), *text.about_fits(findings)])


def show_replies(replies: Sequence[Reply], console: Console) -> None:
    """Print how each method continues a line."""
    table = _table()
    for _ in range(3):
        table.add_column()
    for reply in replies:
        table.add_row(Text(reply.name, "bold"), _plain(reply.text), _top(reply.top))
    console.print(table)


def _section(console: Console, title: str, meaning: str) -> None:
    console.print(Text.assemble("\n", (title, "bold"), "  ", (meaning, FAINT)))


def _notes(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(Text(visible(line), FAINT))


def _title(findings: Findings) -> Text:
    inquiry = findings.inquiry
    return Text.assemble(
        (visible(inquiry.fact.prompt.text), "bold"),
        " … ",
        (visible(inquiry.old), OLD),
        " → ",
        (visible(inquiry.new), NEW),
        (f"   {visible(findings.model)}, {len(findings.readings)} methods", FAINT),
    )


def _table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)


def _plain(words: str) -> Text:
    return Text(visible(words.strip(" ")))


def _said(said: Said) -> Text:
    """A continuation in the colour of what it names, and the two probabilities."""
    shown = Text(visible(said.text.strip(" ")), _STYLES[said.verdict])
    return shown.append("\n").append(_odds(said))


def _odds(said: Said) -> Text:
    return Text.assemble(
        (share(said.old), OLD), (" ", ""), (share(said.new), NEW), (f" {said.verdict}", FAINT)
    )


def _top(top: Sequence[tuple[str, float]]) -> Text:
    line = Text()
    for token, probability in top:
        line.append(visible(token.strip(" ") or "␣")).append(f" {share(probability)}  ", FAINT)
    line.rstrip()
    return line


def _answers(findings: Findings) -> Table:
    table = _table()
    for _ in range(4):
        table.add_column()
    for reading in findings.readings:
        said = Text(visible(reading.answer.text.strip(" ")), _STYLES[reading.answer.verdict])
        table.add_row(Text(reading.name, "bold"), said, _odds(reading.answer), _top(reading.top))
    return table


Line = tuple[str, str, list[Said]]
"""A prompt, what is said of it in small, and each method's answer."""


def _paraphrases(findings: Findings) -> Iterator[Line]:
    for number, prompt in enumerate(findings.inquiry.fact.paraphrases):
        yield prompt.text, "", [r.paraphrases[number] for r in findings.readings]


def _questions(findings: Findings) -> Iterator[Line]:
    for number, question in enumerate(findings.inquiry.questions):
        answers = f"{question.old[0]} → {question.new[0]}"
        yield question.prompt.text, answers, [r.questions[number] for r in findings.readings]


def _said_table(findings: Findings, lines: Iterator[Line]) -> Table:
    table = _by_method(findings)
    for prompt, small, said in lines:
        shown = Text(visible(prompt))
        if small:
            shown.append(f"\n{visible(small)}", FAINT)
        table.add_row(shown, *map(_said, said))
    return table


def _by_method(findings: Findings) -> Table:
    """A table with a column for prompts and one for each method."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", ratio=5)
    for reading in findings.readings:
        table.add_column(Text(reading.name), ratio=3, overflow="fold")
    table.expand = True
    return table


def _strips(findings: Findings, console: Console) -> None:
    """Two lines a method and a mark under the changed layer; never wrapped."""
    if not findings.unchanged.ranks:
        _notes(console, [text.about_collision(findings)])
        return
    wide = max(len(reading.name) for reading in findings.readings)
    for reading in findings.readings:
        for line in _strip(findings, reading, wide):
            console.print(line, soft_wrap=True)


def _strip(findings: Findings, reading: Reading, wide: int) -> Iterator[Text]:
    inquiry = findings.inquiry
    for which, (name, style) in enumerate(((inquiry.old, OLD), (inquiry.new, NEW))):
        shown = text.strip(reading, which, findings.vocabulary)
        head = f"{'' if which else reading.name:<{wide}} {'new' if which else 'old'} "
        ends = f" {visible(name)}, rank {reading.ranks[-1][which]:,}"
        yield Text.assemble((head, "" if which else "bold"), (shown, style), (ends, FAINT))
    layer = reading.change.layer
    if layer is not None:
        yield Text(f"{' ' * (wide + 5 + layer)}▲ {text.place(reading)}", FAINT)


def _collateral(findings: Findings) -> Table:
    table = _by_method(findings)
    before = findings.unchanged.neighbors
    for number, fact in enumerate(findings.neighbors):
        cells = [
            _kept(
                before[number].probability,
                r.neighbors[number].probability,
                r.neighbors[number].kept,
            )
            for r in findings.readings[1:]
        ]
        first = Text(share(before[number].probability))
        if not before[number].kept:
            first.append(" not said", FAINT)
        asked = Text.assemble(visible(fact.prompt.text), (f" {visible(fact.true)}", FAINT))
        table.add_row(asked, first, *cells)
    return table


def _kept(before: float, after: float, kept: bool) -> Text:
    numbers = f"{share(before)} → {share(after)} "
    return Text(numbers).append("kept" if kept else "lost", FAINT if kept else "red")
