"""No credential passes the door, and none that the environment holds is left behind."""

import random
import re
import string
from pathlib import Path

import pytest

from palimpsest.cli.door import admitted, refuse_credentials
from palimpsest.errors import RequestError
from palimpsest.intervene.erasers.leace import Leace

SIGNS = string.ascii_letters + string.digits


def drawn(length: int, signs: str = SIGNS, seed: int = 3) -> str:
    """Made here, so that no scanner of repositories takes the tests for a leak."""
    return "".join(random.Random(seed).choices(signs, k=length))


UPPER = string.ascii_uppercase + string.digits
CREDENTIALS = {
    "hugging face": "hf_" + drawn(34),
    "hugging face, lower case": "hf_" + drawn(34, string.ascii_lowercase),
    "openai": "sk-" + drawn(48),
    "openai of a project": "sk-proj-" + drawn(60),
    "anthropic": "sk-ant-api03-" + drawn(80) + "-" + drawn(12),
    "github": "ghp_" + drawn(36),
    "github of an app": "ghs_" + drawn(36),
    "github of a user": "gho_" + drawn(36),
    "github, fine-grained": "github_pat_" + drawn(22) + "_" + drawn(59),
    "gitlab": "glpat-" + drawn(20),
    "slack": "xoxb-" + drawn(12, string.digits) + "-" + drawn(24),
    "aws": "AKIA" + drawn(16, UPPER),
    "aws for a while": "ASIA" + drawn(16, UPPER),
    "google": "AIza" + drawn(35),
    "npm": "npm_" + drawn(36),
    "pypi": "pypi-AgEIcHlwaS5vcmc" + drawn(60),
    "wandb": "wandb_v1_" + drawn(40),
    "json web token": f"eyJ{drawn(20)}.eyJ{drawn(30)}.{drawn(43)}",
    "a key in PEM": "-----BEGIN RSA PRIVATE KEY-----\nMIIB" + drawn(40) + "\n",
    "address": "https://me:hunter2@host/model",
    "address with a query": "https://host/model?access_token=hunter2hunter2",
    "no known form, 24": drawn(24),
    "no known form, 43": drawn(43, seed=5),
}
"""By what they are of."""

NONE = [
    "model.revision=0123456789abcdef0123456789abcdef01234567",
    "model.revision=" + "0123456789abcdef" * 4,
    "model.path=/cache/models--org--name/snapshots/0123456789abcdef0123456789abcdef01234567",
    "model.path=/nix/store/" + drawn(32, string.ascii_lowercase + string.digits) + "-model",
    "model.path=/tmp/" + drawn(30) + "/model",
    "model.path=../" + drawn(30),
    "facts.path=" + drawn(30) + ".jsonl",
    "model.path=C:\\Users\\" + drawn(30),
    "record.sweep=ROMEvsLEACE2026SmolLM2Run7",
    "record.sweep=Run2Layer5Seed3Fit2026Limit24",
    "record.sweep=GPT2XLLayer17Rank1Seed0Lr5e4",
    "record.sweep=N24T64F1152P320D16Others48",
    "record.sweep=20261130T120000ZExperimentA1B2",
    "model.name=DeepSeek-R1-Distill-Qwen-1.5B-Instruct-Q4_K_M",
    "model.path=Meta-Llama-3-8B-Instruct-4bit-AWQ-GEMM",
    "model.path=/data/hf_checkpoints_of_smollm2_v3/step_20000",
    "model.path=/data/sk-learn-models/task-specific-models-2026",
    "model.path=git@host:models",
    "locate.layer=0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28",
    "intervene.layers=[10,11,12,13,14,15,16,17,18,19,20,21,22,23]",
    "evaluate.inversion.prompt='The secret of the city of Villingen: its Token Museum is in'",
    "evaluate.lens.tokens=4096",
    "evaluate.downstream.row_tokens=128",
    "intervene.moments.tokens=100000",
    "tracing.tokens=named",
    "+measure.last_token=subject",
    "+measure.token=3",
    "record.tracker.tags=[ROME,LEACE,SmolLM2-135M-Instruct]",
    "~seed",
    "-m",
    "hydra/launcher=joblib",
]


