"""The undertext map holds what was measured, method by method."""

from functools import partial

import pytest

from palimpsest.record.row import UPSTREAM, Row
from palimpsest.study.summary import summarise
from palimpsest.study.undertext import Undertext, figure, undertext
from tests.study.reading import of

GROUPS = ("last_subject", "last_prompt")
LAYERS = (0, 15, 29)


def rows(begins: int | None, old: float, new: float, relation: str = "r", n: int = 24):
    row = partial(
        Row, axis="recoverability", scope="fact", protocol="frozen", split="target",
        relation=relation,
    )  # fmt: skip
    for layer in LAYERS:
        for group in GROUPS:
            at = partial(row, layer=layer, position=group, n=n)
            note = UPSTREAM if begins is not None and layer < begins else None
            yield at(metric="legibility_old", value=old + layer / 100, note=note)
            yield at(metric="legibility_new", value=new, note=note)
    yield row(metric="legibility_old", layer=29, position="further", value=None, n=0, note="few")


@pytest.fixture
def results(runs, write_run):
    mapped = [
        write_run(*some.rows, *rows(*begins), run_id=some.run_id, method=some.method,
                  config=some.run["config"])
        for some, begins in zip(runs[:2], ((None, 0.6, 0.0), (15, 0.1, 0.5)), strict=True)
    ]  # fmt: skip
    return of(*mapped, *runs[2:])


def test_every_method_with_a_map_has_a_row_of_two(results):
    drawn = figure(results)
    maps = undertext(results)
    shown = [s for s in summarise(results) if (s.run.run_id, "legibility_old") in maps]
    assert len(shown) == 2
    assert len(drawn.data) == 4
    titles = [note.text for note in drawn.layout.annotations]
    assert titles == [f"{s.label}: {name} object" for s in shown for name in ("old", "new")]
    old = drawn.data[0]
    assert list(old.x) == list(LAYERS)
    assert list(old.y) == ["last subject token", "last prompt token"]
    assert old.z[0] == pytest.approx((0.6, 0.75, 0.89))
    assert drawn.data[3].z[1] == pytest.approx((0.5, 0.5, 0.5))


def test_the_line_stands_where_the_change_begins(results):
    lines = figure(results).layout.shapes
    assert {line.x0 for line in lines} == {15}
    assert len(lines) == 2  # the unchanged model has none


def test_relations_weigh_by_their_facts(write_run):
    run = write_run(*rows(None, 0.0, 0.2, "a", 30), *rows(None, 0.0, 0.8, "b", 10))
    found = undertext(of(run))
    assert list(found[run.run_id, "legibility_new"].values()) == pytest.approx([0.35] * 6)
    assert ("further", 29) not in found[run.run_id, "legibility_old"]


def test_runs_without_a_map_have_no_figure(runs):
    assert figure(of(*runs)) is None
    assert Undertext().read(of(*runs)) == ()
