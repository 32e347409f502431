import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from omegaconf import OmegaConf

from palimpsest.errors import RequestError
from palimpsest.facts import CounterFact, Prompt, records, split

Record = Callable[..., dict[str, Any]]
Write = Callable[[list[Any]], Path]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "counterfact.json"


def refusal(**options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        CounterFact(**options).load()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_record_becomes_a_fact(record: Record, write: Write) -> None:
    facts = CounterFact(path=str(write([record(7, subject="Fécamp")]))).load()
    (fact,) = facts.facts
    assert fact.id == "counterfact/7"
    assert (fact.relation, fact.true, fact.new) == ("P17", "France", "Japan")
    assert fact.prompt == Prompt("fit", "Fécamp is located in the country of", (0, 6))
    assert fact.paraphrases[0] == Prompt("paraphrase/0", "Some words. Fécamp lies in", (12, 18))
    assert fact.paraphrases[1].span is None
    assert fact.neighbors[1] == Prompt("neighbor/1", "Nice is in")
    assert fact.entailed == ()
    assert facts.others == ()


def test_lines_are_read_like_a_list(record: Record, write: Write, tmp_path: Path) -> None:
    records = [record(i) for i in range(5)]
    lines = tmp_path / "counterfact.jsonl"
    lines.write_text("\n".join(json.dumps(r, indent=None) for r in records) + "\n\n")
    one = CounterFact(path=str(write(records))).load()
    two = CounterFact(path=str(lines)).load()
    assert one.facts == two.facts
    assert one.fingerprint != two.fingerprint


def test_the_first_of_a_repeated_subject_stays(record: Record, write: Write) -> None:
    records = [record(1, subject="A"), record(2, subject="A"), record(3, "P30", subject="A")]
    facts = CounterFact(path=str(write(records))).load()
    assert [f.id for f in facts.facts] == ["counterfact/1", "counterfact/3"]
    assert facts.counts == {"records": 3, "subjects": 2, "selected": 2}


def test_relations_left_out_are_the_others(record: Record, write: Write) -> None:
    path = str(write([record(i, "P17" if i % 3 else "P30") for i in range(30)]))
    facts = CounterFact(path=path, relations=["P17"]).load()
    assert {f.relation for f in facts.facts} == {"P17"}
    assert {f.relation for f in facts.others} == {"P30"}
    assert facts.counts["selected"] == 20
    assert facts.fingerprint != CounterFact(path=path).load().fingerprint
    assert facts.fingerprint == CounterFact(path=path, relations=["P17"], fit=3).load().fingerprint


def test_it_can_be_split(record: Record, write: Write) -> None:
    plan = CounterFact(path=str(write([record(i) for i in range(200)])), limit=10)
    splits = split(plan.load(), plan, 0, lambda facts: [True] * len(facts))
    assert splits.sizes["target"] == 10
    assert {f.new for f in splits.target} == {"Japan"}
    assert {p.text for f in splits.target for p in f.neighbors} == {"Lyon is in", "Nice is in"}


def test_it_is_a_structured_config(record: Record, write: Write) -> None:
    path = str(write([record(1)]))
    config = OmegaConf.merge(OmegaConf.structured(CounterFact), {"path": path})
    assert CounterFact(**{str(key): config[key] for key in config}).load().facts


# -- copies on the model hub ----------------------------------------------------------------------


def parquet(records: Path, path: Path) -> Path:
    """Turn a JSON file into a parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    duckdb.sql(f"COPY (FROM read_json('{records}')) TO '{path}' (FORMAT parquet)")
    return path


def test_parquet_is_read_like_json(record: Record, write: Write, tmp_path: Path) -> None:
    file = write([record(i) for i in range(5)])
    copy = parquet(file, tmp_path / "train.parquet")
    assert CounterFact(path=str(copy)).load().facts == CounterFact(path=str(file)).load().facts


def test_a_directory_of_parquet_files(record: Record, write: Write, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    parquet(write([record(i) for i in range(3)]), copies / "data" / "test-0.parquet")
    parquet(write([record(i) for i in range(3, 9)]), copies / "data" / "train-0.parquet")
    facts = CounterFact(path=str(copies)).load()
    assert [f.id for f in facts.facts] == [f"counterfact/{i}" for i in range(9)]
    (copies / "data" / "test-0.parquet").unlink()
    fewer = CounterFact(path=str(copies)).load()
    assert fewer.counts["records"] == 6
    assert fewer.fingerprint != facts.fingerprint


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_the_flat_shape(traced: Record, write: Write, tmp_path: Path, form: str) -> None:
    path = write([traced(), traced("Paris", "", relation_id="P17"), traced("mother", "My mother,")])
    if form == "parquet":
        path = parquet(path, tmp_path / "train.parquet")
    one, two, three = CounterFact(path=str(path)).load().facts
    assert (one.id, one.relation, one.true, one.new) == (
        "counterfact/row-0",
        "P103",
        "French",
        "English",
    )
    assert one.prompt == Prompt("fit", "The mother tongue of Danielle Darrieux is", (21, 38))
    assert one.paraphrases == one.neighbors == ()
    assert two.prompt == Prompt("fit", "Paris is", (0, 5))
    assert three.prompt.span == (11, 17)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "The mother tongue of Anna is"}, "expected prompt to hold its subject 'Dan"),
        ({"target_true": " English"}, "found 'English' twice; correct target_false"),
        ({"relation_id": None}, "expected relation_id (str) in record 1 of"),
        ({"target_true": {"str": "French"}}, "expected target_true (str) in record 1 of"),
    ],
)
def test_malformed_flat_records(
    traced: Record, write: Write, change: dict[str, Any], message: str
) -> None:
    assert message in refusal(path=str(write([traced("Anna"), traced(**change)])))


def test_broken_parquet(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 and no more")
    assert f"expected a parquet file at {path}, found one that cannot be read" in refusal(
        path=str(path)
    )


def test_no_path() -> None:
    assert refusal().startswith("facts=counterfact needs facts.path=FILE, found no path; give")


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "gone.json"
    message = f"expected a CounterFact file at {path}, found none; correct facts.path"
    assert refusal(path=str(path)) == message
    assert "found none" in refusal(path=str(tmp_path))


@pytest.mark.parametrize("content", ["[1, 2", "hello\n", '{"case_id":\n 1}', "\0", b"\xff\xfe\x01"])
def test_not_json(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(path=str(path))
    assert f"expected JSON, a list of records or one record per line, in {path}, found" in message


@pytest.mark.parametrize("content", ["[]", "", "\n"])
def test_no_records(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.json"
    path.write_text(content)
    assert "expected CounterFact records in" in refusal(path=str(path))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["case_id"], None, "expected case_id (int) in record 1 of"),
        (["case_id"], "7", "found str '7'; correct or remove the record"),
        (["case_id"], True, "found bool True"),
        (["requested_rewrite"], [], "requested_rewrite.subject (str) in record 1 of"),
        (["requested_rewrite", "subject"], " ", "found nothing; correct or remove the record"),
        (["requested_rewrite", "relation_id"], 17, "relation_id (str) in record 1 of"),
        (["requested_rewrite", "target_new"], "Japan", "requested_rewrite.target_new.str (str)"),
        (["requested_rewrite", "target_true", "str"], None, "target_true.str (str) in record 1"),
        (["requested_rewrite", "target_new", "str"], "France", "found 'France' twice; correct"),
        (["requested_rewrite", "prompt"], "no place", "expected exactly one '{}'"),
        (["requested_rewrite", "prompt"], "{} {}", "has a bad requested_rewrite.prompt: expected"),
        (["paraphrase_prompts"], "text", "paraphrase_prompts (list) in record 1 of"),
        (["neighborhood_prompts"], ["a", 3], "neighborhood_prompts (list of str) in record 1 of"),
    ],
)
def test_malformed_records(
    record: Record, write: Write, keys: list[str], value: object, message: str
) -> None:
    bad = record(1)
    place = bad
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    assert message in refusal(path=str(write([record(0), bad])))


def test_a_record_that_is_none(write: Write) -> None:
    assert "expected case_id (int) in record 0 of" in refusal(path=str(write([3])))


def test_malformed_lines_are_numbered(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "counterfact.jsonl"
    path.write_text(json.dumps(record(0)) + "\n\n" + json.dumps({"case_id": 2}) + "\n")
    assert f"requested_rewrite.subject (str) in line 3 of {path}" in refusal(path=str(path))


@pytest.mark.parametrize("blank", ["", " ", "\n\n", "\r\n\t "])
def test_a_list_is_read_as_json_reads_it_wherever_its_pieces_end(
    blank: str, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [record(0, subject="Fécamp"), record(1), [], {}, -1.5, 'a\\u00e9"]', None, [[1, 2]]]
    path = tmp_path / "list.json"
    for count in range(len(values) + 1):
        texts = [blank + json.dumps(value, indent=1) + blank for value in values[:count]]
        path.write_text(f"{blank}[{','.join(texts) or blank}]{blank}", encoding="utf-8")
        longest = max(map(len, texts), default=1)
        for size in (longest, longest + 1, longest + 3, 10**6):
            monkeypatch.setattr(records, "LONGEST", size)
            found = records.read(path)
            assert found == [(f"record {i} of {path}", v) for i, v in enumerate(values[:count])]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1,\n 2,\n", "line 3: Expecting value"),
        ("[1,\n 2", "line 2: '' for one of ',]'"),
        ("[1\n\n 2]", "line 3: '2' for one of ',]'"),
        ("[1]\n\n]", "line 3: more after the list"),
        ("[,1]", "line 1: Expecting value"),
        ("[1,]", "line 1: Expecting value"),
        ("\n[1, {]}", "line 2: Expecting property name"),
        ("\n\n[NaN]", "line 3: NaN, which is not JSON"),
        ('[{"a": 1, "a": 2}]', "line 1: the key 'a' twice"),
        (f"[1,\n{'1' * 5000}]", "line 2: Exceeds the limit (4300 digits)"),
        ("[" * 100_000, "line 1: brackets nested too deeply"),
        ("[\n" * 100_000, "line 2: brackets nested too deeply"),
        ('[\n{"a":' * 100_000, "line 2: brackets nested too deeply"),
        ('{"a":' * 100_000, "line 1: expected one JSON value on the line, found brackets nested t"),
        ("{}\n\n{]", "line 3: expected one JSON value"),
    ],
    ids=range(15),
)
def test_lists_and_lines_that_are_wrong_name_the_line(
    tmp_path: Path, text: str, found: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    message = refusal(path=str(path))
    assert message.startswith("expected JSON, a list of records or one record per line, in ")
    assert f"found text that is neither ({found}" in message


def test_repeated_numbers(record: Record, write: Write) -> None:
    path = write([record(1, subject="A"), record(1, subject="B")])
    assert "expected a different case_id in each CounterFact record" in refusal(path=str(path))


def test_unknown_relation(record: Record, write: Write) -> None:
    path = write([record(1, "P17"), record(2, "P103")])
    message = refusal(path=str(path), relations=["P17", "P1O3"])
    assert "found 'P1O3' in facts.relations; did you mean 'P103'" in message


def test_the_published_records() -> None:
    if not SHARED.exists():
        pytest.skip("needs ../shared/data/counterfact.json beside the repository")
    facts = CounterFact(path=str(SHARED), relations=["P17", "P103"]).load()
    assert facts.counts == {"records": 1035, "subjects": 1033, "selected": 167}
    for fact in facts.facts + facts.others:
        for prompt in (fact.prompt, *fact.paraphrases):
            assert prompt.span is not None
            assert prompt.text[slice(*prompt.span)] == fact.subject
        assert not fact.prompt.text.endswith(" ")
        assert len(fact.paraphrases) == 2
        assert len(fact.neighbors) == 10
    assert len(facts.objects("P17")) > 5
