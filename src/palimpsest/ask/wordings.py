"""Sentences about a subject, by what a prompt says of it and by what kind its object is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from palimpsest.facts.countries import RELATIONS
from palimpsest.facts.hops import HOPS


@dataclass(frozen=True)
class Wording:
    """Other ways to say what a prompt says, and what to ask that follows from it.

    Attributes:
        kind: of the object that the prompt asks for.
        cue: a regular expression found in prompts that say this.
        paraphrases: templates about the subject, to be continued with an object of the kind.
        questions: by second relation, templates to be continued with its answer.
    """

    kind: str
    cue: str
    paraphrases: tuple[str, ...]
    questions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


CONTEXTS = (
    "It is well known that {}",
    "In an old book I read that {}",
    "The weather was fine that day. {}",
    "Here is a fact that every pupil learns: {}",
)
"""What any prompt may be put after."""

SMALL = ("The", "A", "An", "In", "On", "At", "It", "This", "That")
"""First words that lose their capital inside a sentence."""

PREMISES: Mapping[str, Mapping[str, str]] = {
    "city": {
        "country": "The city of {} is in the country of",
        "language": RELATIONS["country_capital"].hops["language"][1],
        "continent": RELATIONS["country_capital"].hops["continent"][1],
        "currency": "The unit of currency in the city of {} is the",
    },
    "country": {
        **{name: hop.premise for name, hop in HOPS.items()},
        "currency": RELATIONS["country_currency"].fit,
    },
}
"""By kind of the object and second relation, the second hop asked of the object itself."""

_STANDS = r"\b(located|situated|lies?|stands?|found|built|(?:is|are) in|in the (?:city|country))\b"

WORDINGS = (
    Wording(
        "city",
        r"\bborn\b",
        (
            "The birthplace of {} is the city of",
            "{} is a native of the city of",
            "A plaque on the house where {} was born can be seen in the city of",
        ),
        {
            "country": ("{} was born in the country of",),
            "language": ("The official language of the country where {} was born is",),
            "continent": ("{} was born on the continent of",),
            "currency": ("The unit of currency in the country where {} was born is the",),
        },
    ),
    Wording(
        "city",
        r"\bdied\b",
        (
            "The last days of {} were spent in the city of",
            "The place where {} died is the city of",
            "The death of {} came in the city of",
        ),
        {
            "country": ("{} died in the country of",),
            "language": ("The official language of the country where {} died is",),
            "continent": ("{} died on the continent of",),
            "currency": ("The unit of currency in the country where {} died is the",),
        },
    ),
    Wording(
        "city",
        r"\bcapital\b",
        RELATIONS["country_capital"].paraphrases,
        {
            "country": ("The capital of {} is in the country of",),
            **{name: hop[:1] for name, hop in RELATIONS["country_capital"].hops.items()},
        },
    ),
    Wording(
        "city",
        rf"\bheadquarter|\bbased\b|{_STANDS}",
        (
            "{} can be found in the city of",
            "To see {}, one must travel to the city of",
            "Those who want to visit {} take the train to the city of",
            "On the map, {} is in the city of",
        ),
        {
            "country": (
                "{} is in the country of",
                "What country is {} in? Answer: the country of",
            ),
            "language": ("{} is in a country whose official language is",),
            "continent": ("{} is in a country on the continent of",),
            "currency": ("{} is in a country where people pay in the local currency, the",),
        },
    ),
    Wording(
        "country",
        r"\b(born|citizen)",
        (
            "{} comes from the country of",
            "{} has the passport of the country of",
            "The birthplace of {} is in the country of",
        ),
        {
            "capital": ("{} comes from a country whose capital is the city of",),
            "language": ("{} comes from a country whose official language is",),
            "continent": ("{} comes from a country on the continent of",),
            "currency": ("{} comes from a country whose currency is the",),
        },
    ),
    Wording(
        "country",
        _STANDS,
        (
            "{} can be found in the country of",
            "To see {}, one must travel to the country of",
            "On the map, {} lies in the country of",
        ),
        {
            "capital": ("{} is in a country whose capital is the city of",),
            "language": ("{} is in a country whose official language is",),
            "continent": ("{} is in a country on the continent of",),
            "currency": ("{} is in a country where people pay in the local currency, the",),
        },
    ),
    Wording(
        "language",
        r"\b(native language|mother tongue|speaks)\b",
        (
            "The native language of {} is",
            "The mother tongue of {} is",
            "At home, {} speaks",
        ),
    ),
    Wording("language", r"\blanguage\b", RELATIONS["country_language"].paraphrases),
    Wording(
        "currency", r"\b(currency|money|pa(y|ys|id))\b", RELATIONS["country_currency"].paraphrases
    ),
    Wording("continent", r"\bcontinent\b", RELATIONS["country_continent"].paraphrases),
)
"""In the order in which they are tried: what says more comes first."""


def wording(prompt: str, kinds: set[str]) -> Wording | None:
    """The first wording whose kind is among `kinds` and whose cue stands in the prompt.

    A prompt that says "the city of" or "the country of" asks for that kind alone.
    """
    said = re.search(r"\bthe (city|country|continent) of$", prompt)
    fitting = [w for w in WORDINGS if w.kind in kinds and (not said or w.kind == said[1])]
    return next((w for w in fitting if re.search(w.cue, prompt, re.IGNORECASE)), None)


def fill(template: str, subject: str) -> str:
    """The template about the subject, its article in capitals only where a sentence begins."""
    article, _, rest = subject.partition(" ")
    if article.lower() in ("the", "a", "an") and rest:
        begins = template.startswith("{}")
        subject = f"{article.capitalize() if begins else article.lower()} {rest}"
    return template.replace("{}", subject)
