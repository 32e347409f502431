from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from palimpsest.errors import RequestError
from palimpsest.model import architecture
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.model.tiny import gpt2, llama, make_handle, make_model, relative, tokenizer

Make = Callable[[], ModelHandle]


def first_input(module: nn.Module, run: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """What a module gets and gives, by plain hooks."""
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend([args[0], output])

    remove = module.register_forward_hook(see)
    run()
    remove.remove()
    return seen[0], seen[1]


# -- what is refused -------------------------------------------------------------------------------


def test_an_unknown_architecture_is_refused_with_its_modules() -> None:
    model = llama()
    model.config.model_type = "unheard_of"
    with pytest.raises(RequestError) as caught:
        ModelHandle(model, tokenizer(), "unheard")
    message = str(caught.value)
    assert f"a known architecture ({', '.join(sorted(architecture.TABLE))})" in message
    assert "'unheard_of' with modules model (LlamaModel)" in message
    assert "lm_head (Linear)" in message
    assert "add a row" in message
    assert "model/architecture.py" in message


def test_a_slow_tokenizer_is_refused() -> None:
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(RequestError, match=r"fast tokenizer .* found SimpleNamespace; convert"):
        ModelHandle(llama(), slow, "tiny")  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "wrong"), [("gpt2", "mlp.c_fc"), ("llama", "mlp.up_proj")])
def test_a_table_that_names_the_wrong_matrix_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, wrong: str
) -> None:
    row = architecture.TABLE[kind]
    broken = architecture.Architecture(**{**vars(row), "w_out": wrong})
    monkeypatch.setitem(architecture.TABLE, kind, broken)
    found = r"\(128, 32\)" if kind == "gpt2" else r"\(64, 32\)"
    with pytest.raises(RequestError, match=f"layer 0 to write 32 features, found shape {found}"):
        make_handle(kind)


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_a_layer_out_of_range_is_refused(handle: ModelHandle, layer: int) -> None:
    with pytest.raises(RequestError, match=f"from 0 to 3 for {handle.name}, found {layer}; set"):
        handle.check_layer(layer)


def test_a_layer_in_range_is_itself(handle: ModelHandle) -> None:
    assert [handle.check_layer(layer) for layer in range(4)] == [0, 1, 2, 3]


def test_the_model_is_in_evaluation_mode_without_gradients() -> None:
    model = gpt2().train().requires_grad_(True)
    handle = ModelHandle(model, tokenizer(), "tiny")
    assert not any(module.training for module in handle.model.modules())
    assert not any(weight.requires_grad for weight in handle.model.parameters())


# -- W_out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_w_out_maps_what_goes_in_to_what_comes_out(kind: str, square: bool) -> None:
    inner = "n_inner" if kind == "gpt2" else "intermediate_size"
    handle = make_handle(kind, **{inner: 32 if square else 48})
    ids = torch.tensor([[5, 7, 11]])
    for layer in range(4):
        module = handle.module(Site(layer, "mlp"))
        assert isinstance(module, Conv1D if kind == "gpt2" else nn.Linear)
        key, value = first_input(module, lambda: handle.model(ids))
        matrix = handle.w_out(layer)
        assert matrix.shape == (32, 32 if square else 48)
        bias = module.bias if module.bias is not None else torch.zeros(32)
        assert relative(key @ matrix.T + bias, value) < 1e-5


@torch.no_grad()
def test_w_out_writes_through_to_the_model(handle: ModelHandle) -> None:
    ids = torch.tensor([[5, 7, 11]])
    module = handle.module(Site(2, "mlp"))
    key, before = first_input(module, lambda: handle.model(ids))
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, generator=generator) for n in (key.shape[-1], 32))
    handle.w_out(2).add_(torch.outer(right, left))
    _, after = first_input(module, lambda: handle.model(ids))
    assert relative(after - before, (key @ left)[..., None] * right) < 1e-5


# -- hooks -----------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Returns a tuple, as attention modules and some blocks do."""

    def forward(self, hidden_states: Tensor, scale: float = 2.0) -> tuple[Tensor, str]:
        return hidden_states * scale, "kept"


