from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from palimpsest.evaluate import asking
from palimpsest.evaluate.asking import Answer
from palimpsest.evaluate.consistency import Consistency, Premises
from palimpsest.evaluate.scene import Scene
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.facts.splits import Splits
from palimpsest.model.forward import Score
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.model.tokens import Tokens
from palimpsest.record.row import Row
from tests.evaluate.toy import ANSWERS, CLASSES, RELATION, Key, by_key, make_fact

CHANGE = Change("fact", True, 1)
FACT = replace(make_fact(0), new="Japan")
"""In France, to be moved to Japan; French becomes Japanese."""
QUESTION = FACT.entailed[0]

Say = Callable[[str, str, int], Score]
"""What a model makes of (prompt, completion) under an owner's change."""


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[Say], list[tuple[str, str, int]]]:
    """Lets a model say what it is told; returns the list of what it is asked."""

    def set_to(told: Say) -> list[tuple[str, str, int]]:
        asked: list[tuple[str, str, int]] = []

        def score(model: ModelHandle, rows: Sequence[Tokens]) -> list[Score]:
            scores = []
            for row in rows:
                prompt = model.decode(row.ids[: row.prompt]).removeprefix(model.prefix)
                completion = model.decode(row.ids[row.prompt :]).removeprefix(" ")
                asked.append((prompt, completion, row.owner))
                scores.append(told(prompt, completion, row.owner))
            return scores

        monkeypatch.setattr(asking, "score", score)
        return asked

    return set_to


def only(*facts: Fact) -> Splits:
    return Splits(facts, (), (), (), (), classes={RELATION: CLASSES})


def tops(*objects: str, fact: Fact = FACT) -> dict[str, Answer]:
    """Answers in which each paraphrase has this object on top."""
    return {
        prompt.id: {name: Score(-1.0 - (name != top), 1, False) for name in CLASSES}
        for prompt, top in zip(fact.paraphrases, objects, strict=True)
    }


def measure(
    model: ModelHandle, facts: Splits, answers: list[dict[str, Answer]], premises: Premises
) -> dict[Key, Row]:
    scene = Scene(model, facts, CHANGE)
    scene.__dict__["answers"] = answers
    return by_key(Consistency().measure(scene, premises))


def premises_of(fact: Fact, **known: bool) -> Premises:
    """What the unchanged model makes of each second hop; true where nothing is said."""
    question = fact.entailed[0]
    return {
        (question.premises[name].text, question.answers[name]): known.get(name, True)
        for name in question.answers
    }


# -- agreement -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objects", "pairs", "true", "new"),
    [
        (("France", "France", "France"), 1, 1, 0),
        (("Japan", "Japan", "Japan"), 1, 0, 1),
        (("Italy", "Italy", "Italy"), 1, 0, 0),
        (("France", "Japan", "France"), 1 / 3, 1 / 3, 0),
        (("Japan", "Japan", "France"), 1 / 3, 0, 1 / 3),
        (("France", "Italy", "Japan"), 0, 0, 0),
    ],
)
def test_agreement_counts_pairs_of_paraphrases(
    model: ModelHandle, objects: tuple[str, ...], pairs: float, true: float, new: float
) -> None:
    fact = replace(FACT, entailed=())
    rows = measure(model, only(fact), [tops(*objects)], {})
    assert rows["agreement", "paraphrase_pairs", fact.id, None].value == pytest.approx(pairs)
    assert rows["agreement_correct", "true", fact.id, None].value == pytest.approx(true)
    assert rows["agreement_correct", "new", fact.id, None].value == pytest.approx(new)
    assert {row.n for row in rows.values()} == {3}
    assert {row.split for row in rows.values()} == {"target"}


@pytest.mark.parametrize("count", [0, 1])
def test_one_paraphrase_cannot_agree(model: ModelHandle, count: int) -> None:
    fact = replace(FACT, entailed=(), paraphrases=FACT.paraphrases[:count])
    rows = measure(model, only(fact), [tops(*["France"] * count, fact=fact)], {})
    assert len(rows) == 3
    assert {(row.value, row.n, row.note) for row in rows.values()} == {
        (None, 0, "fewer than two paraphrases")
    }


# -- two hops --------------------------------------------------------------------------------------


def verdicts(rows: dict[Key, Row], protocol: str, fact: Fact = FACT) -> dict[str, float | None]:
    return {
        kind: rows[f"twohop_{kind}", protocol, fact.id, "language"].value
        for kind in ("new", "old", "neither")
    }


@pytest.mark.parametrize(
    ("argmax", "likeliest", "vocabulary", "candidates"),
    [
        ("Japanese", "Japanese", "new", "new"),
        ("French", "French", "old", "old"),
        ("French", "Japanese", "old", "new"),
        ("Italian", "French", "neither", "old"),
        ("something else", "Italian", "neither", "neither"),
    ],
)
def test_a_question_is_answered_by_the_new_fact_the_old_or_neither(
    model: ModelHandle,
    say: Callable[[Say], list[tuple[str, str, int]]],
    argmax: str,
    likeliest: str,
    vocabulary: str,
    candidates: str,
) -> None:
    asked = say(lambda _, what, __: Score(-1.0 - (what != likeliest), 1, what == argmax))
    fact = replace(FACT, paraphrases=())
    rows = measure(model, only(fact), [{}], premises_of(fact))
    for protocol, wanted in (("vocabulary", vocabulary), ("candidates", candidates)):
        found = verdicts(rows, protocol)
        assert found == {kind: float(kind == wanted) for kind in ("new", "old", "neither")}
    assert all(row.n == 1 for row in rows.values() if row.metric.startswith("twohop"))
    assert sorted(asked) == sorted((QUESTION.prompt.text, what, 0) for what in ANSWERS.values())


