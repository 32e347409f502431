"""Second hops: what follows from a fact of `world`, and is asked without naming its object."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from palimpsest.facts import atlas
from palimpsest.facts.atlas import Country
from palimpsest.facts.fact import Prompt, Question


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


class Asked:
    """One question about many subjects: the premises and answers that all of them share."""

    def __init__(self, id: str, question: str, premise: str, answers: Mapping[str, str]) -> None:
        """Fill the premise in for every object.

        Args:
            id: the second relation.
            question: template about a subject.
            premise: template about an object.
            answers: by object.
        """
        self.id = id
        self.question = question
        self.premise = premise
        self.answers = answers
        self.premises = {name: Prompt.fill(f"{id}/premise", premise, name) for name in answers}

    def about(self, subject: str) -> Question | None:
        """The question about a subject; None if its name gives an answer away (New Delhi)."""
        if any(overlap(answer, subject) for answer in set(self.answers.values())):
            return None
        prompt = Prompt.fill(self.id, self.question, subject)
        return Question(self.id, prompt, self.premises, self.answers)


def overlap(first: str, second: str) -> bool:
    """Whether one of two names contains the other."""
    first, second = atlas.fold(first), atlas.fold(second)
    return first in second or second in first
