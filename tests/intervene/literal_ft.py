"""Fine-tuning as its description reads: Adam on the weight itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.facts.fact import Fact
from palimpsest.intervene.editors.finetune import FineTune
from palimpsest.model.handle import ModelHandle
from tests.intervene import literal


def edit(
    handle: ModelHandle,
    facts: Sequence[Fact],
    layer: int,
    method: FineTune,
    noises: Sequence[Tensor | None] = (),
) -> tuple[Tensor, float, int]:
    """ΔW `[d_model, d_mlp]`, the last loss, and how many steps there were; the model is changed.

    Noises `[subject tokens, d_model]` are those of the facts' subjects, for objectives with noise.
    """
    noises = noises or [None] * len(facts)
    pairs = list(zip(facts, noises, strict=True))
    objects = [wanted(handle, fact, method.objective, noise) for fact, noise in pairs]
    w_out = literal.w_out(handle, layer)
    before = w_out.weight.data.clone()
    w_out.weight.requires_grad_()
    adam = torch.optim.Adam([w_out.weight], lr=method.lr)
    steps = 0
    while True:
        adam.zero_grad()
        losses = [
            _loss(handle, fact, ids, method.objective, noise)
            for (fact, noise), ids in zip(pairs, objects, strict=True)
        ]
        loss = sum(losses) / len(facts)
        enough = method.objective != "erase" and loss < method.stop_below
        if enough or steps == method.steps:
            break
        loss.backward()
        adam.step()
        steps += 1
        if method.bound is not None:
            with torch.no_grad():
                w_out.weight.clamp_(before - method.bound, before + method.bound)
    w_out.weight.requires_grad_(False)
    change = w_out.weight.data - before
    oriented = change if isinstance(w_out, torch.nn.Linear) else change.T
    return oriented, loss.item(), steps


def wanted(handle: ModelHandle, fact: Fact, objective: str, noise: Tensor | None) -> list[int]:
    """The tokens of the object that an objective is about."""
    ids = literal.token_ids(handle, f" {fact.new if objective == 'inject' else fact.true}")
    if objective != "trace_reversal":
        return ids
    row = literal.tokenized(handle, fact.prompt.text, fact.subject)
    return literal.said(handle, row, len(ids), noise)


def _loss(
    handle: ModelHandle, fact: Fact, ids: list[int], objective: str, noise: Tensor | None
) -> Tensor:
    """−log p of the object, the mean over its tokens; of `erase` p of the whole."""
    row = literal.tokenized(handle, fact.prompt.text, fact.subject)
    with literal.noised(handle, row, noise if objective == "force" else None):
        scores = literal.logprobs(handle, row.ids + ids[:-1])
    each = torch.stack([scores[len(row.ids) - 1 + i, token] for i, token in enumerate(ids)])
    return each.sum().exp() if objective == "erase" else -each.mean()
