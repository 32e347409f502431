"""Facts about invented places, dealt to splits by hand."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import count

from palimpsest.facts.fact import Fact, Prompt, Question
from palimpsest.facts.splits import Splits
from palimpsest.record.row import Row

CLASSES = ("France", "Italy", "Japan", "New Zealand")
ANSWERS = dict(zip(CLASSES, ("French", "Italian", "Japanese", "English"), strict=True))
TEMPLATES = ("{}, a city in", "Where is {}? In", "Anna said that {} is in the country of")
RELATION = "city_country"
PER_CLASS = {"target": 2, "test": 2, "fit": 1, "probe": 6, "dev": 1}

Key = tuple[str, str, str | None, str | None]


def subject(number: int) -> str:
    """A name of one to three syllables that no other place has."""
    syllables = ("Par", "os", "Rom", "ita", "ka", "lia", "del")
    return (syllables[number % 7] + syllables[number // 7 % 7] + "u" * (number // 49)).title()


def make_fact(number: int, classes: tuple[str, ...] = CLASSES) -> Fact:
    """Places belong to the classes in turn; the new object is another class."""
    name, true = subject(number), classes[number % len(classes)]
    step = 1 + number // len(classes) % (len(classes) - 1)
    question = Question(
        "language",
        Prompt.fill("language", "The official language of the country of {} is", name),
        {o: Prompt.find("premise", f"The language of {o} is", o) for o in classes},
        {o: ANSWERS.get(o, o) for o in classes},
    )
    return Fact(
        f"fact/{number}",
        RELATION,
        name,
        Prompt.fill("fit", "The city of {} is in", name),
        true,
        classes[(number + step) % len(classes)],
        tuple(Prompt.fill(f"paraphrase/{i}", t, name) for i, t in enumerate(TEMPLATES)),
        entailed=(question,),
    )


def make_splits(classes: tuple[str, ...] = CLASSES, **per_class: int) -> Splits:
    """So many facts a class in each split; classes take turns."""
    facts = (make_fact(n, classes) for n in count())
    dealt = {
        name: tuple(next(facts) for _ in range(size * len(classes)))
        for name, size in (PER_CLASS | per_class).items()
    }
    target = tuple(
        replace(
            fact,
            neighbors=tuple(
                replace(other.prompt, id=f"neighbor/{i}")
                for i, other in enumerate(o for o in dealt["test"] if o.true == fact.true)
            ),
        )
        for fact in dealt["target"]
    )
    others = tuple(
        Fact(f"capital/{o}", "capital", o, Prompt.fill("fit", "The capital of {} is", o), "Paris")
        for o in CLASSES[:3]
    )
    return Splits(**{**dealt, "target": target}, others=others, classes={RELATION: classes})


def by_key(rows: Iterable[Row]) -> dict[Key, Row]:
    """Rows by metric, protocol, fact and prompt."""
    found = list(rows)
    keyed = {(row.metric, row.protocol, row.fact_id, row.prompt_id): row for row in found}
    assert len(keyed) == len(found)
    return keyed
