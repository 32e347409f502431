"""ParaRel (Elazar et al. 2021, arXiv:2102.01017): T-REx facts and patterns, in their own layout."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palimpsest.errors import RequestError, check_at_least, nearest
from palimpsest.facts import lines
from palimpsest.facts.articles import takes_the, with_the
from palimpsest.facts.checks import show
from palimpsest.facts.dataset import DataSet
from palimpsest.facts.fact import Fact, FactSet, Prompt
from palimpsest.facts.lines import Problem
from palimpsest.files import fingerprint, sha256_file

TRIPLES = Path("trex_lms_vocab")
PATTERNS = Path("pattern_data", "graphs_json")

CONTINUED = re.compile(r"([^\[\]]*\[X\][^\[\]]*)\s\[Y\]\s*\.?")
"""A pattern that ends in its object, so that a model can continue it."""


@dataclass(frozen=True)
class ParaRel(DataSet):
    """T-REx facts of the relations of ParaRel, whose patterns are fit prompt and paraphrases.

    Usable are the patterns that end in `[Y]`, the object. Names of states get the article that
    English needs; other objects stand as in the files ("works as actor").

    Attributes:
        path: the directory that holds `trex_lms_vocab` and `pattern_data/graphs_json`.
        relations: relation ids to use, such as `P103`; empty for all that have facts and a usable
            pattern. Facts of the relations that are left out serve as `others`.
        pattern: the usable pattern to fit on, as it stands in the file, in each relation that has
            it; empty, or where a relation has it not: its first usable one.
        min_class: subjects that an object must have in its relation, or its facts are left out.
    """

    test: int = 64
    fit: int = 400
    probe: int = 320
    shares: dict[str, float] = field(
        default_factory=lambda: {
            "target": 0.2,
            "test": 0.15,
            "fit": 0.4,
            "probe": 0.2,
            "dev": 0.05,
        }
    )
    path: str = ""
    relations: list[str] = field(default_factory=list)
    pattern: str = ""
    min_class: int = 10

    def load(self) -> FactSet:
        """Read the directory.

        Counts are of the chosen relations: `records` in the files, `distinct` pairs of subject and
        object, `unambiguous` ones whose subject has no other object in the relation, and `large`:
        those whose object has `min_class` subjects or more.

        Raises:
            RequestError: no path is given, the layout is another, a line is malformed, a relation
                or the pattern is unknown, or no fact is left.
        """
        check_at_least("facts.min_class", self.min_class, 1)
        root = self._root()
        prompts = _prompts(root)
        chosen = self._chosen(prompts, root)
        self._check_pattern({relation: prompts[relation] for relation in chosen})
        counts: Counter[str] = Counter()
        facts = [fact for name in chosen for fact in self._facts(root, name, prompts, counts)]
        if not facts:
            raise RequestError(
                f"expected objects with {self.min_class} subjects or more in {', '.join(chosen)}, "
                "found none; lower facts.min_class or choose other relations"
            )
        rest = [name for name in prompts if name not in chosen]
        others = [fact for name in rest for fact in self._facts(root, name, prompts, Counter())]
        return FactSet(
            name="pararel",
            fingerprint=self._fingerprint(root, chosen, rest, prompts),
            facts=tuple(facts),
            others=tuple(others),
            counts=dict(counts),
        )

    def _root(self) -> Path:
        if not self.path:
            raise RequestError(
                "facts=pararel needs facts.path=DIR, found no path; give the directory that holds "
                f"{TRIPLES} and {PATTERNS}"
            )
        root = Path(self.path).expanduser()
        for part in (TRIPLES, PATTERNS):
            if not (root / part).is_dir():
                raise RequestError(
                    f"expected ParaRel's layout at {root}, found no directory {part} there; "
                    f"give the directory that holds {TRIPLES} and {PATTERNS}"
                )
        return root

    def _chosen(self, prompts: Mapping[str, Any], root: Path) -> list[str]:
        """The relations of `relations`, or all."""
        for relation in self.relations:
            if relation not in prompts:
                raise RequestError(
                    f"expected relation ids with facts and a pattern that ends in [Y] in {root}, "
                    f"found {relation!r} in facts.relations; {nearest(relation, prompts)}"
                )
        chosen = list(dict.fromkeys(self.relations)) or list(prompts)
        if not chosen:
            raise RequestError(
                f"expected relations with facts and a pattern that ends in [Y] in {root}, found "
                "none; give ParaRel's own directory"
            )
        return chosen

    def _check_pattern(self, prompts: Mapping[str, Mapping[str, str]]) -> None:
        usable = {pattern for patterns in prompts.values() for pattern in patterns}
        if self.pattern and self.pattern not in usable:
            raise RequestError(
                f"expected a pattern of {', '.join(prompts)} that ends in [Y], found "
                f"{self.pattern!r} in facts.pattern; {nearest(self.pattern, usable)}"
            )

    def _facts(
        self,
        root: Path,
        relation: str,
        prompts: Mapping[str, Mapping[str, str]],
        counts: Counter[str],
    ) -> list[Fact]:
        """The usable facts of one relation, in the file's order; adds to `counts`."""
        records = _lines(root / TRIPLES / f"{relation}.jsonl", ("sub_label", "obj_label"))
        pairs = list(dict.fromkeys((r["sub_label"], r["obj_label"]) for r in records))
        objects = Counter(subject for subject, _ in pairs)
        single = [pair for pair in pairs if objects[pair[0]] == 1]
        sizes = Counter(true for _, true in single)
        kept = [pair for pair in single if sizes[pair[1]] >= self.min_class]
        counts["records"] += len(records)
        counts["distinct"] += len(pairs)
        counts["unambiguous"] += len(single)
        counts["large"] += len(kept)
        templates = self._templates(prompts[relation])
        return [_fact(relation, subject, true, templates) for subject, true in kept]

    def _templates(self, patterns: Mapping[str, str]) -> list[str]:
        """A relation's templates, that to fit on first."""
        first = patterns.get(self.pattern, next(iter(patterns.values())))
        return list(dict.fromkeys([first, *patterns.values()]))

    def _fingerprint(
        self,
        root: Path,
        chosen: Sequence[str],
        rest: Sequence[str],
        prompts: Mapping[str, Mapping[str, str]],
    ) -> str:
        files = {name: sha256_file(root / TRIPLES / f"{name}.jsonl") for name in prompts}
        return fingerprint(
            {
                "relations": [sorted(chosen), sorted(rest)],
                "triples": files,
                "templates": {name: self._templates(prompts[name]) for name in prompts},
                "min_class": self.min_class,
            }
        )


