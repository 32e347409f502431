import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from palimpsest.evaluate import asking as module
from palimpsest.evaluate.asking import (
    MOST_CANDIDATES,
    Query,
    ask,
    best,
    candidates,
    knows,
    rotation,
)
from palimpsest.facts.fact import Prompt
from palimpsest.facts.splits import Splits
from palimpsest.model.forward import Score, greedy
from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import NOBODY, Tokens
from tests.evaluate.toy import CLASSES, make_fact
from tests.model.tiny import make_handle

MANY = tuple(f"Country {n}" for n in range(100))


# -- asking ----------------------------------------------------------------------------------------


def test_each_answer_holds_its_own_querys_completions(model: ModelHandle) -> None:
    queries = [
        Query(Prompt("a", "The city of Paris is in"), ["France", "New Zealand"], 0),
        Query(Prompt("b", "The capital of Japan is"), ["Paris"], 1),
        Query(Prompt("c", "In"), []),
    ]
    answers = ask(model, queries)
    assert [list(answer) for answer in answers] == [["France", "New Zealand"], ["Paris"], []]
    for query, answer in zip(queries, answers, strict=True):
        for completion in query.completions:
            alone = module.score(model, [model.encode(query.prompt, completion)])[0]
            assert answer[completion].logprob == pytest.approx(alone.logprob, rel=1e-5)


def test_the_best_completion_is_the_likeliest_as_a_whole_string() -> None:
    answer = {"long": Score(-4.0, 4, False), "short": Score(-3.0, 1, False)}
    assert answer["long"].mean_logprob > answer["short"].mean_logprob
    assert best(answer) == "short"


# -- candidates ------------------------------------------------------------------------------------


def test_few_objects_all_compete() -> None:
    fact = make_fact(5)
    assert sorted(candidates(fact, CLASSES)) == sorted(CLASSES)
    assert candidates(fact, CLASSES)[:2] == [fact.true, fact.new]


def test_of_many_objects_a_fixed_number_competes_true_and_new_among_them() -> None:
    for number in range(40):
        fact = make_fact(number, MANY)
        found = candidates(fact, MANY)
        assert len(set(found)) == len(found) == MOST_CANDIDATES
        assert {fact.true, fact.new} <= set(found)


def test_candidates_do_not_depend_on_the_order_of_the_classes() -> None:
    fact = make_fact(3, MANY)
    shuffled = random.Random(0).sample(MANY, len(MANY))
    assert candidates(fact, shuffled) == candidates(fact, MANY)


def test_relations_have_picks_of_their_own_and_facts_of_one_share_theirs() -> None:
    one, two = make_fact(0, MANY), make_fact(4, MANY)
    other = replace(one, relation="another")
    shared = set(candidates(one, MANY)) & set(candidates(two, MANY))
    assert len(shared) >= MOST_CANDIDATES - 4
    assert len(set(candidates(one, MANY)) & set(candidates(other, MANY))) < MOST_CANDIDATES - 4


def test_a_fact_without_a_new_object_has_candidates_too() -> None:
    fact = replace(make_fact(0, MANY), new=None)
    assert len(candidates(fact, MANY)) == MOST_CANDIDATES
    assert candidates(fact, MANY)[0] == fact.true


# -- owners ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "facts"), [(12, 4), (13, 4), (3, 5), (100, 7)])
def test_every_fact_owns_equally_many_prompts(prompts: int, facts: int) -> None:
    owners = rotation(prompts, facts, 0)
    counts = Counter(owners)
    assert len(owners) == prompts
    assert set(owners) <= set(range(facts))
    assert max(counts.values()) - min(counts.get(fact, 0) for fact in range(facts)) <= 1


def test_owners_depend_on_the_seed_alone() -> None:
    random.seed(1)
    state = random.getstate()
    one = rotation(20, 10, 3)
    assert random.getstate() == state
    random.seed(2)
    assert rotation(20, 10, 3) == one
    assert rotation(8, 10, 3) == one[:8]
    assert len({tuple(rotation(20, 10, seed)) for seed in range(5)}) == 5


def test_without_facts_nobody_owns_a_prompt() -> None:
    assert rotation(3, 0, 0) == [NOBODY] * 3


# -- what the model knows --------------------------------------------------------------------------


class Fluent(ModelHandle):
    """Hands over completions as token ids, so that any tokens can be an object."""

    def encode(self, prompt: Prompt, completion: str = "", owner: int = NOBODY) -> Tokens:  # type: ignore[override]
        row = super().encode(prompt, "", owner)
        ids = tuple(int(token) for token in completion.split())
        return Tokens((*row.ids, *ids), row.prompt, row.subject, owner)


def test_a_model_knows_what_it_says_in_every_token() -> None:
    tiny = make_handle()
    model = Fluent(tiny.model, tiny.tokenizer, "fluent", "\n")
    asked, wanted, size = [], [], len(tiny.tokenizer)
    for number in range(6):
        fact = make_fact(number)
        said = greedy(tiny, [tiny.encode(fact.prompt)], 3)[0]
        for wrong in (None, 0, 2):
            ids = [(token + (at == wrong)) % size for at, token in enumerate(said)]
            asked.append(replace(fact, true=" ".join(map(str, ids))))
            wanted.append(wrong is None)
    assert knows(model, asked) == wanted


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the rows that are put to a model."""
    asked: list[int] = []
    real = module.score

    def score(model: ModelHandle, rows: Sequence[Tokens]) -> list[Score]:
        asked.append(len(rows))
        return real(model, rows)

    monkeypatch.setattr(module, "score", score)
    return asked


def test_what_was_asked_is_not_asked_again(
    model: ModelHandle, facts: Splits, counted: list[int]
) -> None:
    first = knows(model, facts.test)
    assert knows(model, facts.test) == first
    assert knows(make_handle(batch_size=2), facts.test) == first
    assert counted == [8]


def test_everything_that_matters_is_asked_anew(
    model: ModelHandle, facts: Splits, counted: list[int]
) -> None:
    some = facts.test[:4]
    first = some[0]
    assert first.prompt.span is not None
    for asked in (
        some,
        some[:3],
        some[::-1],
        (replace(first, true="Rome"), *some[1:]),
        (replace(first, prompt=replace(first.prompt, text="Once again")), *some[1:]),
    ):
        knows(model, asked)
    knows(make_handle(seed=1), some)
    knows(make_handle(prefix="\n\n"), some)
    assert counted == [4, 3, 4, 4, 4, 4, 4]
