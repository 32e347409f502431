"""ROME and r-ROME as their descriptions read, one fact and one prompt at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.facts.fact import Fact
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.model.handle import ModelHandle
from tests.intervene import literal


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
    mean_everywhere: bool = False,
) -> Edit:
    """ΔW of one fact; without `moments`, by the key alone.

    The key is the bare prompt's, as in ROME's public code, or with `mean_everywhere` the mean over
    contexts, as in its paper (r-ROME).
    """
    w_out = literal.w_out(handle, layer)
    rows = literal.prompts(handle, fact, contexts)
    found = literal.find(handle, literal.Search.of(handle, fact, contexts, w_out, search))
    keys = torch.stack([literal.taken(handle, row, w_out)[0] for row in rows]).double()
    mean = keys.mean(0)
    key = mean if mean_everywhere else keys[0]
    u = key if moments is None else torch.inverse(moments) @ mean
    weight, bias = literal.affine(w_out)
    v_star = found.start.double() + found.delta.double()
    residual = v_star - (weight.double() @ key + bias.double())
    change = torch.outer(residual, u) / (key @ u)
    return Edit(change, found.evaluations, found.stopped_early, found.clamped, found.loss)
