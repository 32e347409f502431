"""Causal tracing: equal to whole forward passes, and what it means at the ends."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.locate.corruption import noise, other_subjects, subject_spread
from palimpsest.locate.tracing import Trace, Tracing
from palimpsest.model.forward import next_token_logprobs
from palimpsest.model.handle import ModelHandle
from palimpsest.model.positions import GROUPS, group_of
from palimpsest.model.tokens import Tokens
from tests.locate import literal_trace
from tests.model.tiny import KINDS, SENTENCES, make_handle

EVERY = ["residual", "mlp", "attention", "residual_mlp_severed", "residual_attention_severed"]


def fact(number: int, template: str, subject: str, true: str) -> Fact:
    return Fact(str(number), "r", subject, Prompt.fill("fit", template, subject), true)


WORDS = sorted({word for sentence in SENTENCES for word in sentence.strip(".").split()})

SHAPES = (
    fact(0, "The city of {} is in the country of", "New York", "France"),
    fact(1, "{} lies in", "Osaka", "Japan"),
    fact(2, "They say that {}", "Paris", "Rome"),
    fact(3, "The official language of {} is", "New Delhi", "Indian English"),
)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> ModelHandle:
    return make_handle(request.param)


def told(model: ModelHandle, fact: Fact) -> Fact:
    """The same fact with the word for its object that the model finds likeliest."""
    rows = [model.encode(fact.prompt, word) for word in WORDS]
    logprobs = next_token_logprobs(model, [replace(r, ids=r.ids[: r.prompt]) for r in rows[:1]])[0]
    best = max(range(len(WORDS)), key=lambda n: float(logprobs[rows[n].ids[rows[n].prompt]]))
    return replace(fact, true=WORDS[best])


@pytest.fixture
def facts(model: ModelHandle) -> tuple[Fact, ...]:
    """Of which the model has something to lose."""
    return tuple(told(model, each) for each in SHAPES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tracing(**options: Any) -> Tracing:
    return Tracing(**{"stride": 1, "window": 2, **options})


def row_of(model: ModelHandle, fact: Fact) -> Tokens:
    return model.encode(fact.prompt, fact.true)


def assert_literal(
    model: ModelHandle, trace: Trace, shifts: list[torch.Tensor], how: Tracing
) -> None:
    for kind in how.kinds:
        found = trace.effects[how.protocol(kind)]
        assert found.abs().max() > 1e-3, kind
        expected = literal_trace.effects(model, trace.row, shifts, kind, how.window, trace.places)[
            :, list(trace.layers)
        ]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_effects_equal_those_of_whole_passes(
    model: ModelHandle, facts: tuple[Fact, ...], window: int
) -> None:
    how = tracing(kinds=EVERY, window=window, level=0.7)
    traces = list(how.trace(model, facts[1:3]))
    assert [trace.fact.id for trace in traces] == ["1", "2"]
    for trace in traces:
        shifts = noise(model, trace.row, 0.7, 2, how.seed)
        chances = [literal_trace.run(model, trace.row, s)[0] for s in (None, *shifts)]
        assert [trace.clean, *trace.corrupted.tolist()] == pytest.approx(chances, abs=1e-5)
        assert_literal(model, trace, shifts, how)


def test_another_subject_in_place_equals_its_own_prompt(
    model: ModelHandle, facts: tuple[Fact, ...]
) -> None:
    """With all of another subject's embeddings the corrupted run is the run of its own prompt."""
    pair = (facts[0], fact(9, "The city of {} is in the country of", "New Zealand", "nothing"))
    how = tracing(corruption="other_subject", samples=1)
    rows = [row_of(model, each) for each in pair]
    assert rows[0].subject == rows[1].subject
    trace = next(iter(how.trace(model, pair)))
    swapped = replace(rows[1], ids=(*rows[1].ids[: rows[1].prompt], rows[0].ids[rows[0].prompt]))
    assert float(trace.corrupted) == pytest.approx(
        literal_trace.run(model, swapped, None)[0], abs=1e-5
    )
    shifts = other_subjects(model, pair, rows, 0, 1, 0)
    assert_literal(model, trace, shifts, how)


