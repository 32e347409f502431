"""One tiny model of each architecture, with random weights large enough that every part matters."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Tokenizer

from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import Batch, Tokens, collate

WIDTH, D_MLP, LAYERS, WINDOW = 32, 48, 4, 5
WORDS = [first + second for first in "bdfgklmnprst" for second in "aeio"]


@cache
def tokenizer() -> Qwen2Tokenizer:
    """Letters, and words of two letters with the space before them; the end of text is token 0.

    Of the class that transformers insists on for Qwen2, and takes for all others.
    """
    merges = [("Ġ", first) for first in "bdfgklmnprst"]
    merges += [(f"Ġ{word[0]}", word[1]) for word in WORDS]
    tokens = ["<|endoftext|>", "Ġ", *"bdfgklmnprst", *"aeio", *map("".join, merges)]
    return Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


VOCABULARY = len(tokenizer())

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {"num_key_value_heads": 2}
SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "sliding_window": WINDOW,
}
IMAGES: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
}


@dataclass(frozen=True)
class Tiny:
    """A tiny configuration of one model type, and what a reader of it should expect.

    Attributes:
        model_type: the row of the architecture table.
        options: of the configuration, besides `COMMON`.
        d_mlp: the option that sets the width of W_out's input; None if it is fixed.
        after_w_out: what W_out's output passes before it is added to the residual stream.
        adds: a block's output is its input plus what attention and MLP add.
        norms: in front of attention and MLP stand norms that nothing else reads.
        shared_norm: one norm stands in front of both.
    """

    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    d_mlp: str | None = "intermediate_size"
    after_w_out: str | None = None
    adds: bool = True
    norms: bool = True
    shared_norm: bool = False


GEMMA: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, **GROUPED, **SLIDING}

TINY = {
    "bloom": Tiny("bloom", d_mlp=None),
    "gemma2": Tiny(
        "gemma2",
        {**GEMMA, "final_logit_softcapping": 4.0, "attn_logit_softcapping": 3.0},
        after_w_out="post_feedforward_layernorm",
    ),
    "gemma3": Tiny("gemma3_text", GEMMA, after_w_out="post_feedforward_layernorm"),
    "gemma3-images": Tiny(
        "gemma3",
        {"text_config": {**COMMON, **GEMMA, "intermediate_size": D_MLP}, **IMAGES},
        after_w_out="post_feedforward_layernorm",
        d_mlp=None,
    ),
    "gpt2": Tiny("gpt2", d_mlp="n_inner"),
    "gpt_neox": Tiny("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_neox-sequential": Tiny("gpt_neox", {"use_parallel_residual": False}),
    "gptj": Tiny("gptj", {"rotary_dim": 4}, d_mlp="n_inner", shared_norm=True),
    "llama": Tiny("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": Tiny("mistral", {**GROUPED, "head_dim": 8, "sliding_window": WINDOW}),
    "opt": Tiny("opt", {"word_embed_proj_dim": WIDTH}, d_mlp="ffn_dim"),
    "opt-350m": Tiny(
        "opt",
        {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        d_mlp="ffn_dim",
        adds=False,
        norms=False,
    ),
    "phi": Tiny("phi", {"partial_rotary_factor": 0.5}, shared_norm=True),
    "phi3": Tiny("phi3", {**GROUPED, "sliding_window": WINDOW}),
    "qwen2": Tiny("qwen2", {**GROUPED, **SLIDING, "use_sliding_window": True}),
    "qwen3": Tiny("qwen3", {**GROUPED, "head_dim": 8}),
}


def make_model(name: str, **options: Any) -> PreTrainedModel:
    """The tiny model of that name, always the same, in a copy of the caller's own."""
    return deepcopy(_original(name, **options))


@cache
def _original(name: str, **options: Any) -> PreTrainedModel:
    tiny = TINY[name]
    inner = {} if tiny.d_mlp is None else {tiny.d_mlp: D_MLP}
    config = AutoConfig.for_model(tiny.model_type, **{**COMMON, **inner, **tiny.options, **options})
    model = AutoModelForCausalLM.from_config(config)
    _grow(model)
    return model.float().eval()


@torch.no_grad()
def _grow(model: PreTrainedModel) -> None:
    """Random weights of a scale at which every part matters, norms near one."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            weight.copy_(noise * 0.2 + ("bias" not in name))
        else:
            weight.copy_(noise * 0.3)


def make_handle(name: str, **options: Any) -> ModelHandle:
    """That model with its tokenizer."""
    return ModelHandle(make_model(name, **options), tokenizer(), name, batch_size=4)


def ragged(lengths: tuple[int, ...] = (9, 4, 12, 7, 9)) -> list[Tokens]:
    """Rows of random tokens, some longer than the sliding window; every row its own owner."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n, length in enumerate(lengths):
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Tokens(tuple(ids), length, (1, 1 + n % (length - 2)), n))
    return rows


def padded(rows: list[Tokens], side: str) -> Batch:
    """Rows as a batch on the CPU, padded on the left or (as the library does) on the right."""
    batch = collate(rows, torch.device("cpu"))
    return batch if side == "right" else batch.padded_left()


def unpadded(states: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """The states `[t, ...]` of each row's own tokens."""
    width = batch.ids.shape[1]
    own = batch.mask[:, -width:].bool()
    return [row[mine] for row, mine in zip(states, own, strict=True)]


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Whether the largest difference is small beside the largest wanted value."""
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())
