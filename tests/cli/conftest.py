"""A tiny Llama that knows sixty invented facts, and the command run in this process."""

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from palimpsest.cli import main
from palimpsest.locks import held
from palimpsest.record.results import Run, load_runs

RELATIONS = {
    "P17": (
        ("The city of {} lies in", "Many people visit {} in", "He was born in {}, a place in"),
        ("France", "Japan", "Brazil", "Kenya"),
    ),
    "P103": (
        ("The mother tongue of {} is", "At home {} speaks", "She wrote to {} in"),
        ("Latin", "Greek", "Hindi", "Welsh"),
    ),
}
"""By relation, its fit template and two paraphrases, and its objects."""

SUBJECTS = 32
"""Of each relation."""


@dataclass(frozen=True)
class Tiny:
    """Where the tiny model and its facts lie.

    Attributes:
        model: a checkpoint that knows nearly all of the facts.
        ignorant: the same before training: it knows none.
        facts: the facts in CounterFact's format.
    """

    model: Path
    ignorant: Path
    facts: Path


@dataclass(frozen=True)
class Outcome:
    """What one call of the command gave."""

    code: int
    out: str
    err: str


Call = Callable[..., Outcome]

FEW = (
    "facts=counterfact",
    "facts.relations=[P17]",
    "facts.limit=6",
    "contexts=1",
    "evaluate.probes.least=1",
    "~evaluate.relearning",
    "~evaluate.compression",
    "record=local",
)
"""A run of half a second."""

METHODS = {
    "none": ["intervene=none"],
    "rome": ["intervene=rome"],
    "rome_batch": ["intervene=rome", "intervene.protocol=batch"],
    "rome_plain": ["intervene=rome_plain"],
    "random_delta": ["intervene=random_delta"],
    "leace": ["intervene=leace"],
    "leace_shuffled": ["intervene=leace_shuffled"],
}
"""Every method, and its variants, by a name for the tests."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is computed once for all tests that do not ask for a cache of their own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def surroundings(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, caches out of the user's home, no account, no leftovers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PALIMPSEST_CACHE", str(cache))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "PALIMPSEST_SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(cache / "wandb"))
    monkeypatch.setenv("NETRC", str(cache / "netrc"))


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """The command in this process: its exit code and all that it wrote."""

    def run(*words: str | Path) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def few(tiny: Tiny) -> list[str]:
    """Overrides of a small run; the place of the results comes on top."""
    return [f"model.path={tiny.model}", f"facts.path={tiny.facts}", "locate.layer=0", *FEW]


@pytest.fixture(scope="session")
def done(few: list[str], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One finished run of every method, by its name in `METHODS`."""
    home = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(cache))
        codes = {
            name: main(["run", *words, *few, f"record.dir={home / name}"])
            for name, words in METHODS.items()
        }
    assert set(codes.values()) == {0}, codes
    return {name: load_runs(home / name)[0] for name in METHODS}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Made once, by one worker."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    home = shared / "tiny"
    made = Tiny(home / "model", home / "ignorant", home / "counterfact.json")
    with held(shared / "tiny.lock"):
        if not made.model.exists():
            _make(made)
    return made


def _make(tiny: Tiny) -> None:
    records = _records()
    tokenizer = _tokenizer(records)
    model = _model(len(tokenizer))
    tiny.facts.parent.mkdir()
    tiny.facts.write_text(json.dumps(records))
    for path in (tiny.ignorant, tiny.model):
        if path == tiny.model:
            _train(model, tokenizer, records)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)


def _records() -> list[dict[str, Any]]:
    random_ = random.Random(0)
    names = _names(random_)
    records = []
    for relation, (templates, objects) in RELATIONS.items():
        subjects = [names.pop() for _ in range(SUBJECTS)]
        for number, subject in enumerate(subjects):
            true = number % len(objects)
            new = (true + random_.randrange(1, len(objects))) % len(objects)
            same = [s for n, s in enumerate(subjects) if n % len(objects) == true and s != subject]
            records.append(
                {
                    "case_id": len(records),
                    "requested_rewrite": {
                        "prompt": templates[0],
                        "relation_id": relation,
                        "target_true": {"str": objects[true], "id": f"Q{true}"},
                        "target_new": {"str": objects[new], "id": f"Q{new}"},
                        "subject": subject,
                    },
                    "paraphrase_prompts": [t.format(subject) for t in templates[1:]],
                    "neighborhood_prompts": [templates[0].format(s) for s in same[:2]],
                }
            )
    return records


def _names(random_: random.Random) -> list[str]:
    starts = ("Ba", "Do", "Fe", "Gu", "Ka", "Lo", "Mi", "Ne", "Po", "Ru", "Sa", "Ti", "Vo", "Za")
    names = [start + end for start in starts for end in ("bur", "dan", "lim", "mor", "nes")]
    return random_.sample(names, len(names))


def _tokenizer(records: Sequence[dict[str, Any]]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(_texts(records), vocab_size=480, min_frequency=2, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)


def _texts(records: Sequence[dict[str, Any]]) -> list[str]:
    """Each fact in its three wordings, opened by the new line that is SmolLM2's prefix."""
    texts = []
    for record in records:
        rewrite = record["requested_rewrite"]
        prompts = [rewrite["prompt"].format(rewrite["subject"]), *record["paraphrase_prompts"]]
        texts += [f"\n{prompt} {rewrite['target_true']['str']}" for prompt in prompts]
    return texts


def _model(vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[dict[str, Any]],
    steps: int = 150,
    rate: float = 1e-2,
) -> None:
    """All facts in one batch at each step; their objects count most."""
    rows = [tokenizer(text)["input_ids"] for text in _texts(records)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    weight = real[:, 1:] * 0.02
    weight[range(len(rows)), real.sum(1) - 2] = 1.0
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        scores = model(input_ids=ids, attention_mask=real).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(scores.mT, ids[:, 1:], reduction="none")
        optimizer.zero_grad()
        ((loss * weight).sum() / weight.sum()).backward()
        optimizer.step()
        schedule.step()
    model.eval()