def test_a_fact_without_another_subject_is_null_with_the_cause(
    model: ModelHandle, facts: tuple[Fact, ...]
) -> None:
    how = tracing(corruption="other_subject")
    trace = next(iter(how.trace(model, facts[:1])))
    assert trace.cause == "no other subject of the relation has another object and as many tokens"
    assert trace.effects == {}
    rows = list(how.rows(trace, "target"))
    assert {row.metric for row in rows} == {
        "clean_probability",
        "corrupted_probability",
        "total_effect",
    }
    assert [row.value is None for row in rows] == [False, True, True]
    assert {row.note for row in rows if row.value is None} == {trace.cause}


def test_restoring_the_last_block_at_the_last_token_restores_the_answer(
    model: ModelHandle, facts: tuple[Fact, ...]
) -> None:
    trace = next(iter(tracing(kinds=["residual"], level=0.7).trace(model, facts)))
    assert float(trace.effects["residual"][-1, -1]) == pytest.approx(trace.total, abs=1e-6)
    assert trace.effects["residual"][:-1, -1].abs().max() < 1e-6


def test_a_window_as_wide_as_the_model_restores_all_that_a_token_adds(
    model: ModelHandle, facts: tuple[Fact, ...]
) -> None:
    how = tracing(kinds=["mlp"], window=4, level=0.7, layers=[2])
    trace = next(iter(how.trace(model, facts)))
    shifts = noise(model, trace.row, 0.7, 2, 0)
    assert_literal(model, trace, shifts, how)


def test_facts_traced_together_are_as_each_by_itself(
    model: ModelHandle, facts: tuple[Fact, ...]
) -> None:
    model.batch_size = 64
    how = tracing(kinds=EVERY, level=0.7)
    together = list(how.trace(model, facts))
    for each, whole in zip(facts, together, strict=True):
        alone = next(iter(how.trace(model, [each])))
        assert alone.clean == pytest.approx(whole.clean, abs=1e-6)
        for kind, effects in alone.effects.items():
            torch.testing.assert_close(effects, whole.effects[kind], rtol=0, atol=1e-6)


def test_noise_is_measured_in_the_subjects_own_embeddings(
    model: ModelHandle, facts: tuple[Fact, ...]
) -> None:
    rows = [row_of(model, each) for each in facts]
    table = model.model.get_input_embeddings().weight
    ids = [i for row in rows for i in row.ids[row.subject[0] : row.subject[1] + 1]]  # type: ignore[index]
    assert subject_spread(model, rows) == pytest.approx(float(table[ids].std()), rel=1e-6)
    assert tracing().deviation(model, rows) == pytest.approx(3 * float(table[ids].std()), rel=1e-6)
    assert tracing(level=0.1).deviation(model, rows) == 0.1


