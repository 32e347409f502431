"""The user's own facts: one JSON object a line, checked strictly."""

import shlex
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palimpsest.errors import RequestError
from palimpsest.facts import checks, lines
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import Fact, FactSet, Prompt, Question
from palimpsest.facts.lines import Problem
from palimpsest.facts.selection import select
from palimpsest.files import fingerprint, sha256_file

SHAPE = checks.record(
    required={
        "relation": checks.name,
        "subject": checks.name,
        "prompt": checks.prompt,
        "true": checks.name,
    },
    optional={
        "id": checks.name,
        "new": checks.name,
        "paraphrases": checks.listed(checks.prompt),
        "neighbors": checks.listed(checks.prompt),
        "entailed": checks.listed(
            checks.record(
                required={
                    "id": checks.name,
                    "prompt": checks.prompt,
                    "premises": checks.mapped(checks.prompt),
                    "answers": checks.mapped(checks.name),
                },
                optional={},
            )
        ),
    },
)
"""What a line must look like, before it is asked whether it makes sense."""


@dataclass(frozen=True)
class FactFile(DataSet):
    """Facts from the user's own JSONL file; `docs/facts.md` describes its keys.

    Attributes:
        path: the file.
        relations: relations to use; empty for all. Facts of the relations that are left out serve
            as `others`; so there are no others when all are used.
    """

    test: int = 64
    fit: int = 400
    probe: int = 320
    shares: dict[str, float] = field(
        default_factory=lambda: {
            "target": 0.4,
            "test": 0.15,
            "fit": 0.25,
            "probe": 0.15,
            "dev": 0.05,
        }
    )
    path: str = ""
    relations: list[str] = field(default_factory=list)

    def load(self) -> FactSet:
        """Read the file.

        Raises:
            RequestError: no path is given, the file is missing, empty or has a wrong line, or a
                relation is unknown.
        """
        if not self.path:
            raise RequestError(
                "facts=file needs facts.path=FILE, found no path; give a JSONL file of facts"
            )
        path = Path(self.path).expanduser()
        contents = read(path)
        if contents.problems:
            raise _refusal(path, contents.problems)
        if not contents.facts:
            raise RequestError(f"expected facts in {path}, found none; write one a line")
        facts, others = select(contents.facts, self.relations, path)
        used = sorted({fact.relation for fact in facts})
        return FactSet(
            name="file",
            fingerprint=fingerprint({"file": sha256_file(path), "relations": used}),
            facts=facts,
            others=others,
            counts={"records": contents.records, "selected": len(facts)},
        )


@dataclass(frozen=True)
class Contents:
    """What a file of facts holds.

    Attributes:
        facts: those of the lines without a problem.
        problems: what is wrong with the others.
        records: how many lines hold something.
    """

    facts: tuple[Fact, ...]
    problems: tuple[Problem, ...]
    records: int


def read(path: Path) -> Contents:
    """Read every line; a line with a problem gives no fact.

    Raises:
        RequestError: there is no such file, or it cannot be read.
    """
    facts: list[Fact] = []
    problems: list[Problem] = []
    numbers = set()
    seen: dict[tuple[str, ...], int] = {}
    for number, value in lines.read(path):
        numbers.add(number)
        if isinstance(value, Problem):
            problems.append(value)
            continue
        wrong = list(SHAPE("", value)) or list(_nonsense(value)) or list(_repeats(value, seen))
        problems += [Problem(number, text) for text in wrong]
        if not wrong:
            facts.append(_fact(value))
            seen |= dict.fromkeys(_names(value), number)
    return Contents(tuple(facts), tuple(problems), len(numbers))


def _refusal(path: Path, problems: tuple[Problem, ...]) -> RequestError:
    more = len(problems) - 1
    rest = f", and {more} more problem{'s' if more > 1 else ''}" if more else ""
    return RequestError(
        f"{path}, {problems[0]}{rest}; `palimpsest facts check {shlex.quote(str(path))}` tells all"
    )


# -- what well-formed lines may still get wrong ---------------------------------------------------


