import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from palimpsest.errors import RequestError
from palimpsest.facts import ParaRel, Prompt, split
from palimpsest.facts.articles import with_the

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "pararel"

Layout = Callable[..., Path]


def rows(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"sub_label": s, "obj_label": o, "uuid": str(i)} for i, (s, o) in enumerate(pairs)]


PLACES = rows(
    *((f"Town {i}", ("France", "Japan", "Netherlands")[i % 3]) for i in range(30)),
    ("Town 0", "France"),
    ("Twin", "France"),
    ("Twin", "Japan"),
    ("Rare", "Peru"),
    ("United States of America", "Japan"),
)
PATTERNS = [
    "[Y] holds [X].",
    "[X] is located in [Y] .",
    "[X], which is in  [Y]",
    "The place of [X] is [Y].",
    "[X] is [Y] in truth.",
    "[X]-[Y]",
    "[X] and [X] are in [Y].",
]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Writes ParaRel's two directories: triples and patterns by relation."""

    def write(
        triples: dict[str, list[dict[str, Any]]], patterns: dict[str, list[str]] | None = None
    ) -> Path:
        for name, records in triples.items():
            lines(tmp_path / "trex_lms_vocab" / f"{name}.jsonl", records)
        (tmp_path / "pattern_data" / "graphs_json").mkdir(parents=True, exist_ok=True)
        for name, texts in (patterns or dict.fromkeys(triples, PATTERNS)).items():
            records = [{"pattern": text, "lemma": "x"} for text in texts]
            lines(tmp_path / "pattern_data" / "graphs_json" / f"{name}.jsonl", records)
        return tmp_path

    return write


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")


def refusal(**options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        ParaRel(**options).load()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_facts(layout: Layout) -> None:
    facts = ParaRel(path=str(layout({"P17": PLACES}))).load()
    assert facts.counts == {"records": 35, "distinct": 34, "unambiguous": 32, "large": 31}
    assert Counter(fact.true for fact in facts.facts) == {
        "France": 10,
        "Japan": 11,
        "the Netherlands": 10,
    }
    first = facts.facts[0]
    assert (first.id, first.relation, first.subject) == ("pararel/P17/Town 0", "P17", "Town 0")
    assert first.prompt == Prompt("fit", "Town 0 is located in", (0, 6))
    assert first.paraphrases == (
        Prompt("paraphrase/0", "Town 0, which is in", (0, 6)),
        Prompt("paraphrase/1", "The place of Town 0 is", (13, 19)),
    )
    assert (first.new, first.neighbors, first.entailed) == (None, (), ())


def test_subjects_get_their_article_outside_their_span(layout: Layout) -> None:
    facts = ParaRel(path=str(layout({"P17": PLACES}))).load().facts
    states = next(fact for fact in facts if fact.subject.startswith("United"))
    assert states.prompt.text == "The United States of America is located in"
    assert states.paraphrases[1].text == "The place of the United States of America is"
    for prompt in (states.prompt, *states.paraphrases):
        assert prompt.span is not None
        assert prompt.text[slice(*prompt.span)] == "United States of America"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Netherlands", "the Netherlands"),
        ("Kingdom of Prussia", "the Kingdom of Prussia"),
        ("Ottoman Empire", "the Ottoman Empire"),
        ("Solomon Islands", "the Solomon Islands"),
        ("United Kingdom of Great Britain and Ireland", "the United Kingdom of Great Britain and "),
        ("France", "France"),
        ("United Airlines", "United Airlines"),
        ("The Cat Empire", "The Cat Empire"),
        ("Republic Pictures", "Republic Pictures"),
    ],
)
def test_articles(name: str, sentence: str) -> None:
    assert with_the(name).startswith(sentence)
    assert (with_the(name) == name) == (sentence == name)


def test_the_pattern_to_fit_on_can_be_named(layout: Layout) -> None:
    root = layout({"P17": PLACES})
    facts = ParaRel(path=str(root), pattern="The place of [X] is [Y].").load()
    assert facts.facts[0].prompt.text == "The place of Town 0 is"
    assert [p.text for p in facts.facts[0].paraphrases] == [
        "Town 0 is located in",
        "Town 0, which is in",
    ]
    assert facts.fingerprint != ParaRel(path=str(root)).load().fingerprint
    message = refusal(path=str(root), pattern="The place of [X] was [Y].")
    assert "expected a pattern of P17 that ends in [Y], found 'The place of [X] was" in message
    assert "did you mean 'The place of [X] is [Y].'" in message
    assert "found '[Y] holds [X].' in facts.pattern" in refusal(
        path=str(root), pattern="[Y] holds [X]."
    )


