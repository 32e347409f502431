"""The terminal, the page and the picture: nothing of the user's becomes markup or control."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from palimpsest.ask.page import render
from palimpsest.ask.reading import Said
from palimpsest.ask.terminal import show
from palimpsest.ask.text import BLOCKS, share
from palimpsest.cli.ask import picture
from palimpsest.errors import visible
from tests.ask.surroundings import LAYERS, METHODS, about

HOSTILE = (
    "<script>alert(1)</script>",
    "</title><img src=x onerror=alert(2)>",
    "'\"><svg/onload=alert(3)>",
    "{{ 7 * 7 }} [red]x[/red] [link=file:///etc]y[/link]",
    "\x1b[31mred\x07\u202e",
)


@pytest.fixture
def findings(bench, tiny):
    return bench.examine(about(tiny, questions=["Who rules there?=Anna|Bo"]))


@pytest.fixture
def hostile(bench, tiny, findings):
    """Findings whose every text, the user's and the model's, is hostile."""
    subject = " ".join(HOSTILE)
    inquiry = about(
        tiny,
        paraphrases=[*HOSTILE],
        questions=[f"{subject}={HOSTILE[0]}|{HOSTILE[1]}"],
        neighbors=[f"{subject}={HOSTILE[2]}"],
    )
    fact = replace(inquiry.fact, true=HOSTILE[0], new=HOSTILE[4], subject=subject)
    found = bench.examine(replace(inquiry, fact=replace(fact, true=fact.new, new="Japan")))
    said = Said(subject, 0.1, 0.2, "old")
    readings = tuple(replace(r, answer=said, top=((subject, 0.5),)) for r in found.readings)
    return replace(found, readings=readings, model=HOSTILE[0])


def printed(findings, width=100, colour=False):
    file = io.StringIO()
    show(findings, Console(file=file, width=width, force_terminal=colour))
    return file.getvalue()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_terminal_shows_every_part(findings):
    shown = printed(findings)
    for title in ("Answer", "Paraphrases", "Entailed questions", "Legibility", "Collateral"):
        assert f"\n{title}" in shown
    assert all(re.search(rf"^{name}\b", shown, re.MULTILINE) for name in METHODS)
    assert "Who rules there?" in shown
    assert f"fitted on n = {findings.sample.n} facts" in shown


def test_strips_are_not_wrapped_and_the_mark_stands_under_the_changed_layer(findings):
    many = tuple(
        replace(r, ranks=r.ranks * 40, change=replace(r.change, layer=layer and 150))
        for r, layer in zip(findings.readings, (None, 1, 1, 1, 1), strict=True)
    )
    lines = printed(replace(findings, readings=many), width=72).splitlines()
    strips = [line for line in lines if re.search(f"[{BLOCKS}]{{160}}", line)]
    assert len(strips) == 2 * len(METHODS)
    start = re.search(f"[{BLOCKS}]", strips[0]).start()
    marks = [line.index("▲") for line in lines if "▲" in line]
    assert marks == [start + 150] * (len(METHODS) - 1)


def test_without_questions_one_line_says_so(bench, tiny):
    found = bench.examine(about(tiny, "P103"))
    assert not found.inquiry.questions
    assert "None: nothing is known to follow from these objects" in printed(found)
    assert "None: nothing is known to follow from these objects" in render(found)


def test_objects_with_one_first_token_are_told(findings):
    none = replace(findings, readings=tuple(replace(r, ranks=()) for r in findings.readings))
    for shown in (" ".join(printed(none).split()), render(none)):
        assert "begin with the same token" in shown
    assert not re.search(f"[{BLOCKS}]", printed(none))


def test_hostile_text_is_no_markup(hostile):
    raw = render(hostile)
    page = Page(raw)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "svg", "link", "a", "iframe", "object"}
    assert not [key for _, found in page.tags for key in found if key.startswith("on")]
    texts = " ".join(page.texts)
    for text in HOSTILE:
        assert visible(text) in texts
    assert "{{ 7 * 7 }}" in texts
    assert "://" not in raw.replace("file:///etc", "")


def test_control_characters_are_escaped_everywhere(hostile):
    for shown in (printed(hostile), render(hostile), picture(hostile)):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", shown)
    assert r"\x1b[31mred\x07\u202e" in " ".join(printed(hostile, width=2000).split())
    assert "[red]x[/red]" in printed(hostile, width=2000)


def test_the_page_and_the_picture_fetch_nothing(findings):
    page, svg = render(findings), picture(findings)
    assert not re.search(r"https?:|//\w|@import|@font-face|url\((?!#)", page)
    without_namespace = svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|@font-face|@import|href=", without_namespace)
    assert re.sub(r"url\(#[\w-]+\)", "", svg).count("url(") == 0
    assert svg.count("<svg") == 1


def test_the_page_shows_every_prompt_and_bar(findings):
    page = Page(render(findings))
    texts = " ".join(page.texts)
    inquiry = findings.inquiry
    for prompt in (inquiry.fact.prompt, *inquiry.fact.paraphrases):
        assert prompt.text in texts
    assert all(fact.prompt.text in texts for fact in findings.neighbors)
    bars = [found for tag, found in page.tags if tag == "i"]
    layers = len(findings.unchanged.ranks)
    assert len(bars) == 2 * layers * len(METHODS)
    changed = [number for number, bar in enumerate(bars) if "class" in bar]
    wanted = [
        2 * layers * place + layers * which + layer
        for place, layer in enumerate(LAYERS.values())
        for which in (0, 1)
        if layer is not None
    ]
    assert changed == wanted


@pytest.mark.parametrize(
    ("probability", "wanted"),
    [(0.0, "<.01"), (0.0049, "<.01"), (0.005, ".01"), (0.934, ".93"), (0.994, ".99"), (1.0, "1.0")],
)
def test_shares(probability, wanted):
    assert share(probability) == wanted


def test_a_method_that_failed_is_named(findings):
    """Its column is the unchanged model's, and must not pass for a result."""
    first, second, *rest = findings.readings
    failed = replace(second, change=replace(second.change, failed={"ask": "no <finite> loss"}))
    found = replace(findings, readings=(first, failed, *rest))
    line = f"{second.name} failed: no <finite> loss."
    assert line in printed(found)
    assert line in " ".join(Page(render(found)).texts)
    assert "failed:" not in printed(findings)