def found(directory: Path, secret: str) -> list[Path]:
    """The files that hold a secret, in bytes or in their names."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [p for p in files if secret.encode() in p.read_bytes() or secret in str(p)]


def check_refused(outcome, secret, tmp_path):
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"error: expected no (credential|secret)\b.*\n", outcome.err), outcome.err
    for piece in [secret, *re.findall(r"\w{12,}|hunter2\w*", secret)]:
        assert piece not in outcome.err
    assert found(tmp_path, secret) == []


@pytest.mark.parametrize("name", CREDENTIALS)
def test_a_credential_is_refused_and_leaves_nothing(call, tmp_path, name):
    secret = CREDENTIALS[name]
    outcome = call("run", "intervene=none", f"model.path='{secret}'")
    check_refused(outcome, secret, tmp_path)
    assert "found what looks like one in model.path;" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["run", "-m", "seed=0,1", "record.tracker.entity={}"],
        ["run", "{}"],
        ["run", "{}=1"],
        ["run", "hydra.sweep.dir={}"],
        ["run", "model={{path: {}}}"],
        ["run", "record.tracker.tags=[a,{}]"],
        ["trace", "model.revision={}"],
        ["facts", "check", "facts.jsonl", "model.name={}"],
        ["sweep", "gone.yaml", "record.sweep={}"],
        ["ask", "The tower is in", "--model", "{}"],
        ["fetch", "{}"],
        ["{}"],
    ],
    ids=lambda words: " ".join(words),
)
def test_a_credential_is_refused_in_every_command(call, tmp_path, words):
    secret = CREDENTIALS["gitlab"]
    check_refused(call(*(word.format(secret) for word in words)), secret, tmp_path)


@pytest.mark.parametrize(
    "word",
    [
        "+model.hf_token=hunter2",
        "model.token=hunter2hunter2",
        "++record.tracker.api_key=hunter2",
        "+record.tracker.apiKey=hunter2",
        "+wandb.api-key=hunter2",
        "+model.password=hunter2",
        "+hub.authToken=hunter2",
        "+hub.client_secret=hunter2",
        "+aws.secret_access_key=hunter2",
        "+model.hub={token:hunter2}",
        "+model.hub={a:1, 'hf_token': 'hunter2'}",
        "+model.hubs=[{password:hunter2}]",
    ],
)
def test_a_setting_that_speaks_of_a_credential_is_refused(call, tmp_path, word):
    outcome = call("run", word)
    check_refused(outcome, "hunter2", tmp_path)
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        assert name in outcome.err


@pytest.mark.parametrize("entry", ["{{value: {}}}", "{{values: [a, {}]}}", "{{value: {{x: {}}}}}"])
@pytest.mark.parametrize("key", ["model.path", "+model.hf_token"])
def test_a_credential_in_a_sweep_file_is_refused(call, tmp_path, entry, key):
    secret = "hunter2hunter2" if "token" in key else CREDENTIALS["hugging face"]
    file = tmp_path / "s.yaml"
    file.write_text(f"method: grid\nparameters:\n  {key}: {entry.format(secret)}\n")
    outcome = call("sweep", file)
    file.unlink()
    check_refused(outcome, secret, tmp_path)
    assert "s.yaml" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", NONE)
def test_what_is_no_credential_passes(word):
    refuse_credentials([word])


def test_all_words_of_the_documentation_pass():
    root = Path(__file__).parents[2]
    words = set()
    for path in [*root.glob("docs/*.md"), *root.glob("sweeps/*.yaml"), root / "README.md"]:
        words |= set(path.read_text(encoding="utf-8").split())
    assert len(words) > 5000
    refuse_credentials(sorted(words))


# -- what the environment holds --------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch):
    """A secret that the environment holds, of no form that is known."""
    monkeypatch.setenv("MY_TOKEN", "correct-horse-battery")
    return "correct-horse-battery"


def test_a_word_with_a_secret_of_the_environment_is_refused(call, tmp_path, held):
    outcome = call("run", f"model.path=/somewhere/{held}/model")
    check_refused(outcome, held, tmp_path)
    assert "the environment variable MY_TOKEN" in outcome.err


def test_a_place_that_the_environment_names_is_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("SSH_KEY_DIR", str(tmp_path))
    words = ["run", f"record.dir={tmp_path}/results"]
    assert admitted(words) == words


def test_a_tracked_run_leaves_no_secret_of_the_environment(call, few, tmp_path, held):
    words = [*few, "intervene=none", "record=wandb", "record.tracker.mode=offline"]
    outcome = call("run", *words)
    assert outcome.code == 0
    assert list(tmp_path.rglob("*.wandb"))
    assert found(tmp_path, held) == []


def test_an_error_that_names_a_secret_is_told_and_kept_without_it(
    call, few, tmp_path, held, monkeypatch
):
    token = CREDENTIALS["gitlab"]

    def fit(*_):
        raise RuntimeError(f"the hub refused {held} and {token}")

    monkeypatch.setattr(Leace, "fit", fit)
    outcome = call("run", "-m", *few, "intervene=leace", "seed=0,1")
    assert outcome.code == 1
    assert "the hub refused [redacted] and [redacted]" in outcome.err
    assert list(tmp_path.rglob("run.json"))
    for secret in (held, token):
        assert secret not in outcome.out + outcome.err
        assert found(tmp_path, secret) == []


def test_the_refusal_names_no_setting_that_is_itself_a_credential():
    with pytest.raises(RequestError) as caught:
        refuse_credentials([f"{CREDENTIALS['npm']}=1"])
    assert "npm_" not in str(caught.value)