def test_relations_left_out_are_the_others(layout: Layout) -> None:
    root = layout({"P17": PLACES, "P36": PLACES, "P31": PLACES}, {"P17": PATTERNS, "P36": PATTERNS})
    facts = ParaRel(path=str(root), relations=["P17"]).load()
    assert {fact.relation for fact in facts.facts} == {"P17"}
    assert {fact.relation for fact in facts.others} == {"P36"}
    assert facts.counts["records"] == 35
    everything = ParaRel(path=str(root)).load()
    assert {fact.relation for fact in everything.facts} == {"P17", "P36"}
    assert everything.others == ()
    assert everything.counts["records"] == 70
    assert everything.fingerprint != facts.fingerprint
    assert "found 'P31' in facts.relations; did you mean 'P36'" in refusal(
        path=str(root), relations=["P17", "P31"]
    )


def test_small_classes(layout: Layout) -> None:
    root = layout({"P17": PLACES})
    assert len(ParaRel(path=str(root), min_class=1).load().facts) == 32
    assert set(ParaRel(path=str(root), min_class=11).load().objects("P17")) == {"Japan"}
    message = refusal(path=str(root), min_class=12)
    assert "expected objects with 12 subjects or more in P17, found none; lower" in message
    assert "expected facts.min_class to be at least 1" in refusal(path=str(root), min_class=0)


def test_it_can_be_split(layout: Layout) -> None:
    plan = ParaRel(path=str(layout({"P17": PLACES})), limit=3)
    splits = split(plan.load(), plan, 0, lambda facts: [True] * len(facts))
    assert splits.sizes["target"] == 3
    assert all(fact.new != fact.true for fact in splits.target)


def test_it_is_a_structured_config(layout: Layout) -> None:
    config = OmegaConf.merge(
        OmegaConf.structured(ParaRel), {"path": str(layout({"P17": PLACES})), "relations": ["P17"]}
    )
    assert ParaRel(**{str(key): config[key] for key in config}).load().facts


def test_no_path_and_another_layout(tmp_path: Path) -> None:
    assert refusal().startswith("facts=pararel needs facts.path=DIR, found no path; give the dir")
    message = f"expected ParaRel's layout at {tmp_path}, found no directory trex_lms_vocab there"
    assert message in refusal(path=str(tmp_path))


def test_no_usable_pattern(layout: Layout) -> None:
    root = layout({"P17": PLACES}, {"P17": ["[Y] holds [X]."]})
    assert "found none; give ParaRel's own directory" in refusal(path=str(root))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"sub_label": "X"}, "expected obj_label (a text) in line 1 of"),
        ({"sub_label": 3, "obj_label": "Y"}, "found 3; give the original file"),
        ({"sub_label": " ", "obj_label": "Y"}, "expected sub_label (a text) in line 1"),
    ],
)
def test_malformed_triples(layout: Layout, record: dict[str, Any], message: str) -> None:
    assert message in refusal(path=str(layout({"P17": [record]})))


def test_lines_that_are_no_json(layout: Layout) -> None:
    root = layout({"P17": PLACES})
    path = root / "pattern_data" / "graphs_json" / "P17.jsonl"
    path.write_text("[\n")
    assert f"{path}, line 1: expected one JSON value" in refusal(path=str(root))
    path.write_text("[]\n")
    assert "expected pattern (a text) in line 1 of" in refusal(path=str(root))


def test_the_published_files() -> None:
    if not SHARED.exists():
        pytest.skip("needs ../shared/data/pararel beside the repository")
    facts = ParaRel(path=str(SHARED), relations=["P103"]).load()
    assert facts.counts == {"records": 919, "distinct": 919, "unambiguous": 917, "large": 869}
    assert facts.facts[0].prompt.text == f"The native language of {facts.facts[0].subject} is"
    assert len(facts.objects("P103")) == 7
    assert len({fact.relation for fact in facts.others}) > 25
    for fact in facts.facts + facts.others:
        for prompt in (fact.prompt, *fact.paraphrases):
            assert prompt.span is not None
            assert prompt.text[slice(*prompt.span)] == fact.subject
            assert "[" not in prompt.text.replace(fact.subject, "")
            assert prompt.text == prompt.text.strip()
    assert len({fact.id for fact in facts.facts + facts.others}) == len(facts.facts + facts.others)
