"""CounterFact (Meng et al. 2022, arXiv:2202.05262), read from its original file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from palimpsest.errors import RequestError, nearest
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import Fact, FactSet, Prompt
from palimpsest.files import fingerprint, sha256_file

T = TypeVar("T")


@dataclass(frozen=True)
class CounterFact(DataSet):
    """Facts with a new object, two paraphrases and ten neighborhood prompts each.

    Few records share a relation, so that targets get a larger share than in `World`. Objects stand
    as in the file, without the articles that English may need.

    Attributes:
        path: the original file, a JSON list of records, or the same records one JSON per line.
        relations: relation ids to use, such as `P17`; empty for all. Facts of the relations that
            are left out serve as `others`; so there are no others when all are used.
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
            RequestError: no path is given, the file is missing or not JSON, a record is malformed,
                a relation id is unknown, or no record is there.
        """
        if not self.path:
            raise RequestError(
                "facts=counterfact needs facts.path=FILE, found no path; "
                "give the original counterfact.json, or its records one per line"
            )
        path = Path(self.path).expanduser()
        records = _records(path)
        facts = _distinct([_fact(record, where) for where, record in records])
        self._check_relations(facts, path)
        selected = set(self.relations) or {fact.relation for fact in facts}
        chosen = tuple(fact for fact in facts if fact.relation in selected)
        return FactSet(
            name="counterfact",
            fingerprint=fingerprint({"file": sha256_file(path), "relations": sorted(selected)}),
            facts=chosen,
            others=tuple(fact for fact in facts if fact.relation not in selected),
            counts={"records": len(records), "subjects": len(facts), "selected": len(chosen)},
        )

    def _check_relations(self, facts: Sequence[Fact], path: Path) -> None:
        if not facts:
            raise RequestError(
                f"expected CounterFact records in {path}, found none; give the original file"
            )
        present = {fact.relation for fact in facts}
        for relation in self.relations:
            if relation not in present:
                raise RequestError(
                    f"expected relation ids that occur in {path}, found {relation!r} in "
                    f"facts.relations; {nearest(relation, present)}"
                )


def _records(path: Path) -> list[tuple[str, object]]:
    """The file's records, each with its place in words for error messages."""
    if not path.is_file():
        raise RequestError(f"expected a CounterFact file at {path}, found none; correct facts.path")
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return [(f"record {i} of {path}", record) for i, record in enumerate(json.loads(text))]
        lines = enumerate(text.splitlines(), start=1)
        return [(f"line {i} of {path}", _json(line, i)) for i, line in lines if line.strip()]
    except OSError as error:
        raise RequestError(
            f"cannot read {path}: {error.strerror or error}; correct facts.path or its permissions"
        ) from error
    except ValueError as error:
        raise RequestError(
            f"expected JSON, a list of records or one record per line, in {path}, found text that "
            f"is neither ({error}); give the original file"
        ) from error


def _json(line: str, number: int) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {str(error).partition(': line')[0]}") from error


def _fact(record: object, where: str) -> Fact:
    """One fact from one record."""
    case = _value(record, "case_id", int, where)
    rewrite = "requested_rewrite."
    subject = _value(record, rewrite + "subject", str, where)
    true, new = (_value(record, f"{rewrite}target_{k}.str", str, where) for k in ("true", "new"))
    try:
        prompt = Prompt.fill("fit", _value(record, rewrite + "prompt", str, where), subject)
    except RequestError as error:
        raise RequestError(f"{where} has a bad requested_rewrite.prompt: {error}") from error
    if true == new:
        raise RequestError(
            f"expected a new object other than the true one in {where}, found {true!r} twice; "
            "correct requested_rewrite.target_new"
        )
    paraphrases = _texts(record, "paraphrase_prompts", where)
    neighbors = _texts(record, "neighborhood_prompts", where)
    return Fact(
        id=f"counterfact/{case}",
        relation=_value(record, rewrite + "relation_id", str, where),
        subject=subject,
        prompt=prompt,
        true=true,
        new=new,
        paraphrases=tuple(
            Prompt.find(f"paraphrase/{i}", text, subject) for i, text in enumerate(paraphrases)
        ),
        neighbors=tuple(Prompt(f"neighbor/{i}", text) for i, text in enumerate(neighbors)),
    )


def _value(record: object, key: str, kind: type[T], where: str) -> T:
    """The value of a dotted key: a `kind`, stripped and not empty if it is a text."""
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    value = value.strip() if isinstance(value, str) else value
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        found = "nothing" if value is None or value == "" else f"{type(value).__name__} {value!r}"
        raise RequestError(
            f"expected {key} ({kind.__name__}) in {where}, found {found[:80]}; "
            "correct or remove the record"
        )
    return value


def _texts(record: object, key: str, where: str) -> list[str]:
    """A list of texts, without trailing spaces."""
    texts = _value(record, key, list, where)
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(
                f"expected {key} (list of str) in {where}, found {type(text).__name__} among them; "
                "correct or remove the record"
            )
    return [text.rstrip() for text in texts]


def _distinct(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The first fact of each (relation, subject)."""
    first: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        first.setdefault((fact.relation, fact.subject), fact)
    if len({fact.id for fact in first.values()}) < len(first):
        raise RequestError(
            "expected a different case_id in each CounterFact record, found the same one for "
            "different subjects; number the records anew"
        )
    return tuple(first.values())
