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


@pytest.mark.parametrize(
    "field",
    ["decoder", "blocks", "attention", "attention_norm", "mlp_norm", "w_out", "final_norm"],
)
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


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (
            "llama",
            {"mlp_norm": "mlp.down_proj"},
            r"mlp_norm of layer 0 to give 32 features, found shape \(32, 48\); mend the row",
        ),
        (
            "llama",
            {"mlp_readers": ("mlp.gate_proj", "mlp.down_proj")},
            r"mlp\.down_proj of layer 0 to read 32 features, found shape \(32, 48\) \(out, in\); m",
        ),
        (
            "gpt2",
            {"attention_readers": ("mlp.c_proj",)},
            r"mlp\.c_proj of layer 0 to read 32 features, found shape \(32, 48\) \(out, in\); m",
        ),
        ("llama", {"attention_readers": ("q",)}, r"expected a module 'q' in LlamaDecoderLayer"),
    ],
)
def test_a_row_that_names_the_wrong_norm_or_reader_is_answered(
    name: str, change: dict, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(architecture.TABLE, name, replace(architecture.TABLE[name], **change))
    with pytest.raises(RequestError, match=told):
        make_handle(name)