def test_samples_are_the_seeds(model: ModelHandle, facts: tuple[Fact, ...]) -> None:
    first, again, other = (
        next(iter(tracing(seed=seed, level=0.7).trace(model, facts))).corrupted
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first[0] != first[1]
    more = next(iter(tracing(samples=3, level=0.7).trace(model, facts))).corrupted
    torch.testing.assert_close(more[:2], first)


def test_what_was_traced_is_kept(
    model: ModelHandle, facts: tuple[Fact, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = tracing(level=0.7)
    first = list(how.trace(model, facts))
    monkeypatch.setattr(Tracing, "compute", None)
    for one, other in zip(first, how.trace(model, facts), strict=True):
        assert torch.equal(one.effects["residual"], other.effects["residual"])


def test_the_model_is_left_alone(model: ModelHandle, facts: tuple[Fact, ...]) -> None:
    before = literal_trace.run(model, row_of(model, facts[0]), None)[0]
    list(tracing(kinds=EVERY).trace(model, facts))
    assert literal_trace.run(model, row_of(model, facts[0]), None)[0] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


# -- positions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "prompt", "expected"),
    [
        (
            (2, 4),
            8,
            "first_subject middle_subject last_subject first_subsequent further last_prompt",
        ),
        ((1, 1), 4, "last_subject first_subsequent last_prompt"),
        ((1, 2), 4, "first_subject last_subject last_prompt"),
        ((0, 2), 3, "first_subject middle_subject last_subject"),
        ((0, 0), 1, "last_subject"),
    ],
)
def test_position_groups(subject: tuple[int, int], prompt: int, expected: str) -> None:
    row = Tokens(tuple(range(prompt)), prompt, subject)
    assert " ".join(group_of(row, place) for place in range(subject[0], prompt)) == expected
    assert set(expected.split()) <= set(GROUPS)


def test_before_the_subject_there_is_no_group() -> None:
    with pytest.raises(ValueError, match="from the subject on"):
        group_of(Tokens((1, 2, 3), 3, (1, 1)), 0)


def test_named_positions_are_one_token_of_each_group(
    model: ModelHandle, facts: tuple[Fact, ...]
) -> None:
    whole = next(iter(tracing(level=0.7).trace(model, facts)))
    named = next(iter(tracing(level=0.7, tokens="named").trace(model, facts)))
    groups = [named.group(place) for place in named.places]
    assert len(groups) == len(set(groups))
    assert set(groups) == {whole.group(place) for place in whole.places}
    for number, place in enumerate(named.places):
        expected = whole.effects["mlp_window_2"][whole.places.index(place)]
        torch.testing.assert_close(named.effects["mlp_window_2"][number], expected)


# -- rows ------------------------------------------------------------------------------------------


def test_rows_hold_every_state_and_the_means_of_groups(
    model: ModelHandle, facts: tuple[Fact, ...]
) -> None:
    how = tracing(level=0.7)
    trace = next(iter(how.trace(model, facts)))
    rows = list(how.rows(trace, "target"))
    assert {(r.axis, r.scope, r.split, r.fact_id, r.relation, r.n) for r in rows if r.n > 1} == {
        ("localization", "fact", "target", "0", "r", 2)
    }
    by_key = {(r.metric, r.protocol, r.layer, r.position): r.value for r in rows}
    assert len(by_key) == len(rows)
    total = by_key["total_effect", "noise", None, None]
    assert total == pytest.approx(trace.clean - float(trace.corrupted.mean()))
    effects = trace.effects["mlp_window_2"]
    for number, place in enumerate(trace.places):
        found = by_key["indirect_effect", "noise/mlp_window_2", 1, f"token/{place}"]
        assert found == pytest.approx(float(effects[number, 1]))
    further = [n for n, place in enumerate(trace.places) if trace.group(place) == "further"]
    assert len(further) > 1
    expected = float(effects[further, 1].mean())
    assert by_key["indirect_effect", "noise/mlp_window_2", 1, "further"] == pytest.approx(expected)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, r"noise above 0, found tracing\.noise=0"),
        ({"level": 0.0}, r"noise above 0, found tracing\.level=0"),
        ({"level": float("nan")}, r"noise above 0, found tracing\.level=nan"),
        ({"samples": 0}, r"tracing\.samples"),
        ({"window": 0}, r"tracing\.window"),
        ({"stride": 0}, r"tracing\.stride"),
        ({"kinds": []}, r"tracing\.kinds"),
        ({"kinds": ["mpl"]}, r"tracing\.kinds to be one of .*'mpl'; did you mean 'mlp'"),
        ({"tokens": "some"}, r"tracing\.tokens to be one of all, named"),
        ({"corruption": "nois"}, r"did you mean 'noise'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tracing(**options)


def test_what_cannot_be_traced_is_refused(model: ModelHandle, facts: tuple[Fact, ...]) -> None:
    lost = replace(facts[0], prompt=Prompt("fit", "He lives in"))
    for how, some, message in (
        (tracing(), [lost], "the subject in the prompt of every traced fact, found fact 0"),
        (tracing(window=5), facts, r"a window of at most 4 blocks for tiny-\w+, found"),
        (tracing(layers=[4]), facts, r"a layer from 0 to 3 .*set tracing\.layers"),
    ):
        with pytest.raises(RequestError, match=message):
            list(how.trace(model, some))


def test_a_subject_that_is_the_whole_prompt_has_nothing_after_it() -> None:
    model = make_handle("llama", prefix="")
    whole = told(model, fact(5, "{}", "New Zealand", "Rome"))
    how = tracing(level=0.7)
    trace = next(iter(how.trace(model, [whole])))
    assert trace.places == tuple(range(trace.row.prompt))
    assert trace.group(trace.places[-1]) == "last_subject"
    assert_literal(model, trace, noise(model, trace.row, 0.7, 2, 0), how)
