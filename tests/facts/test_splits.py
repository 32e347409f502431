from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.errors import RequestError
from palimpsest.facts import SPLITS, DataSet, Fact, FactSet, Prompt, split
from palimpsest.facts.splits import CHUNK, order, uniform

OBJECTS = ("China", "France", "India", "Japan")


@dataclass(frozen=True)
class Plan(DataSet):
    """A plan alone: the tests make the facts."""

    def load(self) -> FactSet:
        raise NotImplementedError


def make_facts(
    n: int, classes: Sequence[str] = OBJECTS, relations: Sequence[str] = ("r",)
) -> tuple[Fact, ...]:
    return tuple(
        Fact(
            id=f"{relation}/{i}",
            relation=relation,
            subject=f"Subject {i}",
            prompt=Prompt.fill("fit", "The place {} is in", f"Subject {i}"),
            true=classes[i % len(classes)],
        )
        for relation in relations
        for i in range(n)
    )


def make_set(n: int = 800, **options: Any) -> FactSet:
    others = make_facts(30, relations=("s", "t"))
    return FactSet("toy", "0" * 64, make_facts(n, **options), others, {"records": n})


def everything(facts: Sequence[Fact]) -> list[bool]:
    return [True] * len(facts)


def some(facts: Sequence[Fact]) -> list[bool]:
    return [uniform(fact.id) < 0.4 for fact in facts]


def ids(facts: Sequence[Fact]) -> list[str]:
    return [fact.id for fact in facts]


def test_no_subject_is_in_two_splits() -> None:
    splits = split(make_set(), Plan(limit=10**6, test=10**6, fit=10**6, probe=10**6), 0, everything)
    dealt = [(f.relation, f.subject) for name in SPLITS for f in getattr(splits, name)]
    assert len(dealt) == len(set(dealt))
    assert splits.counts["dev_taken"] == 16
    assert len(dealt) == 800 - splits.counts["dev_dealt"] + 16


@pytest.mark.parametrize("name", [*SPLITS, "others"])
@pytest.mark.parametrize("known", [everything, some])
def test_asking_for_more_only_extends(name: str, known: Any) -> None:
    option = "limit" if name == "target" else name
    sizes = dict.fromkeys(("limit", "test", "fit", "probe", "dev", "others"), 12)
    small = getattr(split(make_set(), Plan(**sizes), 3, known), name)
    large = getattr(split(make_set(), Plan(**(sizes | {option: 24})), 3, known), name)
    assert len(small) == 12
    assert len(large) == 24
    assert ids(large)[:12] == ids(small)


def test_more_facts_move_no_subject() -> None:
    large = Plan(**dict.fromkeys(("limit", "test", "fit", "probe", "dev"), 10**6))
    few = split(make_set(400), large, 0, everything)
    many = split(make_set(800), large, 0, everything)
    for name in SPLITS:
        assert set(ids(getattr(few, name))) <= set(ids(getattr(many, name)))


def test_shares_are_met() -> None:
    shares = {"target": 0.1, "test": 0.1, "fit": 0.5, "probe": 0.3, "dev": 0.0}
    counts = split(make_set(4000), Plan(shares=shares), 0, everything).counts
    for name, share in shares.items():
        assert counts[f"{name}_dealt"] == pytest.approx(4000 * share, abs=120)
    assert counts["dev_dealt"] == 0


def test_classes_and_relations_take_turns() -> None:
    facts = make_set(2000, relations=("a", "b"))
    splits = split(facts, Plan(limit=24, test=41), 0, some)
    assert set(Counter((f.relation, f.true) for f in splits.target).values()) == {3}
    assert {f.relation for f in splits.target[:2]} == {"a", "b"}
    counts = Counter((f.relation, f.true) for f in splits.test).values()
    assert max(counts) - min(counts) <= 1


def test_a_short_class_gives_way() -> None:
    facts = FactSet(
        "toy", "", make_facts(400, ("France", "Italy")) + make_facts(1, ("Japan",), "x")
    )
    fit = split(facts, Plan(fit=60), 0, everything).fit
    assert len(fit) == 60
    assert abs(Counter(f.true for f in fit)["France"] - 30) <= 1


def test_equal_seeds_agree_and_others_differ() -> None:
    first, again, other = (split(make_set(), Plan(), seed, some) for seed in (0, 0, 1))
    assert first == again
    assert set(ids(first.target)) != set(ids(other.target))
    assert split(make_set(), Plan(), 0, some) == split(
        replace(make_set(), facts=make_set().facts[::-1]), Plan(), 0, some
    )


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 150),
    size=st.integers(0, 60),
    seed=st.integers(0, 10),
    rate=st.floats(0, 1),
    classes=st.integers(1, 4),
)
def test_asking_lazily_alters_nothing(
    n: int, size: int, seed: int, rate: float, classes: int
) -> None:
    others = make_facts(n, OBJECTS[:classes], ("a", "b"))
    asked: list[str] = []

    def knows(fact: Fact) -> bool:
        return fact.relation == "r" or uniform("known", fact.id) < rate

    def known(chunk: Sequence[Fact]) -> list[bool]:
        assert 0 < len(chunk) <= CHUNK
        asked.extend(ids(chunk))
        return [knows(fact) for fact in chunk]

    facts = FactSet("toy", "", make_facts(100), others)
    splits = split(facts, Plan(others=size), seed, known)
    assert ids(splits.others) == ids(list(order(filter(knows, others), seed))[:size])
    assert len(asked) == len(set(asked))


