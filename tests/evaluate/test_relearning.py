"""Relearning: what was only masked comes back, what was never known does not, nothing is left."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.evaluate.asking import NOT_FINITE
from palimpsest.evaluate.attacks import relearning as module
from palimpsest.evaluate.attacks.relearning import NO_LESSONS, Relearning
from palimpsest.evaluate.attacks.returning import INDEPENDENT
from palimpsest.evaluate.scene import Scene, ask_targets
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.record.row import Row
from tests.evaluate.taught import loss, saying, taught
from tests.evaluate.toy import make_splits
from tests.model.tiny import make_handle

JOINT = Change("relation", False, 2)


@pytest.fixture(scope="module")
def short() -> Splits:
    """One paraphrase a target."""
    facts = make_splits()
    target = tuple(replace(f, paraphrases=f.paraphrases[:1]) for f in facts.target)
    return replace(facts, target=target)


def measure(
    model: ModelHandle, facts: Splits, change: Change = JOINT, seed: int = 0, **options: object
) -> list[Row]:
    method = Relearning(**options)  # type: ignore[arg-type]
    return list(method.measure(Scene(model, facts, change, seed), None))


def mean(rows: Sequence[Row], metric: str, protocol: str, step: int) -> float:
    found = [r for r in rows if (r.metric, r.protocol, r.step) == (metric, protocol, step)]
    return fmean(row.value for row in found if row.value is not None)


def state(model: ModelHandle) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def assert_as_before(model: ModelHandle, before: dict[str, Tensor]) -> None:
    after = model.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())
    assert model.changes == []
    assert model.running is None


# -- what is found ---------------------------------------------------------------------------------


def test_what_was_masked_comes_back_and_what_was_never_known_does_not(short: Splits) -> None:
    """Two models, one taught the target facts, behind the same mask and the same lessons."""
    others = (*short.test, *short.fit, *short.probe)
    for known in (True, False):
        model = taught([*others, *(short.target if known else ())])
        with saying(model, short.target, "France"):
            rows = measure(model, short, steps=[0, 30], lr=3e-3, batch=16)
        before, after = (mean(rows, "relearned_old", "paraphrases", step) for step in (0, 30))
        assert before <= 0.4
        assert after >= 0.6 if known else after <= 0.4
        assert mean(rows, "relearned_test", "fit_prompt", 30) >= 0.7


def test_before_the_first_step_it_is_what_suppression_says(
    model: ModelHandle, facts: Splits
) -> None:
    rows = measure(model, facts, steps=[0])
    answers = ask_targets(model, facts)
    for fact, own in zip(facts.target, answers, strict=True):
        wins = [
            max(own[p.id], key=lambda name: own[p.id][name].logprob) == fact.true
            for p in fact.paraphrases
        ]
        [row] = [r for r in rows if (r.fact_id, r.protocol) == (fact.id, "paraphrases")]
        assert (row.value, row.n) == (fmean(wins), 3)


# -- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_step_is_that_of_plain_training(kind: str, facts: Splits) -> None:
    """The weights that are asked about, against torch's AdamW on a plain loss."""
    model, plain = (make_handle(kind, batch_size=size) for size in (3, 64))
    seen: list[list[Tensor]] = []
    lessons = module._lessons(model, facts, 0)
    method = Relearning(steps=[3], batch=8, lr=1e-2, blocks=2)
    weights = method._weights(model)

    def look(step: int) -> object:
        seen.append([weight.detach().clone() for weight in weights])
        return step

    assert module._course(model, method, weights, lessons, look) == {3: 3}  # type: ignore[arg-type]
    trained = [plain.writers(layer) for layer in (2, 3)]
    trained = [weight.requires_grad_() for pair in trained for weight in pair]
    adam = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for step in range(3):
        adam.zero_grad()
        some = [lessons[n % len(lessons)] for n in range(8 * step, 8 * step + 8)]
        (sum(loss(plain, [row]) for row in some) / 8).backward()  # type: ignore[union-attr]
        adam.step()
    for found, wanted, before in zip(seen[0], trained, weights, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-3, atol=1e-4)
        assert not torch.equal(found, before)


def test_no_target_or_test_subject_is_in_the_lessons(model: ModelHandle, facts: Splits) -> None:
    stray = replace(facts.target[0], id="stray", relation=facts.fit[0].relation)
    foreign = replace(facts.fit[0], id="foreign", relation="capital", subject="Elsewhere")
    more = replace(facts, fit=(*facts.fit, stray, foreign))
    lessons = module._lessons(model, more, 0)
    wanted = {model.encode(f.prompt, f.true) for f in (*facts.fit, *facts.probe)}
    assert set(lessons) == wanted
    assert len(lessons) == len(wanted)
    assert lessons == module._lessons(model, replace(more, target=facts.target[::-1]), 0)
    assert lessons != module._lessons(model, more, 1)