def _nonsense(record: Mapping[str, Any]) -> Iterator[str]:
    """What contradicts itself in one well-formed record."""
    if record.get("new") == record["true"]:
        yield f"expected new to differ from true, found {record['true']!r} twice; change new"
    for where, text in _about_subject(record):
        if _about("", text, record["subject"]).span is None:
            yield (
                f"expected {where} to hold its subject {checks.show(record['subject'])} or one "
                f"'{{}}' in its place, found {checks.show(text)}; correct it"
            )
    yield from _same_prompts(record)
    yield from _bad_questions(record)


def _about_subject(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every prompt about the record's subject, with its place in words."""
    yield "prompt", record["prompt"]
    for index, text in enumerate(record.get("paraphrases", ())):
        yield f"paraphrases[{index}]", text
    for index, question in enumerate(record.get("entailed", ())):
        yield f"entailed[{index}].prompt", question["prompt"]


def _same_prompts(record: Mapping[str, Any]) -> Iterator[str]:
    """Prompts to test with that repeat the one to fit on, or each other."""
    prompts = [(k, _about("", t, record["subject"]).text) for k, t in _about_subject(record)]
    prompts += [(f"neighbors[{i}]", text) for i, text in enumerate(record.get("neighbors", ()))]
    first: dict[str, str] = {}
    for where, text in prompts:
        if (before := first.setdefault(text, where)) != where:
            yield (
                f"expected {where} to be a prompt of its own, found {checks.show(text)} as in "
                f"{before}; change one"
            )


def _bad_questions(record: Mapping[str, Any]) -> Iterator[str]:
    """Entailed questions without the objects they need, or with the id of another."""
    needed = {record["true"], record.get("new", record["true"])}
    ids = set()
    for index, question in enumerate(record.get("entailed", ())):
        where = f"entailed[{index}]"
        if question["id"] in ids:
            yield f"expected {where}.id to be its own, found {question['id']!r} again; change one"
        ids.add(question["id"])
        premises, answers = set(question["premises"]), set(question["answers"])
        if odd := premises ^ answers:
            yield (
                f"expected {where}.premises and answers to name the same objects, found "
                f"{checks.show(min(odd))} in one of them; add it to both"
            )
        elif missing := needed - answers:
            yield (
                f"expected {where}.premises and answers to name {checks.show(min(missing))}, found "
                f"{checks.show(sorted(answers))}; add it"
            )


def _repeats(record: Mapping[str, Any], seen: Mapping[tuple[str, ...], int]) -> Iterator[str]:
    """An id, or a subject of a relation, that an earlier line has."""
    for key in _names(record):
        if key in seen:
            yield (
                f"expected each {key[0]} once, found {checks.show(key[-1])} as in line "
                f"{seen[key]}; remove one"
            )


def _names(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What no other record may have. Texts that only differ in how they compose accents agree."""
    subject = unicodedata.normalize("NFC", record["subject"])
    return [("subject of a relation", record["relation"], subject), ("id", _id(record))]


# -- facts ----------------------------------------------------------------------------------------


def _fact(record: Mapping[str, Any]) -> Fact:
    """One fact from a record in which nothing is wrong."""
    subject = record["subject"]
    paraphrases = record.get("paraphrases", ())
    return Fact(
        id=_id(record),
        relation=record["relation"],
        subject=subject,
        prompt=_about("fit", record["prompt"], subject),
        true=record["true"],
        new=record.get("new"),
        paraphrases=tuple(
            _about(f"paraphrase/{i}", text, subject) for i, text in enumerate(paraphrases)
        ),
        neighbors=tuple(
            Prompt(f"neighbor/{i}", text) for i, text in enumerate(record.get("neighbors", ()))
        ),
        entailed=tuple(_question(entry, subject) for entry in record.get("entailed", ())),
    )


def _id(record: Mapping[str, Any]) -> str:
    """The record's own id, or one made of what is its own anyway."""
    return str(record.get("id") or f"file/{record['relation']}/{record['subject']}")


def _about(id: str, text: str, subject: str) -> Prompt:
    """A template with one `{}` filled in, or a finished text with its subject found."""
    fill = text.count("{}") == 1
    return Prompt.fill(id, text, subject) if fill else Prompt.find(id, text, subject)


def _question(entry: Mapping[str, Any], subject: str) -> Question:
    id = entry["id"]
    return Question(
        id=id,
        prompt=_about(id, entry["prompt"], subject),
        premises={
            name: _about(f"{id}/premise", text, name) for name, text in entry["premises"].items()
        },
        answers=dict(entry["answers"]),
    )
