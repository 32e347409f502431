from collections import Counter

import pytest
from omegaconf import OmegaConf

from palimpsest.errors import RequestError
from palimpsest.facts import Fact, FactSet, Prompt, World, atlas, split
from palimpsest.facts.atlas import City
from palimpsest.facts.world import FIT, PARAPHRASES


def marked(prompt: Prompt) -> str:
    assert prompt.span is not None
    return prompt.text[slice(*prompt.span)]


def test_facts(world: FactSet) -> None:
    assert world.name == "world"
    assert len({f.id for f in world.facts + world.others}) == len(world.facts + world.others)
    assert len({(f.relation, f.subject) for f in world.facts}) == len(world.facts)
    assert set(Counter(f.true for f in world.facts).values()) == {World().per_class}
    assert "Brazil" in world.objects("city_country")
    true = {f.subject: f.true for f in world.facts}
    assert true["Osaka"] == "Japan"
    assert true["Marseille"] == "France"
    assert world.counts["subjects"] == len(world.facts)
    steps = list(world.counts.values())
    assert steps == sorted(steps, reverse=True)


def test_prompts_mark_the_subject_and_name_no_object(world: FactSet) -> None:
    names = [name.removeprefix("the ") for name in world.objects("city_country")]
    for fact in world.facts:
        prompts = (fact.prompt, *fact.paraphrases, *(q.prompt for q in fact.entailed))
        assert {marked(prompt) for prompt in prompts} == {fact.subject}
        assert len({prompt.text for prompt in prompts}) == len(prompts)
        assert len({prompt.id for prompt in prompts}) == len(prompts)
        assert not any(name in prompt.text for name in names for prompt in prompts)


def test_paraphrases_are_other_texts_than_the_one_fitted_on() -> None:
    assert len(PARAPHRASES) >= 4
    assert FIT not in PARAPHRASES
    assert len(set(PARAPHRASES)) == len(PARAPHRASES)


def test_questions_give_no_answer_away(world: FactSet) -> None:
    objects = set(world.objects("city_country"))
    for fact in world.facts:
        for question in fact.entailed:
            assert set(question.answers) == set(question.premises) == objects
            assert question.prompt.id == question.id
            for answer in question.answers.values():
                assert answer.casefold() not in question.prompt.text.casefold()


def test_answers(world: FactSet) -> None:
    fact = next(f for f in world.facts if f.subject == "Pune")
    answers = {q.id: q.answers for q in fact.entailed}
    assert answers["capital"]["India"] == "New Delhi"
    assert answers["language"]["India"] == "Hindi"
    assert answers["continent"]["Russia"] == "Europe"
    states = World(classes=["US", "FR"], per_class=9).load()
    premises = {q.id: q.premises["the United States"].text for q in states.facts[0].entailed}
    assert premises["capital"] == "The national capital of the United States is"
    delhi = next(f for f in world.facts if f.subject == "Delhi")
    assert [q.id for q in delhi.entailed] == ["language", "continent"]


def test_others_are_about_other_countries(world: FactSet) -> None:
    relations = {"country_capital", "country_continent", "country_language"}
    assert {f.relation for f in world.others} == relations
    assert not {f.subject for f in world.others} & set(world.objects("city_country"))
    by_id = {f.id: f for f in world.others}
    assert by_id["world/country_capital/NL"].subject == "the Netherlands"
    assert by_id["world/country_language/AT"].true == "German"
    assert by_id["world/country_continent/AR"].true == "South America"
    assert "world/country_capital/MX" not in by_id
    assert "world/country_continent/ZA" not in by_id
    assert "world/country_language/CH" not in by_id
    assert all(marked(f.prompt) == f.subject for f in world.others)


@pytest.mark.parametrize("seed", range(5))
def test_large_splits_stay_balanced(world: FactSet, seed: int) -> None:
    splits = split(world, World(fit=2880, probe=800), seed, lambda facts: [True] * len(facts))
    for facts, each in ((splits.fit, 360), (splits.probe, 100), (splits.target, 3)):
        assert set(Counter(f.true for f in facts).values()) == {each}
    assert len({f.relation for f in splits.others[:3]}) == 3
    assert all(len(f.neighbors) == 5 for f in splits.target)


