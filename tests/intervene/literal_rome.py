"""ROME as its description reads, one fact and one prompt at a time, with no thought of speed.

Written from the description of the public code, not from `palimpsest.intervene.values`: every
prompt is a forward pass of its own over all layers and all tokens, with logits everywhere; nothing
is cached, nothing padded, nothing shared between facts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from palimpsest.facts.fact import Fact
from palimpsest.intervene.values import ValueSearch
from palimpsest.model.handle import ModelHandle


@dataclass(frozen=True)
class Edit:
    """What one fact's edit came to."""

    change: Tensor  # [d_model, d_mlp]
    evaluations: int
    stopped_early: bool
    clamped: bool
    loss: float


def edit(
    handle: ModelHandle,
    fact: Fact,
    layer: int,
    contexts: Sequence[str],
    moments: Tensor | None,
    search: ValueSearch,
) -> Edit:
    """ΔW of one fact; without `moments`, by the bare prompt's key alone."""
    w_out = _w_out(handle, layer)
    prompts = [fact.prompt.text] + [f"{context}. {fact.prompt.text}" for context in contexts]
    rows = [_tokenized(handle, text, fact.subject) for text in prompts]
    key, value = _key_and_value(handle, rows[0], w_out)
    delta, report = _optimise(handle, fact, rows, w_out, value, search)

    if moments is None:
        u = key.double()
    else:
        keys = [_key_and_value(handle, row, w_out)[0] for row in rows]
        u = torch.inverse(moments) @ torch.stack(keys).double().mean(0)
        u = u / u.norm()
    weight, bias = _affine(w_out)
    v_star = value.double() + delta.double()
    residual = v_star - (weight.double() @ key.double() + bias.double())
    change = torch.outer(residual, u) / (key.double() @ u)
    return Edit(change, **report)


def _optimise(
    handle: ModelHandle,
    fact: Fact,
    rows: list["_Row"],
    w_out: nn.Module,
    value: Tensor,
    search: ValueSearch,
) -> tuple[Tensor, dict]:
    assert fact.new is not None
    new = _ids(handle, " " + fact.new)
    essence = _tokenized(handle, f"{fact.subject} is a", fact.subject)
    with torch.no_grad():
        old = _logprobs(handle, essence.ids)[essence.subject_last]
    delta = torch.zeros_like(value, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=search.lr)
    limit = search.clamp * value.norm()
    evaluations, stopped, clamped = 0, False, False
    while True:
        adam.zero_grad()
        nll = torch.zeros(())
        for row in rows:
            with _added(w_out, delta, row.subject_last):
                logprobs = _logprobs(handle, row.ids + new[:-1])
            ends = range(len(row.ids) - 1, len(row.ids) - 1 + len(new))
            nll = nll - sum(logprobs[end, token] for end, token in zip(ends, new, strict=True)) / (
                len(new) * len(rows)
            )
        with _added(w_out, delta, essence.subject_last):
            now = _logprobs(handle, essence.ids)[essence.subject_last]
        kl = (now.exp() * (now - old)).sum()
        loss = nll + search.kl * kl + search.weight_decay * delta.norm() / value.norm() ** 2
        evaluations += 1
        if loss < search.stop_below:
            stopped = True
            break
        if evaluations == search.steps:
            break
        loss.backward()
        adam.step()
        if delta.norm() > limit:
            clamped = True
            with torch.no_grad():
                delta.mul_(limit / delta.norm())
    report = {"evaluations": evaluations, "stopped_early": stopped, "clamped": clamped}
    return delta.detach(), {**report, "loss": loss.item()}


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    subject_last: int


def _tokenized(handle: ModelHandle, text: str, subject: str) -> _Row:
    text = handle.prefix + text
    encoding = handle.tokenizer(text, add_special_tokens=False)
    last_character = text.rindex(subject) + len(subject) - 1
    return _Row(list(encoding["input_ids"]), encoding.char_to_token(last_character))


def _ids(handle: ModelHandle, text: str) -> list[int]:
    return list(handle.tokenizer(text, add_special_tokens=False)["input_ids"])


def _logprobs(handle: ModelHandle, ids: list[int]) -> Tensor:
    """`[t, vocabulary]` of one text, by the whole model."""
    return handle.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def _w_out(handle: ModelHandle, layer: int) -> nn.Module:
    if handle.model.config.model_type == "gpt2":
        return handle.model.transformer.h[layer].mlp.c_proj
    return handle.model.model.layers[layer].mlp.down_proj


def _affine(w_out: nn.Module) -> tuple[Tensor, Tensor]:
    """W `[out, in]` and b: GPT-2 keeps W transposed, Llama has no b."""
    if isinstance(w_out, nn.Linear):
        return w_out.weight.data, torch.zeros(w_out.weight.shape[0])
    return w_out.weight.data.T, w_out.bias.data


@torch.no_grad()
def _key_and_value(handle: ModelHandle, row: _Row, w_out: nn.Module) -> tuple[Tensor, Tensor]:
    seen: list[tuple[Tensor, Tensor]] = []
    hook = w_out.register_forward_hook(
        lambda module, args, output: seen.append((args[0][0], output[0]))
    )
    try:
        _logprobs(handle, row.ids)
    finally:
        hook.remove()
    keys, values = seen[0]
    return keys[row.subject_last], values[row.subject_last]


@contextmanager
def _added(w_out: nn.Module, delta: Tensor, at: int) -> Iterator[None]:
    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        here = torch.zeros(output.shape[1], 1)
        here[at] = 1.0
        return output + here * delta

    hook = w_out.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
