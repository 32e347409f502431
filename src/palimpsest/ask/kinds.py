"""What kind of thing an object is, and what follows from it: looked up in the atlas."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeAlias

from palimpsest.facts import atlas
from palimpsest.facts.atlas import Country
from palimpsest.facts.countries import bare

Answers: TypeAlias = Mapping[str, tuple[str, ...]]
"""By second relation (`"language"`), every accepted answer, the usual one first."""

ALIASES = {
    "GB": ("England", "Britain", "Great Britain", "the UK", "Scotland", "Wales"),
    "US": ("America", "the USA", "the US", "United States of America"),
    "NL": ("Holland",),
    "CZ": ("Czechia",),
}
"""Other names that a country goes by, or, of the United Kingdom, those of its parts."""


def kinds(name: str) -> dict[str, Answers]:
    """The kinds of thing that a name stands for, each with what follows from it.

    Kinds are `city`, `country`, `language`, `currency` and `continent`. A city counts only if its
    name means cities of one country (see `atlas.unambiguous`).
    """
    found = {kind: lookup(name) for kind, lookup in _LOOKUPS.items()}
    return {kind: answers for kind, answers in found.items() if answers is not None}


def _city(name: str) -> Answers | None:
    for wanted in (name, f"{name} City"):
        named = [city for city in _cities() if atlas.fold(city.name) == atlas.fold(wanted)]
        home = [_countries()[city.iso] for city in atlas.unambiguous(named, named)[:1]]
        if home:
            followed = _follows(home[0])
            del followed["capital"]
            return {"country": (home[0].name, *ALIASES.get(home[0].iso, ())), **followed}
    return None


def _country(name: str) -> Answers | None:
    for country in _countries().values():
        names = (country.name, *ALIASES.get(country.iso, ()))
        if _same(name) in {_same(each) for each in names}:
            return _follows(country)
    return None


def _follows(country: Country) -> dict[str, tuple[str, ...]]:
    """What a country has; empty where it has none."""
    return {
        "capital": (country.capital,) if country.capital else (),
        "language": country.languages,
        "continent": (country.continent,),
        "currency": (country.currency,) if country.currency else (),
    }


def _one_of(values: Callable[[Country], tuple[str, ...]]) -> Callable[[str], Answers | None]:
    """A lookup of names that some country's `values` hold, from which nothing follows."""

    def lookup(name: str) -> Answers | None:
        every = {_same(value) for country in _countries().values() for value in values(country)}
        return {} if _same(name) in every else None

    return lookup


def _same(name: str) -> str:
    """What two spellings of one name share."""
    return atlas.fold(bare(name))


_LOOKUPS: Mapping[str, Callable[[str], Answers | None]] = {
    "city": _city,
    "country": _country,
    "language": _one_of(lambda country: country.languages),
    "currency": _one_of(lambda country: (country.currency,) if country.currency else ()),
    "continent": _one_of(lambda country: (country.continent,)),
}

_cities = cache(atlas.cities)
_countries = cache(atlas.countries)