def test_few_facts_are_asked_about() -> None:
    counts = split(make_set(8000), Plan(limit=24, test=64), 0, some).counts
    assert counts["target_dealt"] > 1000
    assert counts["target_tried"] <= 24 / 0.4 + 3 * CHUNK
    assert counts["target_known"] >= counts["target_taken"] == 24
    assert "fit_tried" not in counts
    assert counts["records"] == 8000


def test_fit_and_probe_need_no_knowledge() -> None:
    splits = split(make_set(2000), Plan(fit=200, probe=200), 0, some)
    assert {False, True} == set(some(splits.fit)) == set(some(splits.probe))
    for facts in (splits.target, splits.test, splits.dev, splits.others):
        assert all(some(facts))


def test_new_objects_are_uniform_and_independent_of_the_old() -> None:
    splits = split(make_set(20000), Plan(limit=3000), 0, everything)
    pairs = Counter((f.true, f.new) for f in splits.target)
    assert all(true != new for true, new in pairs)
    assert len(pairs) == 12
    # Pearson's statistic with 8 degrees of freedom: above 26.1 once in a thousand seeds.
    assert sum((n - 250) ** 2 / 250 for n in pairs.values()) < 26.1
    assert {f.new for f in splits.test} == {None}
    assert splits.classes == {"r": OBJECTS}


def test_given_new_objects_stay() -> None:
    facts = FactSet("toy", "", tuple(f.replacing("Peru") for f in make_facts(100)))
    assert {f.new for f in split(facts, Plan(), 0, everything).target} == {"Peru"}


def test_neighbors_come_from_the_test_split() -> None:
    splits = split(make_set(2000), Plan(neighbors=3), 0, some)
    tested = {f.prompt.text: f for f in splits.test}
    for fact in splits.target:
        assert [p.id for p in fact.neighbors] == ["neighbor/0", "neighbor/1", "neighbor/2"]
        for prompt in fact.neighbors:
            other = tested[prompt.text]
            assert (other.relation, other.true) == (fact.relation, fact.true)
            assert prompt.span == other.prompt.span
    assert len({f.neighbors for f in splits.target}) > len(OBJECTS)


def test_neighbors_that_a_fact_brings_stay() -> None:
    mine = (Prompt("neighbor/0", "Lyon is in"),)
    facts = FactSet("toy", "", tuple(replace(f, neighbors=mine) for f in make_facts(100)))
    assert {f.neighbors for f in split(facts, Plan(), 0, everything).target} == {mine}


def test_sizes() -> None:
    splits = split(make_set(), Plan(limit=8, others=7), 0, everything)
    assert splits.sizes["target"] == 8
    assert splits.sizes["others"] == 7
    assert list(splits.sizes) == [*SPLITS, "others", "kept"]


def test_a_short_split_is_allowed_and_counted() -> None:
    counts = split(make_set(100), Plan(fit=1000), 0, everything).counts
    assert counts["fit_taken"] == counts["fit_dealt"] < counts["fit_wanted"] == 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "expected at least one target fact, found facts.limit=0; ask for 1 or more"),
        ({"fit": -1}, "expected a size of 0 or more, found facts.fit=-1; ask for 0 or more"),
        ({"neighbors": -2}, "found facts.neighbors=-2"),
        ({"shares": {"target": 1.0}}, "name target, test, fit, probe, dev, found target; give"),
        ({"shares": {}}, "found none; give each of them a fraction"),
        ({"shares": dict.fromkeys(SPLITS, 0.3)}, "fractions that sum to 1, found target=0.3"),
        ({"shares": dict.fromkeys(SPLITS, 0.3)}, "(sum 1.5); change them together"),
        ({"shares": dict.fromkeys(SPLITS, 0.5) | {"fit": -1.0}}, "fit=-1"),
    ],
)
def test_refused_plans(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        split(make_set(), Plan(**options), 0, everything)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_target_left() -> None:
    with pytest.raises(RequestError) as caught:
        split(make_set(), Plan(), 0, lambda facts: [False] * len(facts))
    message = str(caught.value)
    assert message.startswith("expected at least one target fact that the model knows, found 0 of ")
    assert "dealt from the 800 facts of toy; choose another model" in message


def test_one_class_leaves_no_new_object() -> None:
    with pytest.raises(
        RequestError, match=r"two classes .* found only 'Peru' in relation 'r'; use"
    ):
        split(make_set(classes=("Peru",)), Plan(), 0, everything)


def test_prompts_mark_their_subject() -> None:
    prompt = Prompt.fill("fit", "In {} it rains", "Rome")
    assert prompt.text[slice(*(prompt.span or ()))] == "Rome"
    assert Prompt.find("x", "Rome or Rome?", "Rome").span == (8, 12)
    assert Prompt.find("x", "nowhere", "Rome").span is None
    with pytest.raises(RequestError, match=r"exactly one '{}' .* found 2 in"):
        Prompt.fill("fit", "{} and {}", "Rome")


def test_kept_facts_are_of_subjects_that_no_other_fact_asks_of() -> None:
    splits = split(make_set(), Plan(others=7, fit=12), 0, everything)
    assert len(splits.kept) == 12
    assert {f.relation for f in splits.kept} == {"s", "t"}
    assert not {f.subject for f in splits.kept} & {f.subject for f in splits.others}
    more = split(make_set(), Plan(others=7, fit=20), 0, everything)
    assert more.kept[:12] == splits.kept
