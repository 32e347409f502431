from collections import Counter
from pathlib import Path

import pytest
import yaml

from palimpsest.facts import FactSet, Prompt, World, split
from palimpsest.facts.countries import RELATIONS
from palimpsest.facts.hops import overlap

CONF = Path(__file__).resolve().parents[2] / "conf" / "facts" / "countries.yaml"

FORWARD = ("country_capital", "country_continent", "country_currency", "country_language")


@pytest.fixture(scope="module", params=sorted(RELATIONS))
def loaded(request: pytest.FixtureRequest) -> tuple[str, FactSet]:
    return request.param, World(relation=request.param).load()


def marked(prompt: Prompt) -> str:
    assert prompt.span is not None
    return prompt.text[slice(*prompt.span)]


def test_facts(loaded: tuple[str, FactSet]) -> None:
    relation, facts = loaded
    assert facts.name == "world"
    assert {fact.relation for fact in facts.facts} == {relation}
    assert len({fact.subject for fact in facts.facts}) == len(facts.facts) > 40
    assert len({fact.id for fact in facts.facts + facts.others}) == len(facts.facts + facts.others)
    steps = list(facts.counts.values())
    assert steps == sorted(steps, reverse=True)
    assert facts.counts["subjects"] == len(facts.facts)
    for fact in facts.facts:
        assert fact.id.startswith(f"world/{relation}/")
        assert not overlap(fact.subject, fact.true)


def test_prompts(loaded: tuple[str, FactSet]) -> None:
    for fact in loaded[1].facts:
        prompts = (fact.prompt, *fact.paraphrases, *(q.prompt for q in fact.entailed))
        assert len(fact.paraphrases) >= 5
        assert {marked(prompt) for prompt in prompts} == {fact.subject}
        assert len({prompt.text for prompt in prompts}) == len(prompts)
        assert len({prompt.id for prompt in prompts}) == len(prompts)
        assert not any(prompt.text.startswith("the ") for prompt in prompts)
        assert not any(prompt.text.endswith(" ") for prompt in prompts)


def test_questions(loaded: tuple[str, FactSet]) -> None:
    _, facts = loaded
    for fact in facts.facts:
        for question in fact.entailed:
            assert fact.true in question.answers
            assert question.answers.keys() == question.premises.keys()
            assert question.answers[fact.true] not in question.prompt.text
            assert marked(question.premises[fact.true]) == fact.true


def test_others_are_of_other_relations(loaded: tuple[str, FactSet]) -> None:
    relation, facts = loaded
    excluded = {relation, "_".join(reversed(relation.split("_")))}
    assert {fact.relation for fact in facts.others} == set(FORWARD) - excluded
    assert all(fact.entailed == () for fact in facts.others)


def test_the_splits_are_usable(loaded: tuple[str, FactSet]) -> None:
    relation, facts = loaded
    options = yaml.safe_load(CONF.read_text(encoding="utf-8"))
    assert options.pop("_target_") == "palimpsest.facts.world.World"
    plan = World(**options | {"relation": relation})
    splits = split(facts, plan, 0, lambda some: [True] * len(some))
    assert splits.sizes["target"] >= 12
    assert min(splits.sizes[name] for name in ("test", "fit", "probe")) >= 3
    assert all(fact.new not in (None, fact.true) for fact in splits.target)


@pytest.mark.parametrize(
    ("relation", "least"),
    [("country_continent", 14), ("country_currency", 5), ("country_language", 5)],
)
def test_small_classes_can_be_left_out(relation: str, least: int) -> None:
    facts = World(relation=relation, min_class=least).load()
    sizes = Counter(fact.true for fact in facts.facts)
    assert len(sizes) >= 5
    assert min(sizes.values()) >= least
    assert facts.counts["subjects"] < facts.counts["discreet"]
    assert facts.fingerprint != World(relation=relation).load().fingerprint


def test_what_is_said() -> None:
    true = {
        relation: {fact.subject: fact for fact in World(relation=relation).load().facts}
        for relation in RELATIONS
    }
    assert true["country_capital"]["the Netherlands"].true == "Amsterdam"
    assert true["country_language"]["Brazil"].true == "Portuguese"
    assert true["country_continent"]["Russia"].true == "Europe"
    assert true["country_currency"]["Japan"].true == "yen"
    assert true["capital_country"]["Washington"].true == "the United States"
    assert true["language_country"]["Hindi"].true == "India"
    assert true["currency_country"]["baht"].true == "Thailand"
    assert "Switzerland" not in true["country_language"]
    assert "Mexico" not in true["country_capital"]
    assert "euro" not in true["currency_country"]
    answers = {q.id: q.answers for q in true["country_capital"]["France"].entailed}
    assert (answers["language"]["Tokyo"], answers["continent"]["Paris"]) == ("Japanese", "Europe")
    assert "Bern" not in answers["language"]
    questions = {q.id: q.prompt.text for q in true["currency_country"]["yen"].entailed}
    assert questions["capital"] == "The yen is the currency of a country whose national capital is"


def test_the_default_is_cities(world: FactSet) -> None:
    assert World().relation == "city_country"
    assert {fact.relation for fact in world.facts} == {"city_country"}
