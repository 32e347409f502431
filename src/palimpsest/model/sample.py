"""Text sampled from the model itself, by a seeded generator."""

import torch
from torch import Tensor
from transformers import DynamicCache

from palimpsest.model.forward import forward, logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import within_memory
from palimpsest.model.tokens import NOBODY, Batch


@torch.no_grad()
def sample(
    handle: ModelHandle,
    rows: int,
    tokens: int,
    generator: torch.Generator,
    top_k: int | None = None,
) -> Tensor:
    """Sample continuations of the model's prefix (or of its first special token if it has none).

    Args:
        handle: the model.
        rows: number of texts.
        tokens: number of sampled tokens in each.
        generator: source of all randomness, on the CPU; its numbers do not depend on the batches.
        top_k: sample among the k likeliest tokens; None for the whole vocabulary.

    Returns:
        ids `[rows, start + tokens]` on the CPU, the start included. Every pass sees the whole mask
        with its key/value cache: a mask of length one gives silently wrong logits.
    """
    numbers = torch.rand(tokens, rows, 1, generator=generator)
    return _in_groups(handle, numbers, top_k)


@within_memory
def _in_groups(handle: ModelHandle, numbers: Tensor, top_k: int | None) -> Tensor:
    groups = numbers.split(handle.batch_size, 1)
    return torch.cat([_sampled(handle, group, top_k) for group in groups])


def _sampled(handle: ModelHandle, numbers: Tensor, top_k: int | None) -> Tensor:
    """Rows `[n, start + tokens]` that numbers `[tokens, n, 1]` between 0 and 1 lead to."""
    ids = torch.tensor([start_ids(handle)] * numbers.shape[1])
    cache = DynamicCache()
    fresh = ids
    for number in numbers:
        batch = _batch(fresh, ids.shape[1], handle.device)
        scores = logits(handle, forward(handle, batch, cache)[:, -1]).cpu()
        if top_k is not None:
            floor = scores.topk(min(top_k, scores.shape[-1]), -1).values[:, -1:]
            scores = scores.masked_fill(scores < floor, -torch.inf)
        fresh = _draw(torch.softmax(scores, -1), number)
        ids = torch.cat([ids, fresh], 1)
    return ids


def _draw(probabilities: Tensor, number: Tensor) -> Tensor:
    """One index a row, `[rows, 1]`, by inverting the cumulative distribution."""
    cumulative = probabilities.cumsum(-1)
    aim = number * cumulative[:, -1:]
    return torch.searchsorted(cumulative, aim, right=True).clamp(max=cumulative.shape[1] - 1)


def start_ids(handle: ModelHandle) -> list[int]:
    """The tokens that open every text: the model's prefix, else its first special token.

    A model with neither opens with token 0.
    """
    if handle.prefix:
        return list(handle.tokenizer(handle.prefix, add_special_tokens=False)["input_ids"])
    first = handle.tokenizer.bos_token_id
    if first is None:
        first = handle.tokenizer.eos_token_id
    return [0 if first is None else int(first)]


def _batch(fresh: Tensor, length: int, device: torch.device) -> Batch:
    """The newest columns of rows of equal length, as a batch that nobody owns."""
    rows, width = fresh.shape
    nobody = torch.full((rows,), NOBODY, device=device)
    return Batch(
        fresh.to(device),
        torch.ones(rows, length, dtype=torch.long, device=device),
        torch.arange(length - width, length, device=device).expand(rows, width),
        nobody,
        nobody,
        nobody,
        torch.zeros_like(nobody),
    )
