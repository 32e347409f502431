"""The page stands alone, reads without scripts, and nothing from a data set becomes markup."""

import csv
import json
import re
from html.parser import HTMLParser

import pytest

from palimpsest.errors import RequestError
from palimpsest.report.latex import latex_escape
from tests.study.reading import write_report


class Page(HTMLParser):
    """The page's tags and texts as a browser would find them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.texts.append(data)


@pytest.fixture(scope="module")
def html(sweep) -> str:
    return write_report(sweep).read_text()


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_the_page_loads_nothing(page):
    loading = {"src", "srcset", "poster", "data", "action", "background", "xlink:href"}
    for tag, attributes in page.tags:
        assert not loading & attributes.keys()
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert attributes.get("href") in (None, "report.csv", "report.tex", "recoverable.tex")
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_our_own_part_names_no_address(html):
    data, library, code = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    rest = html.replace(library, "")
    assert "Plotly.newPlot" in code
    assert data in rest
    assert not re.search(r"https?://|url\(|@import", rest)


def test_the_page_is_light(html):
    assert len(html) < 8e6


def test_scripts_are_ours_alone(page):
    assert len(page.scripts) == 3
    assert all("onerror" not in attributes for _, attributes in page.tags)


def test_data_set_text_is_shown_as_it_is(page, hostile):
    for text in hostile:
        assert any(text in shown for shown in page.texts)


def test_the_charts_are_json_that_cannot_end_its_script(page, html):
    raw = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)[0]
    assert "<" not in raw
    charts = json.loads(page.scripts[0])
    assert {"recoverability", "trade_off", "two_hop", "fact-0", "fact-23"} <= charts.keys()
    assert "fact-5" not in charts


def test_the_headline_table_reads_without_scripts(page):
    text = " ".join(" ".join(page.texts).split())
    first_chart = text.index("What can still be read, layer by layer")
    for label in ("rome [variant=plain]", "control of rome [variant=plain]", "oracle gate"):
        assert text.index(label) < first_chart
    assert "an eraser writes no new object" in text[:first_chart]
    assert "Rank no methods by it across layers" in text[:first_chart]


def test_missing_numbers_are_dashes_with_their_cause(html):
    cell = r'title="an eraser writes no new object">\s*<span>–<sup>\d</sup></span>'
    assert re.search(cell, html)


def test_failed_runs_are_listed(page, hostile):
    text = " ".join(page.texts)
    assert "Runs without results" in text
    assert f"singular matrix in layer 12 {hostile[0]}" in text


def test_facts_show_before_and_after(page):
    text = " ".join(page.texts)
    assert "before any change" in text
    assert "first tokens of the two objects are equal" in text


def test_a_single_bare_run_can_be_reported(write_run):
    html = write_report(write_run().path).read_text()
    assert "Fact by fact" not in html
    assert "Runs without results" not in html


def test_nothing_to_report_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError, match="expected finished runs"):
        write_report(tmp_path)


def test_csv_holds_the_headline_table(sweep, html):
    with (sweep / "report.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9
    assert lines[0]["label"] == "none"
    key = "downstream/suppression/candidates"
    for line in lines:
        assert float(line[f"{key}/low"]) <= float(line[key]) <= float(line[f"{key}/high"])
    assert lines[2]["downstream/score/harmonic_mean"] == ""


def test_latex_is_balanced_and_escaped(sweep, html):
    text = (sweep / "report.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3
    assert r"leace\_shuffled" in text
    for block in text.split(r"\begin{tabular}")[1:]:
        columns = len(re.match(r"\{(l r*)\}".replace(" ", ""), block)[1])
        lines = [line for line in block.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {columns - 1}


def test_latex_escape():
    assert latex_escape("a_b & 50% \\x {y} #1 $z\n~^") == (
        r"a\_b \& 50\% \textbackslash{}x \{y\} \#1 \$z \textasciitilde{}\textasciicircum{}"
    )
