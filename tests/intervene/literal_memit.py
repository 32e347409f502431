"""MEMIT, EMMET and AlphaEdit as their descriptions read: d × d systems, weights really changed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from palimpsest.facts.fact import Fact
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.model.handle import ModelHandle
from tests.intervene import literal

Solve = Callable[[int, Tensor, Tensor], Tensor]
"""ΔW `[d_model, d_mlp]` from layer, keys K `[d_mlp, n]` and residuals R `[d_model, n]`."""


def memit(weight: float, moments: dict[int, Tensor]) -> Solve:
    """R Kᵀ (λC + K Kᵀ)⁻¹."""
    return lambda layer, k, r: r @ k.T @ torch.linalg.inv(weight * moments[layer] + k @ k.T)


def emmet(ridge: float, moments: dict[int, Tensor]) -> Solve:
    """R (Kᵀ C⁻¹ K + ridge 1)⁻¹ Kᵀ C⁻¹, the ridge for more than one fact."""

    def solve(layer: int, k: Tensor, r: Tensor) -> Tensor:
        n = k.shape[1]
        inverse = torch.linalg.inv(moments[layer])
        gram = k.T @ inverse @ k + (ridge if n > 1 else 0.0) * torch.eye(n)
        return r @ torch.linalg.inv(gram) @ k.T @ inverse

    return solve


def alphaedit(
    threshold: float, ridge: float, moments: dict[int, Tensor], before: dict[int, list[Tensor]]
) -> Solve:
    """The transpose of solve(P (K Kᵀ + K_p K_pᵀ) + ridge 1, P K Rᵀ), K_p being `before`."""

    def solve(layer: int, k: Tensor, r: Tensor) -> Tensor:
        u, singular, _ = torch.linalg.svd(moments[layer])
        small = u[:, singular < threshold]
        p = small @ small.T
        held = sum((key @ key.T for key in before.get(layer, [])), torch.zeros_like(p))
        system = p @ (k @ k.T + held) + ridge * torch.eye(len(p))
        return torch.linalg.solve(system, p @ k @ r.T).T

    return solve


def key(handle: ModelHandle, fact: Fact, layer: int, contexts: Sequence[str]) -> Tensor:
    """Half the bare prompt's key, half the mean of the contexts'; float64."""
    w_out = literal.w_out(handle, layer)
    rows = literal.prompts(handle, fact, contexts)
    bare, *others = [literal.taken(handle, row, w_out)[0].double() for row in rows]
    return (bare + torch.stack(others).mean(0)) / 2 if others else bare


def edit(
    handle: ModelHandle,
    facts: Sequence[Fact],
    layers: Sequence[int],
    contexts: Sequence[str],
    search: ValueSearch,
    solve: Solve,
) -> dict[int, Tensor]:
    """ΔW by layer of all facts together; the model is left changed."""
    last = literal.block(handle, layers[-1])
    wanted = []
    for fact in facts:
        found = literal.find(handle, literal.Search.of(handle, fact, contexts, last, search))
        wanted.append(found.start.double() + found.delta.double())
    changes = {}
    for number, layer in enumerate(layers):
        keys = torch.stack([key(handle, fact, layer, contexts) for fact in facts], 1)
        rows = [literal.prompts(handle, fact, [])[0] for fact in facts]
        states = torch.stack([literal.taken(handle, row, last)[1].double() for row in rows], 1)
        residual = (torch.stack(wanted, 1) - states) / (len(layers) - number)
        changes[layer] = solve(layer, keys, residual)
        literal.change_weight(handle, layer, changes[layer])
    return changes
