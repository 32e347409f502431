"""A run in which one fact's search diverges finishes, and says so."""

import json

import pytest

from palimpsest.intervene.editors.editor import NOT_FINITE
from palimpsest.record.results import load_runs
from tests.intervene.test_divergence import make_diverge

RATE = "intervene.search.lr=0.25"
"""No other run's, so that none takes its values from this one's or the other way round."""


@pytest.fixture
def lost(done):
    """A target fact of a small run."""
    return done["none"].facts[2]["fact_id"]


@pytest.fixture
def run(call, few, tmp_path, monkeypatch, lost):
    """One run with that fact's search diverging."""

    def finished(*words):
        make_diverge(monkeypatch, [type("Named", (), {"id": lost})])
        outcome = call("run", *few, f"record.dir={tmp_path / 'results'}", *words)
        assert outcome.code == 0, outcome.err
        (found,) = load_runs(tmp_path / "results")
        return found

    return finished


@pytest.mark.parametrize(
    ("name", "protocol", "words"),
    [
        ("rome", "independent", [RATE]),
        ("rome", "batch", [RATE]),
        ("rome", "sequential", [RATE]),
        ("memit", "batch", [RATE, "intervene.span=1"]),
        ("ft", "independent", []),
        ("ft", "batch", []),
    ],
)
def test_its_rows_are_null_and_the_others_have_values(run, lost, name, protocol, words):
    found = run(f"intervene={name}", f"intervene.protocol={protocol}", *words)
    assert (found.path / "DONE").exists()
    together = (name, protocol) == ("ft", "batch")
    rows = [row for row in found.rows if row.split == "target" and row.fact_id is not None]
    nulls = [row for row in rows if NOT_FINITE in (row.note or "")]
    facts = {row.fact_id for row in rows}
    assert len(facts) == 6
    assert {row.fact_id for row in nulls} == (facts if together else {lost})
    assert all((row.value, row.n) == (None, 0) for row in nulls)
    assert {row.axis for row in nulls} >= {"downstream", "recoverability"}
    own = [row for row in rows if row.fact_id == lost]
    assert {row.value for row in own if row.axis != "cost"} == {None}
    values = [row.value for row in rows if row.metric == "efficacy" and row.fact_id != lost]
    assert all((value is None) == together for value in values)
    described = json.loads((found.path / "intervention" / "intervention.json").read_text())
    assert set(described["change"]["failed"]) == (facts if together else {lost})