class Single(nn.Module):
    """Returns a tensor."""

    def forward(self, hidden_states: Tensor, scale: float = 2.0) -> Tensor:
        return hidden_states * scale


def test_hooks_see_and_replace_outputs_bare_or_first_in_a_tuple(llama: ModelHandle) -> None:
    single, pair, x = Single(), Pair(), torch.ones(2)
    seen: list[Tensor] = []
    with llama.hooked([(module, seen.append) for module in (single, pair)]):  # type: ignore[list-item]
        assert torch.equal(single(x), 2 * x)  # None leaves the output
        assert pair(x)[1] == "kept"
    assert all(torch.equal(state, 2 * x) for state in seen)
    assert len(seen) == 2
    with llama.hooked([(module, lambda y: y + 1) for module in (single, pair)]):
        assert torch.equal(single(x), 2 * x + 1)
        assert torch.equal(pair(x)[0], 2 * x + 1)
        assert pair(x)[1] == "kept"


def test_input_hooks_see_and_replace_positional_and_keyword_inputs(llama: ModelHandle) -> None:
    module, x = Single(), torch.ones(2)
    seen: list[Tensor] = []
    with llama.hooked_input([(module, seen.append)]):  # type: ignore[list-item]
        assert torch.equal(module(x, scale=3.0), 3 * x)
        assert torch.equal(module(hidden_states=x, scale=3.0), 3 * x)
    assert [torch.equal(state, x) for state in seen] == [True, True]
    with llama.hooked_input([(module, lambda y: y + 1)]):
        assert torch.equal(module(x, scale=3.0), 6 * x)
        assert torch.equal(module(hidden_states=x, scale=3.0), 6 * x)


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_hooks_are_removed_after_an_error_in_the_body(handle: ModelHandle) -> None:
    module = handle.module(Site(1, "attention"))

    def interrupted() -> None:
        with (
            handle.hooked([(module, lambda y: y + 1)]),
            handle.hooked_input([(module, lambda y: y + 1)]),
        ):
            assert hooks_of(handle.model) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hooks_of(handle.model) == 0


def test_hooks_are_removed_when_a_later_one_cannot_be_set(handle: ModelHandle) -> None:
    first = handle.blocks[0]
    for hooked in (handle.hooked, handle.hooked_input):
        with pytest.raises(AttributeError), hooked([(first, abs), (None, abs)]):  # type: ignore[list-item]
            pytest.fail("the body must not run")
    assert hooks_of(handle.model) == 0


# -- the fingerprint -------------------------------------------------------------------------------


def load(directory: Path, dtype: torch.dtype = torch.float32) -> ModelHandle:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return ModelHandle(model, tokenizer(), "any", "", 1)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_equal_weights_have_one_fingerprint_wherever_they_lie(kind: str, tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        make_model(kind).save_pretrained(tmp_path / name)
    one, two = load(tmp_path / "a"), load(tmp_path / "b" / "c")
    assert one.fingerprint == two.fingerprint == make_handle(kind).fingerprint
    assert len(one.fingerprint) == 64


def test_the_fingerprint_tells_weights_apart() -> None:
    assert make_handle(seed=0).fingerprint != make_handle(seed=1).fingerprint
    changed = llama()
    with torch.no_grad():
        changed.model.layers[3].mlp.up_proj.weight[63, 31] += 1e-6
    handle = ModelHandle(changed, tokenizer(), "tiny-llama")
    assert handle.fingerprint != make_handle().fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fingerprint_tells_precisions_apart(dtype: torch.dtype) -> None:
    zeros = [llama(), llama().to(dtype)]
    with torch.no_grad():
        for model in zeros:
            for weight in model.parameters():
                weight.zero_()
    one, two = (ModelHandle(model, tokenizer(), "tiny") for model in zeros)
    assert one.fingerprint != two.fingerprint


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    backend = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    backend.add_tokens(["Osaka"])
    other = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert ModelHandle(llama(), other, "tiny").fingerprint != make_handle().fingerprint


def test_the_fingerprint_knows_no_name_prefix_or_batch_size() -> None:
    one = make_handle(prefix="\n", batch_size=1)
    two = ModelHandle(llama(), tokenizer(), "another", "Fact:", 64)
    assert one.fingerprint == two.fingerprint