def test_each_question_feels_its_own_facts_change(
    model: ModelHandle, say: Callable[[Say], list[tuple[str, str, int]]]
) -> None:
    said = ("Japanese", "French", "English")

    def told(_: str, what: str, owner: int) -> Score:
        return Score(-1.0 - (what != said[owner]), 1, what == said[owner])

    facts = [replace(make_fact(4 * n), new="Japan", paraphrases=()) for n in range(3)]
    say(told)
    premises = {key: value for fact in facts for key, value in premises_of(fact).items()}
    rows = measure(model, only(*facts), [{}] * 3, premises)
    for fact, wanted in zip(facts, ("new", "old", "neither"), strict=True):
        assert fact.true == "France"
        assert verdicts(rows, "candidates", fact)[wanted] == 1.0
        assert verdicts(rows, "vocabulary", fact)[wanted] == 1.0


def test_two_objects_of_one_answer_count_as_that_answer(
    model: ModelHandle, say: Callable[[Say], list[tuple[str, str, int]]]
) -> None:
    """Italy speaks French here, too: the answer still follows from the old fact."""
    question = replace(QUESTION, answers={**ANSWERS, "Italy": "French"})
    fact = replace(FACT, paraphrases=(), entailed=(question,))
    asked = say(lambda _, what, __: Score(-1.0 - (what != "French"), 1, what == "French"))
    rows = measure(model, only(fact), [{}], premises_of(fact))
    assert verdicts(rows, "candidates") == {"new": 0.0, "old": 1.0, "neither": 0.0}
    assert sorted(what for _, what, _ in asked) == ["English", "French", "Japanese"]


@pytest.mark.parametrize(
    ("answers", "known", "cause"),
    [
        ({**ANSWERS, "Japan": "French"}, {}, "old and new fact entail the same answer"),
        (ANSWERS, {"Japan": False}, "the unchanged model does not answer the second hop"),
        (ANSWERS, {"France": False}, "the unchanged model does not answer the second hop"),
        ({"France": "French"}, {}, "no answer is known for one of the objects"),
        ({"Japan": "Japanese"}, {}, "no answer is known for one of the objects"),
    ],
)
def test_a_question_that_cannot_tell_is_null_with_the_cause(
    model: ModelHandle,
    say: Callable[[Say], list[tuple[str, str, int]]],
    answers: dict[str, str],
    known: dict[str, bool],
    cause: str,
) -> None:
    premises = {name: QUESTION.premises[name] for name in answers}
    question = replace(QUESTION, answers=answers, premises=premises)
    fact = replace(FACT, paraphrases=(), entailed=(question,))
    asked = say(lambda *_: Score(-1.0, 1, True))
    rows = measure(model, only(fact), [{}], premises_of(fact, **known))
    null = {key: row for key, row in rows.items() if row.metric.startswith("twohop")}
    assert len(null) == 6
    assert {(row.value, row.n, row.note) for row in null.values()} == {(None, 0, cause)}
    assert {row.protocol for row in null.values()} == {"vocabulary", "candidates"}
    assert {row.prompt_id for row in null.values()} == {"language"}
    assert asked == []


def test_a_premise_of_another_object_may_be_unknown(
    model: ModelHandle, say: Callable[[Say], list[tuple[str, str, int]]]
) -> None:
    say(lambda _, what, __: Score(-1.0, 1, what == "French"))
    fact = replace(FACT, paraphrases=())
    rows = measure(model, only(fact), [{}], premises_of(fact, Italy=False))
    assert verdicts(rows, "vocabulary")["old"] == 1.0


# -- premises --------------------------------------------------------------------------------------


def test_premises_are_asked_once_and_belong_to_nobody(
    model: ModelHandle, say: Callable[[Say], list[tuple[str, str, int]]]
) -> None:
    facts = [replace(make_fact(4 * n), new="Japan") for n in range(3)]
    asked = say(lambda _, what, __: Score(-1.0, 1, what == "Japanese"))
    premises = Consistency().prepare(model, only(*facts), 0)
    french, japanese = "The language of France is", "The language of Japan is"
    assert premises == {(french, "French"): False, (japanese, "Japanese"): True}
    assert sorted(asked) == [(french, "French", -1), (japanese, "Japanese", -1)]


def test_premises_without_an_answer_are_not_asked(
    model: ModelHandle, say: Callable[[Say], list[tuple[str, str, int]]]
) -> None:
    france = {"France": Prompt("premise", "The language of France is")}
    question = replace(QUESTION, answers={"France": "French"}, premises=france)
    asked = say(lambda *_: Score(-1.0, 1, True))
    premises = Consistency().prepare(model, only(replace(FACT, entailed=(question,))), 0)
    assert list(premises) == [("The language of France is", "French")]
    assert len(asked) == 1


def test_premises_are_asked_of_the_real_model(model: ModelHandle) -> None:
    facts = only(*[replace(make_fact(n), new=CLASSES[(n + 1) % 4]) for n in range(4)])
    premises = Consistency().prepare(model, facts, 0)
    assert len(premises) == 4
    for (text, answer), known in premises.items():
        row = model.encode(Prompt("premise", text), answer)
        assert asking.score(model, [row])[0].argmax == known
