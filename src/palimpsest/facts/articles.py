"""Where English puts "the" before a name: models know "the Netherlands", not "Netherlands"."""

import re
from functools import cache

from palimpsest.facts import atlas

STATE = re.compile(
    r"^(Kingdom|Republic|Empire|Commonwealth|Duchy|Principality) of |^United (Kingdom|States) of "
    r"|^(?!The )\w.* (Empire|Republic|Kingdom|Union|Islands)$"
)
"""Found in names of states, past ones and groups of islands among them, that take "the"."""


@cache
def _countries() -> frozenset[str]:
    countries = atlas.countries().values()
    return frozenset(country.bare for country in countries if country.bare != country.name)


def takes_the(name: str) -> bool:
    """Whether a name is a state's or a group of islands' that stands with "the" in a sentence."""
    return name in _countries() or bool(STATE.search(name))


def with_the(name: str) -> str:
    """The name as it stands in a sentence."""
    return f"the {name}" if takes_the(name) else name