def test_clean_names() -> None:
    names = ["Xi'an", "St. Louis", "Saint-Étienne", "Lyon 03", "Halle (Saale)", "Neustadt/Süd"]
    names += ["Mianzhu, Deyang", "Circoiscrizione II", "El Paso"]
    kept = atlas.clean(City(i, name, "FR", 1) for i, name in enumerate(names))
    assert [c.name for c in kept] == ["Xi'an", "St. Louis", "Saint-Étienne", "El Paso"]


def test_discreet_names() -> None:
    countries = atlas.countries()
    names = ["Indianapolis", "Germantown", "American Fork", "Peru", "Jordanville", "Boston"]
    classes = [countries[iso] for iso in ("US", "IN", "DE")]
    kept = atlas.discreet([City(i, n, "US", 1) for i, n in enumerate(names)], classes, countries)
    assert [c.name for c in kept] == ["Jordanville", "Boston"]


def test_unambiguous_names() -> None:
    everywhere = [
        City(1, "Paris", "FR", 2_000_000),
        City(2, "Córdoba", "ES", 300_000),
        City(3, "Cordoba", "AR", 1_000_000),
        City(4, "Paris", "US", 25_000),
        City(5, "Paris", "FR", 10_000),
        City(6, "Lyon", "FR", 500_000),
    ]
    assert [c.id for c in atlas.unambiguous(everywhere, everywhere)] == [1, 6]


def test_countries() -> None:
    countries = atlas.countries()
    assert "CS" not in countries
    names = {iso: countries[iso].name for iso in ("GB", "NL", "PH", "AE", "CZ", "FR", "BA")}
    assert names["GB"] == "the United Kingdom"
    assert names["NL"] == "the Netherlands"
    assert names["PH"] == "the Philippines"
    assert names["AE"] == "the United Arab Emirates"
    assert names["CZ"] == "the Czech Republic"
    assert names["FR"] == "France"
    assert countries["TW"].languages[0] == "Chinese"
    assert countries["BE"].languages[0] == "Dutch"


def test_the_fingerprint_covers_what_alters_facts(world: FactSet) -> None:
    assert World(limit=3, fit=7, shares={}).load().fingerprint == world.fingerprint
    assert World(per_class=100).load().fingerprint != world.fingerprint
    fewer = World(classes=["FR", "JP"]).load()
    assert fewer.fingerprint != world.fingerprint
    assert fewer.objects("city_country") == ("France", "Japan")
    assert len(world.fingerprint) == 64


def test_it_is_a_structured_config() -> None:
    config = OmegaConf.merge(OmegaConf.structured(World), {"classes": ["FR", "BR"], "limit": 3})
    options = {str(key): config[key] for key in config}
    facts = World(**options).load()
    known: list[Fact] = []
    splits = split(
        facts, World(**options), 0, lambda some: [known.extend(some) is None] * len(some)
    )
    assert splits.sizes["target"] == 3
    assert known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["FR", "fr"]}, "found 'fr' in facts.classes; did you mean 'FR'?"),
        ({"classes": ["FR", "the Netherlands"]}, "use codes such as 'FR' or 'JP'"),
        ({"classes": ["FR", "Italy"]}, "found 'Italy' in facts.classes; did you mean 'IT'?"),
        ({"classes": ["FR"]}, "two or more different countries, found facts.classes=[FR]; name"),
        ({"classes": ["FR", "JP", "FR"]}, "found facts.classes=[FR,JP,FR]; name each country once"),
        ({"classes": ["FR", "AQ"]}, "cities of Antarctica (AQ), found none"),
        ({"per_class": 0}, "found facts.per_class=0; ask for 1 or more"),
        ({"min_class": 0}, "expected facts.min_class to be at least 1, found 0; raise it"),
        ({"relation": "country_capitol"}, "found 'country_capitol'; did you mean 'country_capit"),
        ({"relation": "country_capital", "min_class": 2}, "two or more objects of country_capital"),
    ],
)
def test_refused_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        World(**options).load()  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
