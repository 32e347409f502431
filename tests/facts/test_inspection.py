import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from palimpsest.errors import RequestError
from palimpsest.facts import Fact, FactFile, inspect

OBJECTS = ("France", "Japan", "Peru")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Sixty facts of one relation, one of another, and three lines with seven problems."""
    rows = [fact(f"Town {i}", OBJECTS[i % 3]) for i in range(60)]
    rows += [fact("Sole", "Peru", relation="river", new="Italy"), "[", "{}", rows[0]]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(rows))
    return path


def fact(subject: str, true: str, **more: str) -> str:
    row = {"relation": "city", "subject": subject, "prompt": "{} is in", "true": true}
    return json.dumps(row | more)


def half(facts: Sequence[Fact]) -> list[bool]:
    assert 0 < len(facts) <= 32
    return [fact.true != "Peru" for fact in facts]


def test_everything_that_needs_no_model(path: Path) -> None:
    seen = inspect(path)
    assert seen.records == 64
    assert len(seen.facts) == 61
    assert [problem.line for problem in seen.problems] == [62, 63, 63, 63, 63, 64, 64]
    assert seen.balance == {
        "city": {"France": 20, "Japan": 20, "Peru": 20},
        "river": {"Peru": 1},
    }
    assert seen.known is None
    assert seen.splits is not None
    assert seen.splits.sizes["target"] > 10
    assert seen.refusal == ""


def test_what_a_model_knows(path: Path) -> None:
    seen = inspect(path, known=half)
    assert seen.known is not None
    assert sum(seen.known.values()) == 40
    assert seen.splits is not None
    assert {fact.true for fact in seen.splits.target} == {"France", "Japan"}


def test_the_plan_and_the_seed_count(path: Path) -> None:
    few = inspect(path, FactFile(limit=3)).splits
    assert few is not None
    assert few.sizes["target"] == 3
    other = inspect(path, FactFile(limit=3), seed=1).splits
    assert other is not None
    assert [f.id for f in few.target] != [f.id for f in other.target]


def test_the_report(path: Path) -> None:
    text = inspect(path, FactFile(limit=4), known=half).report()
    assert text.startswith(f"{path}: 64 lines, 61 facts, 7 problems\n  line 62: expected one JSON")
    assert "\ncity: 60 facts, 40 known to the model, 3 objects\n  France 20, Japan 20, P" in text
    assert "\nriver: 1 fact, 0 known to the model, 1 object\n  Peru 1\n" in text
    assert "\nsplit:\n  target: 4 of 4 wanted (" in text
    assert text.count("\n") == 7 + 4 + 6
    assert "one object alone" not in text
    plain = inspect(path).report()
    assert "known to the model" not in plain
    assert "\nsplit, if a model knew every fact:\n" in plain


def test_many_classes_are_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(fact(f"S{i}", f"O{i:02}") for i in range(10)))
    assert "  O00 1, O01 1, O02 1, O03 1, O04 1, O05 1, O06 1, O07 1, and 2 smaller" in (
        inspect(path).report()
    )


def test_a_split_that_cannot_be_made(path: Path, tmp_path: Path) -> None:
    seen = inspect(path, known=lambda facts: [False] * len(facts))
    assert seen.splits is None
    assert seen.refusal.startswith("expected at least one target fact that the model knows")
    assert f"no split: {seen.refusal}" in seen.report()
    same = tmp_path / "same.jsonl"
    same.write_text("\n".join(fact(f"S{i}", "Peru") for i in range(30)))
    seen = inspect(same)
    assert "expected at least two classes to draw a new object from" in seen.refusal
    assert "  Peru 30\n  one object alone leaves no new one to draw: give each" in seen.report()


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("")
    seen = inspect(path, known=half)
    assert seen.facts == ()
    assert seen.splits is None
    assert seen.report().startswith(f"{path}: 0 lines, 0 facts, 0 problems\nno split: expected")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected a JSONL file at"):
        inspect(tmp_path / "gone.jsonl")
