"""`palimpsest trace`: every effect a row, pictures beside it, taken up where it stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from palimpsest.locate.tracing import Tracing
from palimpsest.record.results import Run, load_runs
from tests.cli.conftest import Call, Tiny

FACTS = ("facts=counterfact", "facts.relations=[P17]", "facts.limit=3", "record=local")
SMALL = ("tracing.window=2", "tracing.stride=1")


@pytest.fixture
def words(tiny: Tiny) -> list[str]:
    return [f"model.path={tiny.model}", f"facts.path={tiny.facts}", *FACTS, *SMALL]


def only(directory: Path) -> Run:
    (run,) = load_runs(directory)
    return run


def test_a_trace_leaves_rows_facts_pictures_and_a_page(call: Call, words: list[str]) -> None:
    outcome = call("trace", *words)
    assert outcome.code == 0, outcome.err
    run = only(Path("results/traces"))
    assert run.method == "trace"
    assert {row.axis for row in run.rows} == {"localization"}
    assert len(run.select("total_effect", "noise")) == 3
    effects = run.select("indirect_effect", "noise/mlp_window_2", position="last_subject")
    assert sorted({row.layer for row in effects}) == [0, 1, 2, 3]
    assert {row.fact_id for row in effects} == {fact["fact_id"] for fact in run.facts}
    for fact in run.facts:
        first, last = fact["subject_tokens"]
        assert "".join(fact["tokens"][first : last + 1]).strip() == fact["subject"]
    for name in ("report.html", "trace.csv", "figures/aie.png", "figures/average.pdf"):
        assert (Path("results/traces") / name).stat().st_size > 0
    assert "last_subject" in outcome.out or "last subject" in outcome.out


def test_facts_that_the_tiny_model_knows_hang_on_their_subjects(
    call: Call, words: list[str]
) -> None:
    assert call("trace", *words, "tracing.samples=5").code == 0
    run = only(Path("results/traces"))
    total = [row.value for row in run.select("total_effect", "noise")]
    assert min(total) > 0.2  # type: ignore[type-var]  # training rounds as the machine does
    last = run.select("indirect_effect", "noise/residual", layer=3, position="last_prompt")
    assert [row.value for row in last] == pytest.approx(total, abs=1e-5)


def test_what_is_done_is_left_alone(call: Call, words: list[str]) -> None:
    assert call("trace", *words).code == 0
    before = only(Path("results/traces")).rows
    outcome = call("trace", *words)
    assert outcome.code == 0
    assert "done before, left as it is" in outcome.err
    assert only(Path("results/traces")).rows == before


def test_an_interrupted_trace_goes_on(
    call: Call, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("trace", *words, "record.dir=whole").code == 0
    rows: Callable[..., Any] = Tracing.rows
    seen: list[str] = []

    def failing(self: Tracing, trace: Any, split: str) -> Any:
        seen.append(trace.fact.id)
        if len(seen) == 2:
            raise RuntimeError("the power went")
        return rows(self, trace, split)

    monkeypatch.setattr(Tracing, "rows", failing)
    assert call("trace", *words, "record.dir=halved").code == 1
    (run,) = Path("halved").glob("*/run.json")
    assert json.loads(run.read_text())["status"] == "failed"
    assert call("trace", *words, "record.dir=halved").code == 0
    assert len(seen) == 4  # the first fact's rows were kept
    assert only(Path("halved")).rows == only(Path("whole")).rows


def test_a_grid_of_traces_is_told_together(call: Call, words: list[str]) -> None:
    outcome = call("trace", "-m", *words, "seed=0,1", "facts.limit=1")
    assert outcome.code == 0, outcome.err
    assert len(load_runs(Path("results/traces"))) == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tracing.window=5", "a window of at most 4 blocks for"),
        ("tracing.noise=0", "noise above 0, found tracing.noise=0"),
        ("tracing.layers=[9]", "a layer from 0 to 3"),
        ("tracing.kinds=[mpl]", "did you mean 'mlp'"),
        ("tracing.tokns=all", "did you mean 'tracing.tokens'"),
        ("split=probe", "split to be one of target, test, dev, others"),
        ("split=test", "facts that the model knows in the split test, found none"),
        ("intervene=rome", "found 'intervene'"),
        ("seed=x", "expected seed to be int, found 'x'"),
    ],
)
def test_bad_requests_are_told_in_one_line(
    call: Call, words: list[str], word: str, message: str
) -> None:
    outcome = call("trace", *words, word)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not list(Path().glob("results/traces/*/run.json"))


def test_the_configuration_is_shown_without_a_report(call: Call) -> None:
    outcome = call("trace", "--cfg", "job")
    assert outcome.code == 0
    assert "palimpsest.locate.tracing.Tracing" in outcome.out
    assert not Path("results").exists()
