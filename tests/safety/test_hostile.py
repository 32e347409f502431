"""Hostile data: nothing from a data set becomes markup, a path, code or a leaked secret."""

import json
import os
import pickle
import re
import shutil
import time
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest
from yaml.constructor import FullConstructor, SafeConstructor

from palimpsest.cli import documents
from palimpsest.cli.words import quoted
from palimpsest.errors import RequestError
from palimpsest.evaluate.asking import knows
from palimpsest.facts.counterfact import CounterFact
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.facts.factfile import read
from palimpsest.facts.pararel import ParaRel
from palimpsest.intervene.controls import NoChange
from palimpsest.model.load import Pretrained
from palimpsest.record.results import load_runs

SOURCE = Path(__file__).parents[2] / "src"

SUBJECTS = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    "'\"><svg/onload=alert(4)>",
    "<a href='javascript:alert(5)'>Bo</a>",
    "{{ 7 * 7 }}{% raw %}",
    r"\input{/etc/passwd} & 50% $x$ #1 ~^_",
    r"$\immediate\write18{id}$",
    "%{x} ${seed} {0} %s",
    "[red]Bo[/red] [link=file:///etc]x[/link]",
    "../../../etc/passwd",
    "C:\\..\\evil",
    "=cmd|' /C calc'!A1",
    "\u202edlrow\u202c",
    "--help",
    "日本 🏙️ ﷽",
)
"""Markup, templates, TeX, formats, consoles, paths, spreadsheets, bidirectional text."""

OBJECTS = ("France", "Japan", "Brazil", "Kenya")

SECRETS = {
    "WANDB_API_KEY": "c0ffee" * 6 + "abcd",
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanaryCanary",
}

TEMPLATE = "The city of {} lies in"