def _prompts(root: Path) -> dict[str, dict[str, str]]:
    """By relation that has facts, its usable patterns and what they are as templates."""
    found = {}
    for path in sorted((root / PATTERNS).glob("*.jsonl")):
        if not (root / TRIPLES / path.name).is_file():
            continue
        patterns = [record["pattern"] for record in _lines(path, ("pattern",))]
        templates = {pattern: _template(pattern) for pattern in patterns}
        usable = {pattern: text for pattern, text in templates.items() if text}
        if usable:
            found[path.stem] = usable
    return found


def _template(pattern: str) -> str | None:
    """The text before `[Y]` with `{}` for `[X]`; None if the pattern does not end in its object."""
    match = CONTINUED.fullmatch(pattern.strip())
    return " ".join(match[1].split()).replace("[X]", "{}") if match else None


def _lines(path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
    """The records of a file, with texts under `keys`."""
    found = []
    for number, record in lines.read(path):
        if isinstance(record, Problem):
            raise RequestError(f"{path}, {record}")
        for key in keys:
            value = record.get(key) if isinstance(record, Mapping) else None
            if not isinstance(value, str) or not value.strip():
                raise RequestError(
                    f"expected {key} (a text) in line {number} of {path}, found "
                    f"{'nothing' if value is None else show(value)}; give the original file"
                )
        found.append({key: record[key].strip() for key in keys})
    return found


def _fact(relation: str, subject: str, true: str, templates: Sequence[str]) -> Fact:
    fit, *rest = (_with_article(template, subject) for template in templates)
    return Fact(
        id=f"pararel/{relation}/{subject}",
        relation=relation,
        subject=subject,
        prompt=Prompt.fill("fit", fit, subject),
        true=with_the(true),
        paraphrases=tuple(
            Prompt.fill(f"paraphrase/{i}", template, subject) for i, template in enumerate(rest)
        ),
    )


def _with_article(template: str, subject: str) -> str:
    """The template, with "the" before its subject if that needs it."""
    if not takes_the(subject):
        return template
    return f"The {template}" if template.startswith("{}") else template.replace("{}", "the {}")
