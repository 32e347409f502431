from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, models, processors, trainers
from transformers import PreTrainedTokenizerFast

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Prompt
from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import NOBODY
from tests.model.tiny import make_handle, tokenizer


@dataclass
class Case:
    template: str
    subject: str


CASES = {
    "begins the prompt": Case("{} is the capital of", "Paris"),
    "ends the prompt": Case("The capital of France is", "France"),
    "stands in the middle": Case("The city of {} is in the country of", "New York"),
    "in quotes": Case('The city of "{}" is in', "Osaka"),
    "has quotes": Case("The city of {} is in", 'the "Big" Apple'),
    "has an apostrophe": Case("{} is in the country of", "L'Aquila"),
    "non-Latin": Case("The city of {} is in", "東京都"),
    "combining and astral": Case("The city of {}, is in", "a\u0301e 🗼"),
    "begins with multi-byte": Case("In {} is the", "Ōsaka"),
    "one letter": Case("{} is in", "Å"),
}


def prompt_of(case: Case) -> Prompt:
    if "{}" in case.template:
        return Prompt.fill("fit", case.template, case.subject)
    return Prompt.find("fit", case.template.replace(" is", ""), case.subject)


def text_of(handle: ModelHandle, ids: tuple[int, ...]) -> str:
    return handle.decode(ids)


@pytest.mark.parametrize("prefix", ["", "\n", "Fact: "])
@pytest.mark.parametrize("name", CASES)
def test_the_subjects_tokens_are_found_by_its_characters(name: str, prefix: str) -> None:
    handle = make_handle(prefix=prefix)
    prompt = prompt_of(CASES[name])
    assert prompt.span is not None

    row = handle.encode(prompt)

    assert row.subject is not None
    first, last = row.subject
    lead = prefix + prompt.text[: prompt.span[0]]
    # Up to its first token there is nothing of it; up to its last token there is all of it.
    assert lead.startswith(text_of(handle, row.ids[:first]))
    assert CASES[name].subject not in text_of(handle, row.ids[:last])
    assert text_of(handle, row.ids[: last + 1]).startswith(lead + CASES[name].subject)
    assert row.at("last_subject") == last
    assert CASES[name].subject in text_of(handle, row.ids[first : last + 1])


def test_a_subject_at_the_end_has_the_prompts_last_token(llama: ModelHandle) -> None:
    row = llama.encode(Prompt.find("fit", "The capital of France", "France"))
    assert row.at("last_subject") == row.at("last_prompt") == len(row.ids) - 1


def test_of_two_occurrences_the_one_in_the_span_counts(llama: ModelHandle) -> None:
    text = "Paris is Paris, of"
    first = llama.encode(Prompt("fit", text, (0, 5)))
    second = llama.encode(Prompt("fit", text, (9, 14)))
    assert first.subject is not None
    assert second.subject is not None
    assert text_of(llama, first.ids[: first.subject[1] + 1]) == "\nParis"
    assert text_of(llama, second.ids[: second.subject[1] + 1]) == "\nParis is Paris"


def test_a_token_that_holds_the_space_before_the_subject_belongs_to_it(llama: ModelHandle) -> None:
    row = llama.encode(Prompt.fill("fit", "The city of {} is", "Paris"))
    assert row.subject is not None
    first, last = row.subject
    assert first == last
    assert text_of(llama, row.ids[first : last + 1]) == " Paris"


def test_a_multibyte_character_ends_at_its_last_byte(llama: ModelHandle) -> None:
    row = llama.encode(Prompt("fit", "東京 is", (0, 1)))
    assert row.subject == (1, 3)  # three bytes, no merge, after the prefix
    assert text_of(llama, row.ids[1:4]) == "東"


@pytest.mark.parametrize(("prompt", "completion"), [("The city of", "Paris"), ("In", "New York")])
def test_prompt_and_completion_are_tokenized_as_one_text(
    llama: ModelHandle, prompt: str, completion: str
) -> None:
    row = llama.encode(Prompt("fit", prompt), completion)
    whole = llama.tokenizer(f"\n{prompt} {completion}", add_special_tokens=False)["input_ids"]
    assert row.ids == tuple(whole)
    assert text_of(llama, row.ids[: row.prompt]) == f"\n{prompt}"
    assert text_of(llama, row.ids[row.prompt :]) == f" {completion}"


def test_the_first_completion_token_carries_the_space(llama: ModelHandle) -> None:
    alone = llama.encode(Prompt("fit", "The city of"))
    row = llama.encode(Prompt("fit", "The city of"), "Paris")
    assert row.prompt == len(alone.ids) == alone.prompt
    assert len(row.ids) == row.prompt + 1
    assert text_of(llama, row.ids[-1:]) == " Paris"


def test_the_prefix_shifts_everything_by_its_tokens() -> None:
    prompt = Prompt.fill("fit", "The city of {} is in", "New York")
    bare = make_handle(prefix="").encode(prompt, "France")
    led = make_handle(prefix="\n\n").encode(prompt, "France")
    assert bare.subject is not None
    assert led.ids[2:] == bare.ids
    assert led.prompt == bare.prompt + 2
    assert led.subject == (bare.subject[0] + 2, bare.subject[1] + 2)


def test_a_prompt_without_a_subject_has_none(llama: ModelHandle) -> None:
    row = llama.encode(Prompt("free", "The capital of"))
    assert row.subject is None
    assert row.owner == NOBODY
    with pytest.raises(ValueError, match="no subject"):
        row.at("last_subject")
    assert row.at("last_prompt") == row.prompt - 1


def test_the_owner_is_kept(llama: ModelHandle) -> None:
    assert llama.encode(Prompt("fit", "The capital of"), "France", owner=7).owner == 7


@pytest.mark.parametrize("text", ["The city of ", "The city of  ", "The city\n", "The city\t"])
@pytest.mark.parametrize("completion", ["", "Paris", "x"])
def test_white_space_at_the_end_of_a_prompt_is_refused(
    llama: ModelHandle, text: str, completion: str
) -> None:
    with pytest.raises(RequestError, match="drop the white space at the end") as caught:
        llama.encode(Prompt("fit", text), completion)
    assert "\n" not in str(caught.value)
    assert repr(text)[1:-1] in str(caught.value)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(RequestError, match="expected a prompt"):
        make_handle(prefix="").encode(Prompt("fit", ""))


def test_a_token_across_the_end_of_the_prompt_is_refused() -> None:
    backend = Tokenizer(models.BPE())  # no pre-tokenizer: merges know no words
    backend.train_from_iterator(["ab cd"] * 9, trainers.BpeTrainer(show_progress=False))
    whole = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert len(whole("ab cd")["input_ids"]) == 1
    handle = ModelHandle(make_handle().model, whole, "tiny")
    with pytest.raises(RequestError, match="ends between two tokens, found 'ab cd'"):
        handle.encode(Prompt("fit", "ab"), "cd")


@pytest.mark.parametrize("name", CASES)
def test_offsets_that_leave_out_the_space_give_the_same_places(name: str) -> None:
    prompt = prompt_of(CASES[name])
    wanted = make_handle().encode(prompt, "Ōsaka")
    backend = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    # As RoBERTa's and Llama 3's.
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    trimmed = PreTrainedTokenizerFast(tokenizer_object=backend)
    spaced = trimmed(" Paris", return_offsets_mapping=True)
    assert spaced["offset_mapping"] == [(1, 6)]
    handle = ModelHandle(make_handle().model, trimmed, "tiny", prefix="\n")
    assert handle.encode(prompt, "Ōsaka") == wanted
