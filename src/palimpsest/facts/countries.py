"""Relations between a country and its capital, language, continent and currency; both ways."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from palimpsest.facts import atlas
from palimpsest.facts.atlas import Country
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.facts.hops import HOPS, Asked, overlap

INHABITED = 100_000
"""Inhabitants that a country must have."""

Pairs = Callable[[Country], list[tuple[str, str]]]
"""The (subject, object) pairs that a country gives."""


@dataclass(frozen=True)
class Relation:
    """A relation, and the sentences that state it.

    Attributes:
        pairs: what a country gives.
        fit: the template that methods may fit on: the one with which SmolLM2 knows most facts.
        paraphrases: the templates that no fit sees.
        hops: by second relation, the template about the subject and that about the object.
    """

    pairs: Pairs
    fit: str
    paraphrases: tuple[str, ...]
    hops: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def _capital(country: Country) -> list[tuple[str, str]]:
    return [(country.name, country.capital)] if country.capital else []


def _language(country: Country) -> list[tuple[str, str]]:
    return [(country.name, language) for language in country.languages]


def _continent(country: Country) -> list[tuple[str, str]]:
    return [(country.name, country.continent)]


def _currency(country: Country) -> list[tuple[str, str]]:
    return [(country.name, country.currency)] if country.currency else []


def _inverse(pairs: Pairs) -> Pairs:
    return lambda country: [(true, subject) for subject, true in pairs(country)]


RELATIONS: Mapping[str, Relation] = {
    "country_capital": Relation(
        pairs=_capital,
        fit="The government of {} sits in the capital city of",
        paraphrases=(
            "The capital of {} is the city of",
            "The parliament of {} meets in the capital city,",
            "On the map of {}, a star marks the capital,",
            "The flight to {} landed in its capital,",
            "She moved to {} and lives in the capital,",
            "The capital city of {} is",
        ),
        hops={
            "language": (
                "The official language spoken in the capital of {} is",
                "The official language spoken in the city of {} is",
            ),
            "continent": (
                "The capital city of {} lies on the continent of",
                "The city of {} lies on the continent of",
            ),
        },
    ),
    "country_language": Relation(
        pairs=_language,
        fit="The official language spoken in {} is",
        paraphrases=(
            "The official language of {} is",
            "In {}, the official language is",
            "The national language of {} is",
            "Schools in {} teach in the official language,",
            "Newspapers in {} are written in",
            "Most people in {} speak",
        ),
    ),
    "country_continent": Relation(
        pairs=_continent,
        fit="The country of {} is located on the continent of",
        paraphrases=(
            "On a map, {} is found on the continent of",
            "The country of {} is on the continent of",
            "The people of {} live on the continent of",
            "The nation of {} lies on the continent of",
            "My friend moved to {}, on the continent of",
            "She travelled through {}, a country on the continent of",
        ),
    ),
    "country_currency": Relation(
        pairs=_currency,
        fit="The unit of currency in {} is the",
        paraphrases=(
            "The rent of a flat in {} is paid in the local currency, the",
            "The price of bread in {} is given in the local currency, the",
            "The monetary unit of {} is the",
            "Wages in {} are paid in the local currency, the",
            "Shops in {} take the local currency, the",
            "Taxes in {} are paid in the national currency, the",
        ),
    ),
    "capital_country": Relation(
        pairs=_inverse(_capital),
        fit="{} is the national capital of the country of",
        paraphrases=(
            "The embassy is in {}, the capital of",
            "My friend moved to {}, the capital of",
            "The city of {} is in the country of",
            "The city of {} is the capital of",
            "She was born in {}, the capital of",
            "{} is the capital city of",
        ),
        hops={
            "language": (HOPS["language"].question, HOPS["language"].premise),
            "continent": (HOPS["continent"].question, HOPS["continent"].premise),
        },
    ),
    "language_country": Relation(
        pairs=_inverse(_language),
        fit="People who speak {} mostly live in the country of",
        paraphrases=(
            "The {} language is spoken in the country of",
            "The {} language comes from the country of",
            "Books in {} are mostly printed in the country of",
            "{} is spoken mainly in the country of",
            "{} is the national language of",
            "She learned {} before she moved to the country of",
        ),
        hops={
            "capital": (
                "{} is the official language of a country whose national capital is",
                HOPS["capital"].premise,
            ),
            "continent": (
                "{} is the official language of a country on the continent of",
                HOPS["continent"].premise,
            ),
        },
    ),
    "currency_country": Relation(
        pairs=_inverse(_currency),
        fit="The {} is the money of the country of",
        paraphrases=(
            "The {} is the national currency of",
            "The {} is the currency used in",
            "The {} is the currency of",
            "Shops that take the {} are found in the country of",
            "The {} is the official currency of",
        ),
        hops={
            "capital": (
                "The {} is the currency of a country whose national capital is",
                HOPS["capital"].premise,
            ),
            "language": (
                "The {} is the currency of a country whose official language is",
                HOPS["language"].premise,
            ),
            "continent": (
                "The {} is the currency of a country on the continent of",
                HOPS["continent"].premise,
            ),
        },
    ),
}

_ANSWERS: Mapping[str, Pairs] = {
    "capital": _capital,
    "language": _language,
    "continent": _continent,
}


@dataclass(frozen=True)
class Row:
    """A country and one of the pairs that it gives.

    Attributes:
        country: the country.
        subject: of the pair.
        true: its object.
    """

    country: Country
    subject: str
    true: str


def rows(name: str, min_class: int) -> tuple[list[Row], dict[str, int]]:
    """The usable rows of a relation, and how many each filter left.

    A subject has one object among all countries of the world; neither name contains the other; the
    country is inhabited; the object has `min_class` subjects or more.

    Args:
        name: a key of `RELATIONS`.
        min_class: subjects that an object must have.
    """
    pairs = RELATIONS[name].pairs
    records = [Row(c, *pair) for c in atlas.countries().values() for pair in pairs(c)]
    objects = defaultdict(set)
    for row in records:
        objects[row.subject].add(row.true)
    unambiguous = [row for row in records if len(objects[row.subject]) == 1]
    inhabited = [row for row in unambiguous if row.country.population >= INHABITED]
    discreet = [row for row in inhabited if not overlap(bare(row.subject), bare(row.true))]
    sizes = Counter(row.true for row in discreet)
    large = [row for row in discreet if sizes[row.true] >= min_class]
    steps = {
        "records": records,
        "unambiguous": unambiguous,
        "inhabited": inhabited,
        "discreet": discreet,
        "subjects": large,
    }
    return large, {step: len(left) for step, left in steps.items()}


def bare(name: str) -> str:
    """A name without its article."""
    return name.removeprefix("the ")


def facts(name: str, chosen: Sequence[Row]) -> Iterator[Fact]:
    """The facts that rows of a relation state, with their entailed questions."""
    relation = RELATIONS[name]
    asked = [_asked(hop, *templates, chosen) for hop, templates in relation.hops.items()]
    for row in chosen:
        questions = (hop.about(row.subject) for hop in asked if row.true in hop.answers)
        yield Fact(
            id=f"world/{name}/{_key(name, row)}",
            relation=name,
            subject=row.subject,
            prompt=Prompt.fill("fit", relation.fit, row.subject),
            true=row.true,
            paraphrases=tuple(
                Prompt.fill(f"paraphrase/{i}", template, row.subject)
                for i, template in enumerate(relation.paraphrases)
            ),
            entailed=tuple(question for question in questions if question),
        )


def others(name: str) -> Iterator[Fact]:
    """Facts of the relations from a country to something else, but `name` and its inverse."""
    for other in RELATIONS:
        if other.startswith("country_") and set(other.split("_")) != set(name.split("_")):
            for fact in facts(other, rows(other, 1)[0]):
                yield replace(fact, paraphrases=(), entailed=())


def _key(name: str, row: Row) -> str:
    """What tells a fact of a relation from the others: its country, or its subject."""
    return row.country.iso if name.startswith("country_") else row.subject


def _asked(hop: str, question: str, premise: str, chosen: Sequence[Row]) -> Asked:
    """A second hop over the objects whose country has one answer."""
    found = {row.true: [answer for _, answer in _ANSWERS[hop](row.country)] for row in chosen}
    answers = {name: several[0] for name, several in found.items() if len(several) == 1}
    return Asked(hop, question, premise, answers)
