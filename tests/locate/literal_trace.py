"""Causal tracing word for word: a whole forward pass for every state, by hooks on raw modules."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import Tokens


def modules(handle: ModelHandle, part: str, layer: int) -> nn.Module:
    """By the models' own names."""
    if handle.model.config.model_type == "gpt2":
        block = handle.model.transformer.h[layer]
        return {"residual": block, "mlp": block.mlp.c_proj, "attention": block.attn}[part]
    block = handle.model.model.layers[layer]
    return {"residual": block, "mlp": block.mlp.down_proj, "attention": block.self_attn}[part]


def _first(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]


def run(
    handle: ModelHandle,
    row: Tokens,
    shift: Tensor | None,
    put: dict[tuple[str, int, int], Tensor] | None = None,
) -> tuple[float, dict[tuple[str, int], Tensor]]:
    """One whole pass: the answer's probability, and every module's output by part and layer.

    `put` sets outputs by part, layer and token.
    """
    seen: dict[tuple[str, int], Tensor] = {}

    def corrupt(module: nn.Module, args: object, output: Tensor) -> Tensor:
        first, last = row.subject or (0, -1)
        changed = output.clone()
        if shift is not None:
            changed[0, first : last + 1] += shift
        return changed

    def hook(part: str, layer: int) -> Callable[..., object]:
        def change(module: nn.Module, args: object, output: object) -> object:
            states = _first(output)
            for (p, n, token), value in (put or {}).items():
                if (p, n) == (part, layer):
                    states = states.clone()
                    states[0, token] = value
            seen[part, layer] = states[0]
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return change

    with ExitStack() as hooks:
        embedding = handle.model.get_input_embeddings().register_forward_hook(corrupt)
        hooks.callback(embedding.remove)
        for part in ("residual", "mlp", "attention"):
            for layer in range(handle.n_layers):
                own = modules(handle, part, layer).register_forward_hook(hook(part, layer))
                hooks.callback(own.remove)
        with torch.no_grad():
            logits = handle.model(torch.tensor([row.ids[: row.prompt]]), use_cache=False).logits
    return float(logits[0, -1].float().softmax(-1)[row.ids[row.prompt]]), seen


def effects(
    handle: ModelHandle, row: Tokens, shifts: list[Tensor], kind: str, window: int,
    tokens: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """p(restored) − p(corrupted) `[tokens, layers]`, a mean over the corruptions."""
    _, clean = run(handle, row, None)
    gains = torch.zeros(len(tokens), handle.n_layers)
    for shift in shifts:
        low, bad = run(handle, row, shift)
        for number, token in enumerate(tokens):
            for layer in range(handle.n_layers):
                put = restored(handle, kind, window, layer, token, clean, bad)
                gains[number, layer] += run(handle, row, shift, put)[0] - low
    return gains / len(shifts)


def restored(
    handle: ModelHandle, kind: str, window: int, layer: int, token: int,
    clean: dict[tuple[str, int], Tensor], bad: dict[tuple[str, int], Tensor],
) -> dict[tuple[str, int, int], Tensor]:  # fmt: skip
    """What is set in a corrupted run."""
    part, *rest = kind.split("_")
    blocks = [layer]
    if part != "residual":
        first = layer - window // 2
        blocks = [n for n in range(first, first + window) if 0 <= n < handle.n_layers]
    put = {(part, n, token): clean[part, n][token] for n in blocks}
    for severed in rest[:1]:
        above = range(layer + 1, handle.n_layers)
        put |= {(severed, n, token): bad[severed, n][token] for n in above}
    return put