def files(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


# -- a run on hostile facts ------------------------------------------------------------------------


@pytest.fixture
def hostile(tiny, tmp_path):
    """A model under a hostile name, and a file of hostile facts that it knows."""
    place = tmp_path / "<b>mo_del&'\"%$#"
    shutil.copytree(tiny.model, place)
    model = Pretrained(path=str(place), prefix="\n", device="cpu").load()
    cities = [line["requested_rewrite"]["subject"] for line in json.loads(tiny.facts.read_text())]
    templates = [TEMPLATE, *(f"{{}}. The city of {city} lies in" for city in cities[:16])]
    records = []
    for number, subject in enumerate(SUBJECTS):
        asked = [
            Fact("x", "P17", subject, Prompt.fill("fit", template, subject), name)
            for template in templates
            for name in OBJECTS
        ]
        known = [place for place, hit in enumerate(knows(model, asked)) if hit]
        first = known[0] if known else 0
        records.append(
            {
                "id": f"../../{number}/<i>{subject}",
                "relation": "<u>P17</u>/../..",
                "subject": subject,
                "prompt": templates[first // len(OBJECTS)],
                "true": asked[first].true if known else subject,
                "new": SUBJECTS[number - 1],
                "paraphrases": ["Many people visit {} in", "<b>{}</b> & \\textbf{{}} lies in {}"][
                    :1
                ],
                "neighbors": [f"{SUBJECTS[number - 2]} lies in"],
            }
        )
    assert sum(record["true"] in OBJECTS for record in records) >= len(SUBJECTS) - 2
    facts = tmp_path / "facts <&>.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in records)
    facts.write_text(text, encoding="utf-8")
    shares = "{target: 1, test: 0, fit: 0, probe: 0, dev: 0}"
    return [
        f"model.path={quoted(str(place))}", f"facts.path={quoted(str(facts))}", "facts=file",
        "facts.limit=30", f"facts.shares={shares}", "locate.layer=0", "contexts=1",
        "record=local", "record.sweep=hostile",
    ]  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and texts."""

    def __init__(self):
        super().__init__()
        self.tags = []
        self.texts = []
        self.scripts = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        inside = self.tags and self.tags[-1][0] == "script"
        (self.scripts if inside else self.texts).append(data)


def strings(value):
    """Every text in a JSON value."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in strings(item)]


def test_hostile_text_stays_text(call, hostile, tmp_path):
    for method in ("none", "rome_plain"):
        outcome = call("run", *hostile, f"intervene={method}")
        assert outcome.code == 0, outcome.err
    place = Path("results/hostile")
    outcome = call("report", place)
    assert outcome.code == 0, outcome.err
    assert "\x1b" not in outcome.out + outcome.err

    said = [fact for run in load_runs(place) for fact in run.facts]
    assert len({fact["subject"] for fact in said} & set(SUBJECTS)) >= len(SUBJECTS) - 2
    raw = (place / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(raw)
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 3
    assert not {"b", "i", "u", "iframe", "object", "base", "link"} & set(names)
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert "javascript:" not in (attributes.get("href") or "")
    texts = " ".join(page.texts)
    assert all(fact["subject"] in texts for fact in said)

    [data] = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', raw, re.DOTALL)
    assert "<" not in data
    for text in strings(json.loads(data)):
        assert not re.search(r"<(?!/?(b|i|br|sub|sup|span|extra)\b)|<a\b|javascript:", text), text
    tex = (place / "report.tex").read_text(encoding="utf-8")
    assert not re.search(r"\\(input|immediate|write18|textbf\{\{)", tex)

    inside = {path.relative_to(tmp_path).parts[0] for path in files(tmp_path)}
    assert inside == {"results", "facts <&>.jsonl", "<b>mo_del&'\"%$#"}
    allowed = {"run.json", "rows.parquet", "facts.json", "DONE", "intervention.json",
               "intervention.safetensors", "report.html", "report.csv", "report.tex",
               "recoverable.tex"}  # fmt: skip
    assert {path.name for path in files(place)} <= allowed


def test_facts_check_shows_hostile_text_as_it_is(call, hostile):
    outcome = call("facts", "check", "facts <&>.jsonl")
    assert "\x1b" not in outcome.out + outcome.err
    assert "<u>P17</u>/../.." in outcome.out


def test_a_hostile_method_s_name_is_escaped_in_every_view(call, few, tmp_path):
    name = "<img src=x onerror=alert(1)> 50%_&$#{[red]x[/red]"
    place = tmp_path / "conf" / "intervene" / f"{name}.yaml"
    place.parent.mkdir(parents=True)
    place.write_text("_target_: palimpsest.intervene.controls.NoChange\n", encoding="utf-8")
    outcome = call("run", "--config-dir", "conf", *few, f"intervene={quoted(name)}")
    assert outcome.code == 0, outcome.err
    outcome = call("report", "results/runs")
    assert outcome.code == 0, outcome.err
    assert "[red]" in outcome.out
    raw = Path("results/runs/report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(raw)
    assert "img" not in {tag for tag, _ in page.tags}
    assert name in " ".join(page.texts)
    tex = Path("results/runs/report.tex").read_text(encoding="utf-8")
    assert r"50\%\_\&\$\#\{[red]x[/red]" in tex


# -- control characters ----------------------------------------------------------------------------

CONTROLS = "\x1b[31m\x1b]0;evil\x1b\\\x9b2J"
"""A colour, a window's title, and the C1 form of what clears the screen."""


def check_shown(outcome, *parts):
    """Nothing that controls the terminal, and the text all the same."""
    shown = outcome.out + outcome.err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown), ascii(shown)
    for part in (r"\x1b[31m", *parts):
        assert part in shown


def test_of_a_directory_s_name(call):
    outcome = call("report", CONTROLS)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    check_shown(outcome, "found nothing at ")


@pytest.mark.parametrize("name", ["run_id", "status"])
def test_of_an_unfinished_run(call, name):
    record = {"run_id": "a", "method": "none", "status": "failed", name: f"{CONTROLS}\nb"}
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/run.json").write_text(json.dumps(record))
    outcome = call("report", "runs")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    check_shown(outcome, "expected finished runs")


def test_of_a_finished_run(call, done, tmp_path):
    place = tmp_path / "runs" / "a"
    shutil.copytree(done["none"].path, place)
    record = json.loads((place / "run.json").read_text())
    (place / "run.json").write_text(json.dumps(record | {"method": CONTROLS}))
    outcome = call("report", "runs")
    assert outcome.code == 0, outcome.err
    check_shown(outcome)


def test_of_a_sweep_s_key(call):
    Path("sweep.yaml").write_text(
        json.dumps({"method": "grid", "parameters": {CONTROLS: {"values": []}}})
    )
    outcome = call("sweep", "sweep.yaml")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    check_shown(outcome, "parameters.")


def test_of_a_model_s_type(call, few, tiny, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(tiny.model, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"model_type": CONTROLS}))
    outcome = call("run", *few, "intervene=none", "model.path=model")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    check_shown(outcome, "expected a model directory")


@pytest.mark.parametrize("text", [json.dumps({"relation": "P17"}), ""])
def test_of_a_file_s_name(call, text):
    name = CONTROLS + ".jsonl"
    Path(name).write_text(text)
    outcome = call("facts", "check", name)
    assert outcome.code == (2 if text else 0)
    check_shown(outcome, ".jsonl")


def test_of_a_failure_s_traceback_which_keeps_its_lines(call, few, monkeypatch):
    def fit(*_):
        raise RuntimeError(CONTROLS)

    monkeypatch.setattr(NoChange, "fit", fit)
    outcome = call("run", *few, "intervene=none")
    assert outcome.code == 1
    assert outcome.err.startswith("Traceback (most recent call last):\n  File ")
    check_shown(outcome, "RuntimeError: ")


# -- names that are paths --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../x", "..", ".", "/x", "a/b", "a\\\\b", ""])
def test_a_sweep_s_name_is_no_path(call, few, tmp_path, name):
    before = set(tmp_path.parent.iterdir())
    outcome = call("run", *few, "intervene=none", f'record.sweep="{name}"')
    assert outcome.code == 2
    assert "expected record.sweep to be a plain name" in outcome.err
    assert "record.dir" in outcome.err
    assert (files(tmp_path), set(tmp_path.parent.iterdir())) == ([], before)


# -- fact files ------------------------------------------------------------------------------------

GOOD = {"relation": "P17", "subject": "Bo", "prompt": "{} lies in", "true": "France"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"relation": NaN}', "NaN, which is not JSON"),
        ('{"relation": -Infinity}', "-Infinity, which is not JSON"),
        (json.dumps(GOOD | {"subject": "B\x1b[31mo"}), "without control characters, found U+001B"),
        (json.dumps(GOOD | {"true": "Fra\x00nce"}), "without control characters, found U+0000"),
        (json.dumps(GOOD | {"prompt": "{} \x07 in"}), "without control characters, found U+0007"),
        (json.dumps(GOOD | {"subject": "Bo\r\nX"}), "without control characters, found U+000D"),
        (json.dumps(GOOD | {"subject": "\ud800"}), "without control characters, found U+D800"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(GOOD | {"\x1b[2J": "x"}), "expected a known key"),
        ("\x1b]0;evil\x07", "expected one JSON value"),
    ],
)
@pytest.mark.parametrize("command", [["run", "intervene=none", "facts=file"], ["facts", "check"]])
def test_bad_lines_are_refused_and_told_without_control_characters(
    call, tiny, command, line, message
):
    Path("facts.jsonl").write_text(line + "\n", encoding="utf-8")
    run = command[0] == "run"
    rest = [f"model.path={tiny.model}", "locate.layer=0", "facts.path=facts.jsonl"]
    outcome = call(*command, *(rest if run else ["facts.jsonl"]))
    assert outcome.code == 2
    assert message in outcome.out + outcome.err
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", outcome.out + outcome.err)


