"""What `palimpsest facts check FILE` tells: problems, class balance, splits, what a model knows."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from palimpsest.errors import RequestError
from palimpsest.facts import factfile
from palimpsest.facts.dataset import SPLITS, DataSet
from palimpsest.facts.fact import Fact, FactSet
from palimpsest.facts.factfile import FactFile
from palimpsest.facts.lines import Problem
from palimpsest.facts.splits import CHUNK, Known, Splits, split


@dataclass(frozen=True)
class Inspection:
    """A file of facts, looked at from all sides.

    Attributes:
        path: the file.
        records: lines that hold something.
        problems: everything that is wrong, by line.
        facts: those of the lines with no problem.
        known: by fact id, whether the model knows it; None where no model was asked.
        splits: what a run would deal them to; None where that cannot be done.
        refusal: why it cannot; empty where it can.
    """

    path: Path
    records: int
    problems: tuple[Problem, ...]
    facts: tuple[Fact, ...]
    known: Mapping[str, bool] | None = None
    splits: Splits | None = None
    refusal: str = ""

    @property
    def balance(self) -> dict[str, dict[str, int]]:
        """By relation, how many facts have each object, the largest classes first."""
        found: dict[str, Counter[str]] = {}
        for fact in self.facts:
            found.setdefault(fact.relation, Counter())[fact.true] += 1
        return {
            relation: dict(sorted(found[relation].items(), key=lambda item: (-item[1], item[0])))
            for relation in sorted(found)
        }

    def report(self) -> str:
        """Everything, for a terminal: lines of plain text."""
        return "\n".join(
            [
                f"{self.path}: {_some(self.records, 'line')}, {_some(len(self.facts), 'fact')}, "
                f"{_some(len(self.problems), 'problem')}",
                *(f"  {problem}" for problem in self.problems),
                *self._relations(),
                *self._splits(),
            ]
        )

    def _relations(self) -> Iterator[str]:
        for relation, classes in self.balance.items():
            facts = [fact for fact in self.facts if fact.relation == relation]
            known = ""
            if self.known is not None:
                known = f", {sum(self.known[fact.id] for fact in facts)} known to the model"
            yield f"{relation}: {_some(len(facts), 'fact')}{known}, {_some(len(classes), 'object')}"
            yield "  " + _classes(classes)
            if len(classes) == 1 and not all(fact.new for fact in facts):
                yield "  one object alone leaves no new one to draw: give each fact its new object"

    def _splits(self) -> Iterator[str]:
        if self.splits is None:
            yield f"no split: {self.refusal}"
            return
        yield "split:" if self.known is not None else "split, if a model knew every fact:"
        counts = self.splits.counts
        for name in SPLITS:
            taken, wanted, dealt = (
                counts[f"{name}_{kind}"] for kind in ("taken", "wanted", "dealt")
            )
            yield f"  {name}: {taken} of {wanted} wanted ({_some(dealt, 'subject')} dealt)"


def inspect(
    path: Path, plan: DataSet | None = None, seed: int = 0, known: Known | None = None
) -> Inspection:
    """Read a file of facts, and split what is right in it as a run would.

    Args:
        path: a JSONL file in the format of `facts=file`.
        plan: sizes and shares; those of `FactFile` if None.
        seed: of the split.
        known: whether a model knows each of some facts; if None, all count as known.

    Raises:
        RequestError: there is no such file, or it cannot be read.
    """
    contents = factfile.read(path)
    answers = None if known is None else _ask(known, contents.facts)
    facts = FactSet("file", "", contents.facts)
    splits, refusal = None, ""
    try:
        splits = split(
            facts,
            plan or FactFile(),
            seed,
            lambda some: [True if answers is None else answers[fact.id] for fact in some],
        )
    except RequestError as error:
        refusal = str(error)
    return Inspection(
        path, contents.records, contents.problems, contents.facts, answers, splits, refusal
    )


def _ask(known: Known, facts: Sequence[Fact]) -> dict[str, bool]:
    """What the model says of every fact, a chunk at a time."""
    answers: dict[str, bool] = {}
    for start in range(0, len(facts), CHUNK):
        chunk = facts[start : start + CHUNK]
        for fact, answer in zip(chunk, known(chunk), strict=True):
            answers[fact.id] = bool(answer)
    return answers


def _classes(classes: Mapping[str, int], most: int = 8) -> str:
    """The largest classes in words."""
    listed = [f"{name} {size}" for name, size in list(classes.items())[:most]]
    rest = len(classes) - most
    return ", ".join(listed) + (f", and {rest} smaller" if rest > 0 else "")


def _some(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
