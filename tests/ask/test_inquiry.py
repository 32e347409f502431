"""From the user's words to prompts and questions."""

import pytest

from palimpsest.ask.inquiry import inquire
from palimpsest.ask.kinds import kinds
from palimpsest.ask.wordings import CONTEXTS, PREMISES, WORDINGS, fill
from palimpsest.errors import RequestError
from palimpsest.facts.atlas import fold

TOWER = ("The Eiffel Tower is located in the city of", "the Eiffel Tower", "Paris", "London")


def test_the_subject_is_spelt_as_in_the_prompt():
    fact = inquire(*TOWER).fact
    assert fact.subject == "The Eiffel Tower"
    assert fact.prompt.span == (0, len(fact.subject))


@pytest.mark.parametrize(
    ("prompt", "subject", "old", "new", "relations"),
    [
        (*TOWER, {"country", "language", "currency"}),
        ("Marie Curie was born in the city of", "Marie Curie", "Warsaw", "Paris",
         {"country", "language", "currency"}),
        ("Mount Fuji is in the country of", "Mount Fuji", "Japan", "France",
         {"capital", "language", "continent", "currency"}),
        ("The Louvre is in the city of", "The Louvre", "Paris", "Lyon", set()),
        ("People in Brazil speak the language", "Brazil", "Portuguese", "French", set()),
        ("The colour of milk is", "milk", "white", "black", set()),
    ],
)  # fmt: skip
def test_what_is_asked(prompt, subject, old, new, relations):
    inquiry = inquire(prompt, subject, old, new)
    assert {question.name for question in inquiry.questions} == relations
    for question in inquiry.questions:
        assert not {fold(a) for a in question.old} & {fold(a) for a in question.new}
        assert len(question.premises) == 2
        start, end = question.prompt.span
        assert question.prompt.text[start:end].lower() == inquiry.fact.subject.lower()
        assert old not in question.prompt.text


def test_paraphrases_hold_the_subject_and_are_not_the_prompt():
    inquiry = inquire(*TOWER, paraphrases=["Where is the Eiffel Tower? In"])
    texts = [prompt.text for prompt in inquiry.fact.paraphrases]
    assert texts[0] == "Where is the Eiffel Tower? In"
    assert len(texts) == len(set(texts)) >= 1 + len(CONTEXTS)
    assert inquiry.fact.prompt.text not in texts
    assert all(prompt.span is not None for prompt in inquiry.fact.paraphrases)
    assert "It is well known that the Eiffel Tower is located in the city of" in texts


def test_a_name_of_cities_in_many_countries_is_not_known():
    assert "city" not in kinds("Córdoba")
    assert kinds("Paris")["city"]["country"] == ("France",)
    assert set(kinds("Singapore")) == {"city", "country"}
    assert kinds("the Netherlands")["country"] == kinds("netherlands")["country"]


def test_every_question_has_a_premise():
    for wording in WORDINGS:
        for name, templates in wording.questions.items():
            assert PREMISES[wording.kind][name].count("{}") == 1
            assert all(template.count("{}") == 1 for template in templates)


def test_an_article_is_written_large_where_a_sentence_begins():
    assert fill("{} is", "the Alps") == "The Alps is"
    assert fill("In {}", "The Alps") == "In the Alps"
    assert fill("In {}", "Anna") == "In Anna"


def test_the_user_s_questions_and_neighbors():
    inquiry = inquire(*TOWER, questions=["2 + 2 = is asked in=French|English"], neighbors=["a=b=c"])
    given = inquiry.questions[-1]
    assert (given.prompt.text, given.old, given.new) == (
        "2 + 2 = is asked in", ("French",), ("English",),
    )  # fmt: skip
    assert (inquiry.neighbors[0].prompt.text, inquiry.neighbors[0].true) == ("a=b", "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, r"^expected a text for prompt, found an empty one; write it out$"),
        ({"prompt": " \n"}, r"expected a text for prompt, found an empty one"),
        ({"prompt": "The Eiffel Tower is in "}, r"prompt without white space .* 'The Eiffel Tower"),
        ({"subject": ""}, r"expected a text for subject"),
        ({"subject": "Big Ben"}, r"holds its subject 'Big Ben', found 'The Eiffel .*; name the"),
        ({"old": ""}, r"expected a text for old"),
        ({"new": " "}, r"expected a text for new"),
        ({"new": " London"}, r"new without white space at its ends, found ' London'; remove it"),
        ({"new": "paris"}, r"two different objects, found 'Paris' .* 'paris' .*; name another"),
        ({"old": "\udcff"}, r"expected old in UTF-8, found .*; set the terminal"),
        ({"paraphrases": [""]}, r"expected a text for --paraphrase, found an empty one"),
        ({"paraphrases": ["x "]}, r"expected --paraphrase without white space"),
        ({"questions": ["Where?"]}, r"expected --question 'TEXT=OLD\|NEW', found 'Where\?'; write"),
        ({"questions": ["Where?=a"]}, r"expected --question 'TEXT=OLD\|NEW'"),
        ({"questions": ["Where?=a|b|c"]}, r"expected --question 'TEXT=OLD\|NEW'"),
        ({"questions": ["=a|b"]}, r"expected --question 'TEXT=OLD\|NEW'"),
        ({"questions": ["Where? =a|b"]}, r"the text of --question without white space"),
        ({"questions": ["Where?=a|A"]}, r"whose two answers differ, found 'a' twice; ask another"),
        ({"neighbors": ["Where?"]}, r"expected --neighbor 'TEXT=OBJECT', found 'Where\?'; write"),
    ],
)
def test_wrong_words(change, message):
    words = dict(zip(("prompt", "subject", "old", "new"), TOWER, strict=True)) | change
    with pytest.raises(RequestError, match=message) as caught:
        inquire(**words)
    assert "\n" not in str(caught.value)