def test_in_bfloat16_steps_add_up(facts: Splits) -> None:
    """Steps far below the precision of the weights move them all the same."""
    model = make_handle("llama", batch_size=16)
    model.model.bfloat16()
    method = Relearning(steps=[20], lr=4e-4, batch=4)
    weights, seen = method._weights(model), []

    def look(step: int) -> object:
        seen.extend(weight.detach().clone() for weight in weights)
        return step

    module._course(model, method, weights, module._lessons(model, facts, 0), look)  # type: ignore[arg-type]
    large = [(w.abs() > 0.5) & (w.abs() < 1) for w in weights]  # spaced by 1/256 or more
    moved = [(a != b)[big].double().mean() for a, b, big in zip(seen, weights, large, strict=True)]
    assert fmean(map(float, moved)) > 0.2


def test_gradients_flow_through_a_hook(model: ModelHandle, facts: Splits) -> None:
    """The hook stays on while the model is trained: what it adds changes where training leads."""
    said = []
    for strength in (0.0, 0.5):
        shift = torch.full((32,), strength)
        with model.hooked([(model.blocks[1], lambda state: state + shift)]):  # noqa: B023
            course = module._course(
                model,
                Relearning(steps=[2], lr=1e-2),
                model.writers(0),
                module._lessons(model, facts, 0),
                lambda _: model.writers(0)[1].detach().clone(),  # type: ignore[arg-type, return-value]
            )
        said.append(course[2])
    assert not torch.equal(*said)  # type: ignore[call-overload]
    assert not torch.equal(said[1], model.writers(0)[1])  # type: ignore[arg-type]


# -- what is left ----------------------------------------------------------------------------------


@contextmanager
def hooked(model: ModelHandle) -> Iterator[None]:
    with model.hooked([(model.blocks[1], lambda states: states * 0.5)]):
        yield


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("around", [nullcontext, hooked])
def test_the_model_is_restored(
    kind: str, facts: Splits, around: Callable[..., AbstractContextManager[None]]
) -> None:
    model = make_handle(kind, batch_size=16)
    before = state(model)
    with around(model) if around is hooked else nullcontext():
        first = measure(model, facts, steps=[0, 2], lr=1e-2)
        assert_as_before(model, before)
        assert measure(model, facts, steps=[2, 0], lr=1e-2) == first
    assert_as_before(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["_learn", "_move", "ask_unseen"])
def test_the_model_is_restored_after_an_error(
    model: ModelHandle,
    facts: Splits,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: type[BaseException],
) -> None:
    before, real, calls = state(model), getattr(module, place), []

    def failing(*args: object, **options: object) -> object:
        found = real(*args, **options)
        calls.append(place)
        if len(calls) == (1 if place == "ask_unseen" else 3):
            raise error
        return found

    monkeypatch.setattr(module, place, failing)
    with pytest.raises(error):
        measure(model, facts, steps=[0, 4], lr=1e-2)
    assert_as_before(model, before)


def test_a_reader_who_stops_leaves_nothing_behind(model: ModelHandle, facts: Splits) -> None:
    before = state(model)
    rows = Relearning(steps=[2], lr=1e-2).measure(Scene(model, facts, JOINT), None)
    next(rows)
    assert_as_before(model, before)


# -- what is null ----------------------------------------------------------------------------------


def test_independent_edits_are_null_with_the_cause(model: ModelHandle, facts: Splits) -> None:
    before = state(model)
    rows = measure(model, facts, Change("fact", True, 2))
    assert {(row.value, row.n, row.note) for row in rows} == {(None, 0, INDEPENDENT)}
    same = measure(model, facts)

    def keys(some: Sequence[Row]) -> list[tuple[object, ...]]:
        return [(r.metric, r.protocol, r.fact_id, r.step, r.prompt_id) for r in some]

    assert keys(rows) == keys(same)
    assert len(set(keys(rows))) == len(rows)
    assert_as_before(model, before)


def test_without_lessons_all_is_null(model: ModelHandle, facts: Splits) -> None:
    rows = measure(model, replace(facts, fit=(), probe=()))
    assert {(row.value, row.note) for row in rows} == {(None, NO_LESSONS)}


def test_a_ruined_model_has_no_values(
    model: ModelHandle, facts: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruin(adam: object, precise: object, weights: Sequence[Tensor]) -> None:
        for weight in weights:
            weight.detach().fill_(torch.nan)

    monkeypatch.setattr(module, "_move", ruin)
    rows = measure(model, facts, steps=[0, 3])
    ruined = [row for row in rows if row.step == 3]
    assert {(row.value, row.note) for row in ruined} == {(None, NOT_FINITE)}
    assert all(math.isfinite(row.value or 0) for row in rows)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"steps": [-1]}, r"relearning\.steps to be at least 0, found -1"),
        ({"steps": [2, 2]}, r"relearning\.steps to name each value once, found \[2, 2\]"),
        ({"steps": []}, r"relearning\.steps to be at least 1, found 0"),
        ({"batch": 0}, r"relearning\.batch to be at least 1, found 0"),
        ({"lr": 0.0}, r"relearning\.lr to be a finite number above 0, found 0"),
        ({"blocks": 0}, r"relearning\.blocks to be at least 1, found 0"),
    ],
)
def test_bad_settings_are_refused(mistake: dict, message: str) -> None:
    with pytest.raises(RequestError, match=rf"evaluate\.{message}"):
        Relearning(**mistake)
