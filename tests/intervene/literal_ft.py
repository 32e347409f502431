"""Fine-tuning as its description reads: Adam on the weight itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.facts.fact import Fact
from palimpsest.intervene.finetune import FineTune
from palimpsest.model.handle import ModelHandle
from tests.intervene import literal


def edit(
    handle: ModelHandle, facts: Sequence[Fact], layer: int, method: FineTune
) -> tuple[Tensor, float, int]:
    """ΔW `[d_model, d_mlp]`, the last loss, and how many steps there were; the model is changed."""
    w_out = literal.w_out(handle, layer)
    before = w_out.weight.data.clone()
    w_out.weight.requires_grad_()
    adam = torch.optim.Adam([w_out.weight], lr=method.lr)
    steps = 0
    while True:
        adam.zero_grad()
        loss = sum(_loss(handle, fact) for fact in facts) / len(facts)
        if loss < method.stop_below or steps == method.steps:
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


def _loss(handle: ModelHandle, fact: Fact) -> Tensor:
    """−log p of the new object, the mean over its tokens."""
    prompt = literal.tokenized(handle, fact.prompt.text, fact.subject).ids
    new = literal.token_ids(handle, f" {fact.new}")
    scores = literal.logprobs(handle, prompt + new[:-1])
    return -sum(scores[len(prompt) - 1 + i, t] for i, t in enumerate(new)) / len(new)
