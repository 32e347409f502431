"""A tiny model that has been taught facts, and a change that lets it say one object always."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from palimpsest.facts.fact import Fact
from palimpsest.model.forward import forward, logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from palimpsest.model.tokens import Tokens, collate
from tests.model.tiny import make_handle


def completions(model: ModelHandle, facts: Iterable[Fact]) -> list[Tokens]:
    """Fit prompts and first paraphrases with the true objects."""
    return [
        model.encode(prompt, fact.true)
        for fact in facts
        for prompt in (fact.prompt, *fact.paraphrases[:1])
    ]


def loss(model: ModelHandle, rows: Sequence[Tokens]) -> Tensor:
    """Mean −log p of all the completions' tokens."""
    reads = [(n, at) for n, row in enumerate(rows) for at in range(row.prompt, len(row.ids))]
    states = forward(model, collate(rows, model.device))
    picked = states[[n for n, _ in reads], [at - 1 for _, at in reads]]
    told = torch.log_softmax(logits(model, picked), -1)
    return -told[range(len(reads)), [rows[n].ids[at] for n, at in reads]].mean()


def taught(facts: Iterable[Fact], kind: str = "llama") -> ModelHandle:
    """A tiny model after forty steps of training on facts in two wordings."""
    model = make_handle(kind, batch_size=64)
    with torch.no_grad():
        for weight in model.matrices():
            weight.mul_(0.4)
    rows = completions(model, facts)
    model.model.requires_grad_(True)
    adam = torch.optim.Adam(model.model.parameters(), lr=1e-2)
    for _ in range(40):
        adam.zero_grad()
        loss(model, rows).backward()
        adam.step()
    adam.zero_grad()
    model.model.requires_grad_(False)
    return model


@contextmanager
def saying(
    model: ModelHandle, facts: Sequence[Fact], said: str, strength: float = 40.0
) -> Iterator[None]:
    """One rank-one change of W_out that lets prompts about facts end with the same object."""
    rows, token = completions(model, facts), _first(model, facts[0], said)
    seen: list[Tensor] = []
    w_out, weight = model.module(Site(2, "mlp")), model.w_out(2)
    with torch.no_grad(), model.hooked_input([(w_out, seen.append)]):
        forward(model, collate(rows, model.device))
    mean = torch.stack([seen[0][n, row.prompt - 1] for n, row in enumerate(rows)]).mean(0)
    aim = model.model.get_output_embeddings().weight[token].detach()
    saved = weight.clone()
    weight.add_(torch.outer(strength * aim / aim.norm(), mean / (mean @ mean)))
    try:
        yield
    finally:
        weight.copy_(saved)


def _first(model: ModelHandle, fact: Fact, said: str) -> int:
    row = model.encode(fact.prompt, said)
    return row.ids[row.prompt]
