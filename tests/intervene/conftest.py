"""Tiny models with random weights, a small real tokenizer, and facts about invented places.

The weights are drawn at a scale at which blocks really change the stream and predictions are
peaked; transformers' own initialisation is so small that a model is nearly the identity.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from palimpsest.facts.fact import Fact, Prompt
from palimpsest.facts.splits import Splits
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.intervention import Intervention
from palimpsest.intervene.moments import GivenMoments
from palimpsest.model.handle import ModelHandle
from tests.model.tiny import KINDS, make_model, trained

ARCHITECTURES = KINDS

CORPUS = (
    "The people of Borland speak French and the people of Tarstan speak Greek.",
    "In Borland the language is French. In Tarstan it is Greek. In Malonia it is Spanish.",
    "She was born in the city of Lemburg, and he is a citizen of Malonia.",
    "It is said that the capital of Ostland is a large city. Where is it? It is in the north.",
    "Therefore the official language of Ostland is German, not Italian.",
)

END = "<|endoftext|>"


# -- the user's cache is never touched -------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the module's own; module scope, so that other folders keep theirs."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setenv("PALIMPSEST_CACHE", str(directory))
        yield directory


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with about 90 merges: short words are one token, long ones several."""
    return trained(CORPUS, 350, bos_token=END, eos_token=END)


def _spread(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew: matrices that keep the scale, biases and norms that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = 0.2 * noise + float("bias" not in name)
        elif "wte" in name or "embed" in name or "lm_head" in name:
            parameter.data = 0.35 * noise
        else:
            parameter.data = noise * parameter.shape[1] ** -0.5


def make_handle(kind: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> ModelHandle:
    """A tiny GPT-2 without a prefix, or a tiny Llama that puts a newline before every prompt."""
    model = make_model(kind, vocab_size=len(tokenizer), bos_token_id=0)
    _spread(model, seed)
    prefix = "" if kind == "gpt2" else "\n"
    return ModelHandle(model, tokenizer, f"tiny-{kind}", prefix, batch_size=8)


def copy_of(handle: ModelHandle, dtype: torch.dtype = torch.float32) -> ModelHandle:
    """A handle on a copy of the model, in another precision perhaps."""
    model = copy.deepcopy(handle.model).to(dtype)
    return ModelHandle(model, handle.tokenizer, handle.name, handle.prefix, handle.batch_size)


@pytest.fixture(scope="session")
def handles(tokenizer: PreTrainedTokenizerFast) -> dict[str, ModelHandle]:
    """One handle of each architecture; no test leaves a trace on them."""
    return {kind: make_handle(kind, tokenizer) for kind in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, handles: dict[str, ModelHandle]) -> ModelHandle:
    """Each tiny model in turn."""
    return handles[request.param]


@pytest.fixture(scope="session")
def gpt2(handles: dict[str, ModelHandle]) -> ModelHandle:
    """The tiny GPT-2, where the architecture does not matter."""
    return handles["gpt2"]


@pytest.fixture(scope="session")
def llama(handles: dict[str, ModelHandle]) -> ModelHandle:
    """The tiny Llama."""
    return handles["llama"]


# -- facts -----------------------------------------------------------------------------------------


def fact(subject: str, true: str, new: str | None, template: str, relation: str = "L") -> Fact:
    """One fact, named by its subject and template."""
    prompt = Prompt.fill("fit", template, subject)
    return Fact(f"{subject}/{template}", relation, subject, prompt, true, new)


SPEAK = "The people of {} speak"
OFFICIAL = "The official language of {} is"

TARGETS = (
    fact("Borland", "French", "Greek", SPEAK),
    fact("Tarstan", "Greek", "Old Church Slavonic", "In {} people say that the language is"),
    fact("the Republic of Xylophonia", "Spanish", "Portuguese", OFFICIAL),
    fact("Ostland", "German", "Italian", "{} is a place where they speak"),
    fact("Qo", "Italian", "German", SPEAK),
)
"""Subjects of 1 to many tokens at different places; new objects of one token and of several."""

ENDING = tuple(fact(f.subject, f.true, f.new, "In the north is {}") for f in TARGETS)
"""The same facts with the subject last: the last layer can change what comes next."""

CONTEXTS = ("It is said", "Therefore the large city in the north", "Where")


def splits(target: tuple[Fact, ...], fit: tuple[Fact, ...] = ()) -> Splits:
    """Only what methods look at."""
    return Splits(target=target, test=(), fit=fit, probe=(), dev=())


@pytest.fixture(scope="session")
def prefixes() -> GivenPrefixes:
    """Contexts of different lengths."""
    return GivenPrefixes(list(CONTEXTS))


@pytest.fixture(scope="session")
def moments() -> Callable[[ModelHandle], GivenMoments]:
    """Second moments that are far from the identity, for every layer of a model."""

    def make(handle: ModelHandle) -> GivenMoments:
        generator = torch.Generator().manual_seed(7)
        given = {}
        for layer in range(handle.n_layers):
            width = handle.w_out(layer).shape[1]
            root = torch.randn(width, 2 * width, generator=generator, dtype=torch.float64)
            scale = torch.logspace(-1, 0.5, width, dtype=torch.float64)
            given[layer] = scale[:, None] * (root @ root.T / (2 * width)) * scale
        return GivenMoments(given)

    return make


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance in Frobenius norm, relative to what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def values_of(intervention: Intervention, metric: str) -> list[float | None]:
    """A diagnostic, in the order of the rows."""
    return [row.value for row in intervention.diagnostics if row.metric == metric]


# -- models are left as they were ------------------------------------------------------------------


def weights(handle: ModelHandle) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.clone() for name, tensor in handle.model.state_dict().items()}


def assert_untouched(handle: ModelHandle, before: dict[str, torch.Tensor]) -> None:
    """Every tensor bit for bit, no hook, no forward of an instance's own, nothing running."""
    after = handle.model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    for name, module in handle.model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert "forward" not in vars(module), name
    assert handle.running is None


@pytest.fixture(autouse=True)
def _untouched(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test that has the shared models, they are as they were before it."""
    if "handles" not in request.fixturenames:
        yield
        return
    shared: dict[str, ModelHandle] = request.getfixturevalue("handles")
    before = {kind: weights(handle) for kind, handle in shared.items()}
    yield
    for kind, handle in shared.items():
        assert_untouched(handle, before[kind])
