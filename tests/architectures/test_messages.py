"""What is said where a model is not what the table expects."""

from dataclasses import replace

import pytest
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from palimpsest.errors import RequestError
from palimpsest.model import architecture
from palimpsest.model.handle import ModelHandle
from tests.architectures.tiny import make_handle, make_model, tokenizer


def test_an_unknown_architecture_is_answered_with_its_modules_and_the_remedy() -> None:
    config = GPTBigCodeConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(RequestError) as refused:
        ModelHandle(GPTBigCodeForCausalLM(config), tokenizer(), "unknown")
    message = str(refused.value)
    assert "found model_type 'gpt_bigcode' with modules transformer (GPTBigCodeModel)" in message
    assert "transformer.h.0.mlp.c_proj (Linear)" in message
    assert "transformer.h.1" not in message  # one block tells it all
    assert "bloom, gemma2" in message
    assert "add a row of their paths to TABLE in palimpsest/model/architecture.py" in message
    assert "\n" not in message


@pytest.mark.parametrize("field", ["decoder", "blocks", "attention", "w_out", "final_norm"])
def test_a_row_that_names_no_module_is_answered_with_the_modules(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(architecture.TABLE["llama"], **{field: "elsewhere"})
    monkeypatch.setitem(architecture.TABLE, "llama", row)
    with pytest.raises(RequestError, match=r"expected a module 'elsewhere' in Llama\w+, found .*;"):
        make_handle("llama")


def test_a_row_that_names_the_wrong_matrix_is_answered_with_its_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = replace(architecture.TABLE["llama"], w_out="mlp.up_proj")
    monkeypatch.setitem(architecture.TABLE, "llama", row)
    with pytest.raises(RequestError, match=r"W_out of layer 0 to write 32 features, .*\(48, 32\)"):
        ModelHandle(make_model("llama"), tokenizer(), "wrong")
