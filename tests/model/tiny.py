"""Tiny models with random weights, large enough that their predictions differ and are peaked."""

from collections.abc import Sequence
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import NOBODY, Tokens

KINDS = ("gpt2", "llama")

SENTENCES = (
    "The city of Paris is in the country of France.",
    "The city of Osaka is in the country of Japan, said Anna.",
    "The capital of France is Paris; the capital of Italy is Rome.",
    "In New York, New Delhi or New Zealand; of New York and of New Zealand.",
    "The official language of the country is Japanese, Italian, French or Indian English.",
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as GPT-2's, of 340 tokens and one special token."""
    return trained(SENTENCES, 340, eos_token="<|end|>")


def trained(sentences: Sequence[str], size: int, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` tokens, the special ones first."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def gpt2(seed: int = 0, **options: int) -> GPT2LMHeadModel:
    """GPT-2: learned positions, Conv1D, tied embeddings."""
    config = GPT2Config(
        **{
            "vocab_size": len(tokenizer()),
            "n_layer": 4,
            "n_head": 4,
            "n_embd": 32,
            "n_positions": 160,
            "bos_token_id": None,
            "eos_token_id": 0,
            **options,
        }
    )
    return _grown(GPT2LMHeadModel(config), seed)


def llama(seed: int = 0, **options: int) -> LlamaForCausalLM:
    """Llama: rotary positions, Linear, two heads to a key, a head of its own."""
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 160,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": 0,
            **options,
        }
    )
    return _grown(LlamaForCausalLM(config), seed)


@torch.no_grad()
def _grown(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Random weights of a scale at which blocks matter and predictions are peaked."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            weight.copy_(noise * 0.2 + ("bias" not in name))
        else:
            weight.copy_(noise * 0.4)
    return model.float().eval()


def make_model(kind: str, seed: int = 0, **options: int) -> PreTrainedModel:
    """A tiny model of one of `KINDS`."""
    return gpt2(seed, **options) if kind == "gpt2" else llama(seed, **options)


def make_handle(
    kind: str = "llama", seed: int = 0, prefix: str = "\n", batch_size: int = 4, **options: int
) -> ModelHandle:
    """A tiny model with its tokenizer."""
    model = make_model(kind, seed, **options)
    return ModelHandle(model, tokenizer(), f"tiny-{kind}", prefix, batch_size)


def ragged(seed: int = 0, lengths: tuple[int, ...] = (9, 4, 12, 7, 9, 5, 3)) -> list[Tokens]:
    """Rows of random tokens: a subject inside the prompt, owners in turn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n, length in enumerate(lengths):
        ids = torch.randint(1, len(tokenizer()), (length,), generator=generator).tolist()
        rows.append(Tokens(tuple(ids), length, (1, 1 + n % (length - 2)), n if n % 2 else NOBODY))
    return rows


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest wanted value."""
    return float((found - wanted).abs().max() / wanted.abs().max())
