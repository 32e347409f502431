"""Every view renders any table, and knows no study by name."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

import palimpsest.report
from palimpsest.cli.report import studies
from palimpsest.errors import RequestError
from palimpsest.record.results import Results
from palimpsest.report.csv import to_csv
from palimpsest.report.latex import to_latex
from palimpsest.report.page import laid, render, write_report
from palimpsest.report.terminal import print_tables
from palimpsest.study import fact_by_fact, headline
from palimpsest.study.intervals import Estimate
from palimpsest.study.table import Heading, Line, Table, Words
from tests.study import reading

TABLE = Table(
    name="mine",
    title="A table of mine",
    headings=[
        Heading(title="method", key="label", style="words"),
        Heading(title="id", style="words", data=True),
        Heading(title="share", short="sh", group="g", meaning="how many", editor="up",
                caution="Beware."),
        Heading(title="change", group="g", signed=True),
        Heading(title="count", style="words"),
        Heading(title="said", style="words"),
    ],
    lines=[
        Line(("none", "a", Estimate(0.5, 0.25, 0.75, 12), Estimate(0.1, 0.05, 0.2, 12), 3,
              Words("Rome", "new")), unchanged=True),
        Line(("<b>_x</b>", "b", Estimate(None, note="failed"), None, None, None),
             control_of="none"),
    ],
    notes=("A note.",),
)  # fmt: skip


def test_csv() -> None:
    one, other = csv.DictReader(io.StringIO(to_csv(TABLE)))
    assert list(one) == [
        "label", "id", "share", "share/low", "share/high", "share/n",
        "change", "change/low", "change/high", "change/n", "count", "said",
    ]  # fmt: skip
    assert (one["share"], one["share/low"], one["share/n"], one["said"]) == (
        "0.5",
        "0.25",
        "12",
        "Rome",
    )
    assert (other["share"], other["share/n"], other["change"]) == ("", "0", "")


def test_latex() -> None:
    text = to_latex(TABLE)
    assert r"0.50 {\scriptsize 0.25--0.75}" in text
    assert r"\textless{}b\textgreater{}\_x" in text
    assert text.count(r"\begin{tabular}") == 2
    assert "Id" not in text


def test_the_terminal_shows_intervals_where_all_fit() -> None:
    wide, narrow = (io.StringIO() for _ in range(2))
    print_tables([TABLE], Console(file=wide, width=100))
    print_tables([TABLE], Console(file=narrow, width=44))
    assert ".50 (.25–.75)" in wide.getvalue()
    assert "+.10*" in narrow.getvalue()
    for text in ("A table of mine", "g: sh share ↑ editor", "Dimmed: controls.", "A note."):
        assert text in wide.getvalue()


def test_the_page(runs) -> None:
    html = render(Results.of(runs), [TABLE], "mine")
    assert "<h2>A table of mine</h2>" in html
    assert "&lt;b&gt;_x&lt;/b&gt;" in html
    assert "<small>control of none</small>" in html
    assert '<a href="mine.csv">' not in html  # there is no caption that it would end
    assert laid(TABLE).footnotes == ["Beware.", "failed"]
    assert laid(TABLE).lines[1][2][1].marks == (2,)


def test_a_line_fits_its_headings() -> None:
    with pytest.raises(ValueError, match="expected 1 cells in each line of t, found 2"):
        Table(name="t", headings=[Heading(title="a")], lines=[Line(("x", 1))])


def test_no_view_names_a_study() -> None:
    folder = Path(palimpsest.report.__file__).parent
    names = [type(study).__module__ for study in studies()]
    for path in folder.rglob("*"):
        if path.suffix in (".py", ".j2"):
            assert not [name for name in names if name in path.read_text(encoding="utf-8")]


def test_the_command_asks_the_studies_of_the_tests() -> None:
    assert studies() == reading.studies()
    assert studies("rome [layer=5]") == reading.studies("rome [layer=5]")
    assert (
        studies(overrides=["~studies.undertext", "studies.localization.margin=0.1"])[4].margin
        == 0.1
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["studies.localization.margn=1"], "margn"),
        (["+studies.mine._target_=no.such.Thing"], "expected studies.mine"),
        (["+studies.along.colour=red"], "studies.along.colour"),
    ],
)
def test_wrong_settings_are_refused_in_a_line(words: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        studies(overrides=words)
    assert "\n" not in str(caught.value)


def test_charts_of_many_runs_are_left_out_and_said(sweep, monkeypatch) -> None:
    for module in (headline, fact_by_fact):
        monkeypatch.setattr(module, "MOST_RUNS", 4)
    html = reading.write_report(sweep).read_text()
    charts = json.loads(html.split('id="charts">')[1].split("</script>")[0])
    assert list(charts) == ["trade_off"]
    for text in ("The curves of 9 runs would not be legible", "The bars of 9 runs"):
        assert text in html
    assert "Each fact’s answers of 9 runs" in html


def test_what_is_passed_over_is_told(sweep, tmp_path) -> None:
    directory = tmp_path / "demo"
    shutil.copytree(sweep, directory, ignore=shutil.ignore_patterns("report.*", "*.csv"))
    (directory / "foreign").mkdir()
    (directory / "foreign" / "run.json").write_text("[]")
    out = io.StringIO()
    page = write_report(directory, [], Console(file=out, width=400))
    assert "<h2>Passed over</h2>" in page.read_text()
    assert out.getvalue().startswith("passed over: cannot read ")
