import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from palimpsest.errors import RequestError
from palimpsest.facts import FactFile, Prompt, split

PARIS: dict[str, Any] = {
    "id": "paris",
    "relation": "city_country",
    "subject": "Paris",
    "prompt": "{} is a city in",
    "true": "France",
    "new": "Japan",
    "paraphrases": ["Where is Paris? Paris lies in", "They flew to {}, in"],
    "neighbors": ["Lyon is a city in"],
    "entailed": [
        {
            "id": "capital",
            "prompt": "{} is in a country whose capital is",
            "premises": {"France": "The capital of {} is", "Japan": "The capital of Japan is"},
            "answers": {"France": "Paris", "Japan": "Tokyo"},
        }
    ],
}
QUESTION = PARIS["entailed"][0]
BARE = {key: PARIS[key] for key in ("relation", "subject", "prompt", "true")}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes records, or texts as they are, one a line."""

    def to(*records: object) -> Path:
        path = tmp_path / "facts.jsonl"
        rows = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return path

    return to


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        FactFile(path=str(path), **options).load()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_full_record(write: Write) -> None:
    (fact,) = FactFile(path=str(write(PARIS))).load().facts
    assert (fact.id, fact.relation, fact.subject) == ("paris", "city_country", "Paris")
    assert (fact.true, fact.new) == ("France", "Japan")
    assert fact.prompt == Prompt("fit", "Paris is a city in", (0, 5))
    assert fact.paraphrases == (
        Prompt("paraphrase/0", "Where is Paris? Paris lies in", (16, 21)),
        Prompt("paraphrase/1", "They flew to Paris, in", (13, 18)),
    )
    assert fact.neighbors == (Prompt("neighbor/0", "Lyon is a city in"),)
    (question,) = fact.entailed
    assert question.id == "capital"
    assert question.prompt == Prompt("capital", "Paris is in a country whose capital is", (0, 5))
    assert question.premises["France"].text == "The capital of France is"
    assert question.premises["Japan"] == Prompt(
        "capital/premise", "The capital of Japan is", (15, 20)
    )
    assert question.answers == {"France": "Paris", "Japan": "Tokyo"}


def test_a_short_record(write: Write) -> None:
    facts = FactFile(path=str(write(BARE))).load()
    (fact,) = facts.facts
    assert fact.id == "file/city_country/Paris"
    assert fact.new is None
    assert fact.paraphrases == fact.neighbors == fact.entailed == ()
    assert facts.counts == {"records": 1, "selected": 1}
    assert facts.name == "file"


def test_relations_left_out_are_the_others(write: Write) -> None:
    path = write(BARE, BARE | {"relation": "other"})
    facts = FactFile(path=str(path), relations=["other"]).load()
    assert [f.relation for f in facts.facts] == ["other"]
    assert [f.relation for f in facts.others] == ["city_country"]
    assert facts.fingerprint != FactFile(path=str(path)).load().fingerprint
    message = refusal(path, relations=["otter"])
    assert "found 'otter' in facts.relations; did you mean 'other'?" in message


def test_the_fingerprint_is_of_the_file(write: Write) -> None:
    one = FactFile(path=str(write(BARE))).load().fingerprint
    assert FactFile(path=str(write(BARE)), limit=3).load().fingerprint == one
    assert FactFile(path=str(write(BARE | {"true": "Italy"}))).load().fingerprint != one


def test_it_can_be_split(write: Write) -> None:
    rows = [
        BARE | {"subject": f"Town {i}", "true": ("France", "Japan", "Peru")[i % 3]}
        for i in range(90)
    ]
    plan = FactFile(path=str(write(*rows)), limit=12)
    splits = split(plan.load(), plan, 0, lambda facts: [True] * len(facts))
    assert splits.sizes["target"] == 12
    assert all(fact.new in ("France", "Japan", "Peru") for fact in splits.target)


def test_it_is_a_structured_config(write: Write) -> None:
    config = OmegaConf.merge(OmegaConf.structured(FactFile), {"path": str(write(BARE))})
    assert FactFile(**{str(key): config[key] for key in config}).load().facts


def test_no_path() -> None:
    assert refusal("").startswith("facts=file needs facts.path=FILE, found no path; give a JSONL")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    assert "expected a JSONL file at" in refusal(tmp_path / "gone.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert refusal(empty) == f"expected facts in {empty}, found none; write one a line"


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in PARIS.items() if key not in keys}


def question(**changes: Any) -> dict[str, Any]:
    return PARIS | {"entailed": [QUESTION | changes]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "expected the line to be an object, found 3; correct it"),
        ([PARIS], "expected the line to be an object, found [{"),
        (without("true"), "expected the key true, found none; add it"),
        (PARIS | {"truth": "x"}, "expected a known key, found 'truth'; did you mean 'true'?"),
        (PARIS | {"paraphrase": []}, "found 'paraphrase'; did you mean 'paraphrases'"),
        (PARIS | {"subject": 7}, "expected subject to be a text, found 7; correct it"),
        (PARIS | {"new": None}, "expected new to be a text, found None; correct it"),
        (PARIS | {"id": True}, "expected id to be a text, found True"),
        (PARIS | {"true": ""}, "expected true to be a text, found '', which is empty; fill it in"),
        (PARIS | {"true": " \t"}, "found ' \\t', which is empty"),
        (PARIS | {"true": " France"}, "expected true without white space around it, found ' Fr"),
        (PARIS | {"prompt": "{} is in "}, "expected prompt to end without white space, found '{} "),
        (PARIS | {"prompt": "Rome is in"}, "prompt to hold its subject 'Paris' or one '{}' in its"),
        (PARIS | {"prompt": "{} and {}"}, "expected prompt to hold its subject 'Paris' or one"),
        (PARIS | {"paraphrases": "{} x"}, "expected paraphrases to be a list, found '{} x'"),
        (PARIS | {"paraphrases": ["{} x", 1]}, "expected paraphrases[1] to be a text, found 1"),
        (PARIS | {"paraphrases": ["Rome is"]}, "expected paraphrases[0] to hold its subject"),
        (
            PARIS | {"paraphrases": ["Paris is a city in"]},
            "expected paraphrases[0] to be a prompt of its own, found 'Paris is a city in' as in "
            "prompt; change one",
        ),
        (PARIS | {"neighbors": ["Lyon is", "Lyon is"]}, "found 'Lyon is' as in neighbors[0]"),
        (PARIS | {"neighbors": [""]}, "expected neighbors[0] to be a text, found ''"),
        (PARIS | {"new": "France"}, "expected new to differ from true, found 'France' twice"),
        (PARIS | {"subject": "Par\x07is"}, "without control characters, found U+0007 in 'Par\\x07"),
        (PARIS | {"true": "Fra\nnce"}, "expected true without control characters, found U+000A"),
        (PARIS | {"prompt": "{}\x00 is"}, "expected prompt without control characters, found U+0"),
        (PARIS | {"entailed": {}}, "expected entailed to be a list, found {}"),
        (PARIS | {"entailed": [[]]}, "expected entailed[0] to be an object, found []"),
        (question(premise={}), "found 'entailed[0].premise'; did you mean 'premises'?"),
        (question(answers=[]), "expected entailed[0].answers to be an object, found []"),
        (question(answers={" x": "y"}), "each key of entailed[0].answers without white space"),
        (question(answers={"France": ""}), "expected entailed[0].answers['France'] to be a text"),
        (question(prompt="Rome is in"), "expected entailed[0].prompt to hold its subject 'Paris'"),
        (
            question(answers={"France": "Paris"}),
            "expected entailed[0].premises and answers to name the same objects, found 'Japan' in "
            "one of them; add it to both",
        ),
        (
            question(answers={"France": "Paris"}, premises={"France": "The capital of {} is"}),
            "expected entailed[0].premises and answers to name 'Japan', found ['France']; add it",
        ),
        (
            PARIS | {"entailed": [QUESTION, QUESTION | {"prompt": "{} lies where they say"}]},
            "expected entailed[1].id to be its own, found 'capital' again; change one",
        ),
    ],
)
def test_wrong_records(write: Write, record: object, message: str) -> None:
    path = write(BARE | {"subject": "Rome"}, record)
    told = refusal(path)
    assert told.startswith(f"{path}, line 2: ")
    assert message in told
    assert f"`palimpsest facts check {path}` tells all" in told


def test_half_of_a_surrogate_pair(write: Write) -> None:
    path = write(json.dumps(BARE | {"true": "\ud83d"}))
    assert "expected true without control characters, found U+D83D in '\\ud83d'" in refusal(path)


def test_repeats(write: Write) -> None:
    assert (
        "line 3: expected each subject of a relation once, found 'Paris' as in line 1; remove one"
        in refusal(write(BARE, "", BARE | {"id": "x"}))
    )
    path = write(PARIS, BARE | {"id": "paris", "subject": "Rome"})
    assert "line 2: expected each id once, found 'paris' as in line 1" in refusal(path)
    assert FactFile(path=str(write(BARE, BARE | {"relation": "r", "id": "x"}))).load().facts


def test_subjects_that_only_differ_in_how_accents_are_composed(write: Write) -> None:
    path = write(BARE | {"subject": "F\u00e9camp"}, BARE | {"subject": "Fe\u0301camp"})
    assert "expected each subject of a relation once" in refusal(path)


def test_the_first_problem_is_told_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "my facts.jsonl"
    path.write_text("{}\n[\n")
    message = refusal(path)
    assert message.startswith(f"{path}, line 1: expected the key relation, found none; add it")
    assert f", and 4 more problems; `palimpsest facts check {shlex.quote(str(path))}`" in message
    path.write_text("[\n" + json.dumps(PARIS | {"new": 1}))
    assert ", and 1 more problem; " in refusal(path)


# -- subjects and objects of every kind -----------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "prompt", "span"),
    [
        ("Paris", "{} lies in", (0, 5)),
        ("Paris", "{}", (0, 5)),
        ("Paris", "Paris", (0, 5)),
        ("Who wrote Hamlet?", "Who wrote Hamlet?", (0, 17)),
        ('The "Great" Gatsby', "{} was written by", (0, 18)),
        ("l'Étoile d'Or", "They ate at l'Étoile d'Or, in", (12, 25)),
        ('"Heroes"', 'He sang "Heroes" in', (8, 16)),
        ("東京", "{}は日本の", (0, 2)),
        ("東京", "私は東京に住む", (2, 4)),
        ("القاهرة", "تقع القاهرة في", (4, 11)),
        ("Санкт-Петербург", "Город {} находится в", (6, 21)),
        ("नई दिल्ली", "{} की भाषा", (0, 9)),
        ("👩‍🚀", "The {} flew to", (4, 7)),
        ("{}", "The braces {} mean", (11, 13)),
        ("a.b*c", "The file a.b*c is in", (9, 14)),
        ("Rom", "In Rom, near the Romans, one speaks", (3, 6)),
        ("C++", "Programs in C++ are compiled by", (12, 15)),
        ("Line", "Q: Where is Line?\n\tA: Line is in", (22, 26)),
    ],
)
def test_subjects(write: Write, subject: str, prompt: str, span: tuple[int, int]) -> None:
    (fact,) = FactFile(path=str(write(BARE | {"subject": subject, "prompt": prompt}))).load().facts
    assert fact.prompt.span == span
    assert fact.prompt.text[slice(*span)] == subject == fact.subject


def test_objects_of_several_words_that_begin_alike(write: Write) -> None:
    objects = ["New York", "New York City", "New Zealand", "the United States", "São Tomé", "日本"]
    rows = [BARE | {"subject": f"S{i}", "true": objects[i % 6]} for i in range(120)]
    plan = FactFile(path=str(write(*rows)))
    splits = split(plan.load(), plan, 0, lambda facts: [True] * len(facts))
    assert splits.classes == {"city_country": tuple(sorted(objects))}
    assert {fact.true for fact in splits.target} == set(objects)
    assert all(fact.new in objects and fact.new != fact.true for fact in splits.target)


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "facts.md"
    path = tmp_path / "facts.jsonl"
    path.write_text(page.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0])
    lyon, kyoto = FactFile(path=str(path)).load().facts
    assert lyon.prompt.text == "The city of Lyon is in the country of"
    assert kyoto.prompt.span == (12, 17)
    assert kyoto.entailed[0].premises["Japan"].text == "The official language of Japan is"
