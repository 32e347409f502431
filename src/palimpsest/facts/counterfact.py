"""CounterFact (Meng et al. 2022, arXiv:2202.05262), from its original file or a hub's copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from palimpsest.errors import RequestError
from palimpsest.facts import records
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import Fact, FactSet, Prompt
from palimpsest.facts.selection import select
from palimpsest.files import fingerprint

T = TypeVar("T")


@dataclass(frozen=True)
class CounterFact(DataSet):
    """Facts with a new object, two paraphrases and ten neighborhood prompts each.

    Few records share a relation, so that targets get a larger share than in `World`. Objects stand
    as in the file, without the articles that English may need. Copies on the model hub come in two
    shapes, told apart by their keys: the original one, and a flat one (`target_true`,
    `target_false`) whose facts have no paraphrases and no neighborhood prompts.

    Attributes:
        path: a JSON list of records, one JSON record per line, a parquet file, or a directory with
            parquet files.
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
            RequestError: no path is given, the file is missing or neither JSON nor parquet, a
                record is malformed, a relation id is unknown, or no record is there.
        """
        if not self.path:
            raise RequestError(
                "facts=counterfact needs facts.path=FILE, found no path; "
                "give the original counterfact.json, or its records one per line"
            )
        path = Path(self.path).expanduser()
        found = records.read(path)
        facts = _distinct([_fact(record, where, i) for i, (where, record) in enumerate(found)])
        if not facts:
            raise RequestError(
                f"expected CounterFact records in {path}, found none; give the original file"
            )
        chosen, others = select(facts, self.relations, path)
        used = sorted({fact.relation for fact in chosen})
        return FactSet(
            name="counterfact",
            fingerprint=fingerprint({"file": records.digest(path), "relations": used}),
            facts=chosen,
            others=others,
            counts={"records": len(found), "subjects": len(facts), "selected": len(chosen)},
        )


def _fact(record: object, where: str, index: int) -> Fact:
    """One fact from one record, in either shape."""
    if isinstance(record, Mapping) and "target_false" in record:
        fact, key = _traced(record, where, index), "target_false"
    else:
        fact, key = _original(record, where), "requested_rewrite.target_new"
    if fact.true == fact.new:
        raise RequestError(
            f"expected a new object other than the true one in {where}, found {fact.true!r} twice; "
            f"correct {key}"
        )
    return fact


def _original(record: object, where: str) -> Fact:
    """The shape of the published file, and of hub copies that keep it."""
    case = _value(record, "case_id", int, where)
    rewrite = "requested_rewrite."
    subject = _value(record, rewrite + "subject", str, where)
    true, new = (_value(record, f"{rewrite}target_{k}.str", str, where) for k in ("true", "new"))
    try:
        prompt = Prompt.fill("fit", _value(record, rewrite + "prompt", str, where), subject)
    except RequestError as error:
        raise RequestError(f"{where} has a bad requested_rewrite.prompt: {error}") from error
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


def _traced(record: Mapping[str, Any], where: str, index: int) -> Fact:
    """The flat shape of hub copies made for causal tracing: a finished prompt, nothing to test."""
    subject = _value(record, "subject", str, where)
    text = _value(record, "prompt", str, where)
    start = text.find(subject, len(str(record.get("relation_prefix") or "").strip()))
    if start < 0:
        raise RequestError(
            f"expected prompt to hold its subject {subject[:60]!r} in {where}, found "
            f"{text[:60]!r}; correct or remove the record"
        )
    return Fact(
        id=f"counterfact/row-{index}",
        relation=_value(record, "relation_id", str, where),
        subject=subject,
        prompt=Prompt("fit", text, (start, start + len(subject))),
        true=_value(record, "target_true", str, where),
        new=_value(record, "target_false", str, where),
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