def test_a_line_of_a_hundred_megabytes_is_refused_quickly(call):
    path = Path("facts.jsonl")
    with path.open("wb") as file:
        file.write(b'{"relation": "')
        file.seek(100_000_000)
        file.write(b'"}\n' + json.dumps(GOOD).encode() + b"\n")
    start = time.monotonic()
    tracemalloc.start()
    try:
        contents = read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    outcome = call("facts", "check", path)
    assert time.monotonic() - start < 20
    assert peak < 20e6
    assert [(p.line, p.text[:26]) for p in contents.problems] == [(1, "expected at most 1000000 b")]
    assert [fact.subject for fact in contents.facts] == ["Bo"]
    assert outcome.code == 2
    assert "line 1: expected at most 1000000 bytes" in outcome.out


LAYOUT = ("trex_lms_vocab", "pattern_data/graphs_json")
"""ParaRel's directories."""

RECORD = json.dumps({"sub_label": "Bo", "obj_label": "France"}).encode()


@pytest.fixture
def data(tmp_path):
    """ParaRel's layout: a relation, and a file of facts that will be refused."""
    for part in LAYOUT:
        (tmp_path / "data" / part).mkdir(parents=True)
        (tmp_path / "data" / part / "P17.jsonl").write_text('{"pattern": "[X] lies in [Y] ."}\n')
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("facts", "file", "start", "end", "line"),
    [
        (CounterFact, "facts.json", b'{"case_id": 0, "a": "', b'"}\n', 1),
        (CounterFact, "facts.json", b'{"case_id": 0}\n\n{"a": "', b'"}\n', 3),
        (CounterFact, "facts.json", b'[\n{"case_id": 0},\n{"a": "', b'"}\n]\n', 3),
        (CounterFact, "facts.json", b'["', b'"]', 1),
        (ParaRel, f"{LAYOUT[0]}/P17.jsonl", RECORD + b'\n{"sub_label": "', b'"}\n', 2),
        (ParaRel, f"{LAYOUT[1]}/P17.jsonl", b'{"pattern": "', b'"}\n', 1),
    ],
    ids=range(6),
)
def test_a_record_of_a_hundred_megabytes_is_refused_in_little_memory(
    data, facts, file, start, end, line
):
    with (data / file).open("wb") as out:
        out.writelines([start, *[b"1" * 1_000_000] * 100, end])
    path = str(data / file if facts is CounterFact else data)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError) as caught:
            facts(path=path).load()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert re.search(rf"\bline {line}: .*(at most|more than) 1000000[^\n]*$", str(caught.value))
    assert peak < 50e6


