"""Contexts: as many as asked for, the seed's, and the subject is still where the span says."""

import pytest
import torch

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Prompt
from palimpsest.intervene.editors.prefixes import GivenPrefixes, SampledPrefixes, in_contexts
from palimpsest.model.forward import greedy
from palimpsest.model.handle import ModelHandle
from palimpsest.model.sample import start_ids
from palimpsest.model.tokens import Tokens
from tests.intervene.conftest import CONTEXTS, TARGETS, fact


def test_spans_mark_the_subject_in_every_context() -> None:
    for target in TARGETS:
        prompts = in_contexts(target, CONTEXTS)
        assert prompts[0] == target.prompt
        assert len(prompts) == len(CONTEXTS) + 1
        assert len({prompt.id for prompt in prompts}) == len(prompts)
        for prompt, context in zip(prompts[1:], CONTEXTS, strict=True):
            assert prompt.text == f"{context}. {target.prompt.text}"
            assert prompt.span is not None
            first, end = prompt.span
            assert prompt.text[first:end] == target.subject


def test_a_context_that_names_the_subject_is_not_taken_for_it() -> None:
    target = fact("Borland", "French", "Greek", "In {} they speak")
    (_, prompt) = in_contexts(target, ("Borland is a city {} in Borland",))
    assert prompt.span == (len("Borland is a city {} in Borland. In "), len(prompt.text) - 11)
    assert prompt.text[slice(*prompt.span)] == "Borland"


def test_the_subjects_last_token_is_found_in_every_context(model: ModelHandle) -> None:
    for target in TARGETS:
        for prompt in in_contexts(target, (*CONTEXTS, "Où est «Borland» ? 東京 🗼")):
            row = model.encode(prompt)
            upto = model.decode(row.ids[: row.at("last_subject") + 1])
            assert upto.endswith(target.subject)
            assert model.decode(row.ids) == model.prefix + prompt.text


def test_a_fit_prompt_without_its_subject_is_refused() -> None:
    broken = fact("Borland", "French", "Greek", "In {} they speak")
    object.__setattr__(broken, "prompt", Prompt("fit", "They speak"))
    with pytest.raises(ValueError, match=r"fact Borland/.* has a fit prompt without its subject"):
        in_contexts(broken, ())


def test_given_contexts_are_taken_as_they_are(gpt2: ModelHandle) -> None:
    assert GivenPrefixes(["One", "Two "]).texts(gpt2) == ("One", "Two ")
    assert GivenPrefixes().texts(gpt2) == ()


def test_by_default_ten_contexts_of_each_length_are_sampled(model: ModelHandle) -> None:
    texts = SampledPrefixes().texts(model)
    assert len(texts) == 20
    assert all(text == text.strip() for text in texts)
    assert all(len(short) < len(long) for short, long in zip(texts[:1], texts[-1:], strict=True))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_there_are_as_many_contexts_as_asked_for(gpt2: ModelHandle, count: int) -> None:
    assert len(SampledPrefixes([2, 3, 4], count).texts(gpt2)) == 3 * count
    assert SampledPrefixes([], count).texts(gpt2) == ()


def test_contexts_are_the_seeds(model: ModelHandle) -> None:
    first = SampledPrefixes([4, 6], 3, seed=1).texts(model)
    torch.manual_seed(77)
    assert SampledPrefixes([4, 6], 3, seed=1).texts(model) == first
    assert SampledPrefixes([4, 6], 3, seed=2).texts(model) != first
    assert len(set(first)) > 1


def test_contexts_follow_the_model(model: ModelHandle) -> None:
    start = tuple(start_ids(model))
    (likeliest,) = greedy(model, [Tokens(start, len(start))], 6)
    texts = SampledPrefixes([6], 2, top_k=1).texts(model)
    assert texts == (model.decode(likeliest).strip(),) * 2


@pytest.mark.parametrize(
    ("mistake", "name"),
    [({"count": -1}, "count"), ({"top_k": 0}, "top_k"), ({"lengths": [5, 0]}, "lengths")],
)
def test_a_size_that_is_too_small_is_refused(mistake: dict[str, object], name: str) -> None:
    with pytest.raises(RequestError, match=f"intervene.prefixes.{name}"):
        SampledPrefixes(**mistake)