@pytest.mark.parametrize("part", LAYOUT)
def test_nesting_in_pararel_is_refused(call, few, data, part):
    (data / part / "P17.jsonl").write_text(f"\n{'[' * 100_000}\n")
    words = [word for word in few if not word.startswith("facts")]
    outcome = call("run", *words, "facts=pararel", "facts.path=data", "facts.relations=[]")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"{part}/P17.jsonl, line 2: " in outcome.err
    assert "nested too deeply" in outcome.err


# -- no code in data -------------------------------------------------------------------------------


def test_the_source_reads_no_pickles_and_trusts_no_code():
    risky = (
        r"\b(pickle|dill|marshal|shelve)\b|\b(torch|joblib|yaml)\.(unsafe_)?load\("
        r"|allow_pickle|weights_only|trust_remote_code\"?\s*[=:]\s*True|(?<![.\w])(eval|exec)\("
    )
    sources = list(SOURCE.rglob("*.py"))
    assert len(sources) > 50
    found = [
        f"{path.name}: {match[0]}"
        for path in sources
        for match in re.finditer(risky, path.read_text(encoding="utf-8"))
    ]
    assert found == ["documents.py: yaml.load("]
    assert issubclass(documents.Loader, SafeConstructor)
    assert not issubclass(documents.Loader, FullConstructor)


class Bomb:
    """Leaves a file where it is unpickled."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_model_that_is_only_a_pickle_is_refused(call, few, tiny, tmp_path, name):
    place = tmp_path / "model"
    shutil.copytree(tiny.model, place, ignore=shutil.ignore_patterns("*.safetensors"))
    (place / name).write_bytes(pickle.dumps(Bomb()))
    outcome = call("run", *few, "intervene=none", "model.path=model")
    assert outcome.code == 2
    assert "with safetensors weights" in outcome.err
    assert not Path("exploded").exists()


# -- secrets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("tracker", ["record=local", "record=wandb"])
def test_keys_are_told_nowhere(call, few, tmp_path, monkeypatch, tracker, fails):
    def fit(*_):
        keys = {name: os.environ[name] for name in SECRETS}
        raise RuntimeError(f"401 for https://me:{keys['HF_TOKEN']}@host with {keys}")

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    if fails:
        monkeypatch.setattr(NoChange, "fit", fit)
    mode = ["record.tracker.mode=offline"] if tracker == "record=wandb" else []
    outcome = call("run", *few, "intervene=none", tracker, *mode)
    assert outcome.code == int(fails), outcome.err
    assert ("401 for" in outcome.err) == fails
    if not fails:
        assert call("report", "results/runs").code == 0
    written = files(tmp_path)
    assert any(path.name == "run.json" for path in written)
    for value in SECRETS.values():
        assert value not in outcome.out + outcome.err
        assert [path for path in written if value.encode() in path.read_bytes()] == []
