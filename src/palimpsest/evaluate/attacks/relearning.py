"""Relearning: a few steps of training on other facts of the relation; is the old object back?

After Hu et al. 2024 (arXiv 2406.13356): what was only hidden returns when the model is trained on
something near it. No target or test subject is in the training.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import ClassVar

import torch
from torch import nn

from palimpsest.errors import check_at_least, check_number
from palimpsest.evaluate.asking import Answer, Query, ask, candidates
from palimpsest.evaluate.attacks.returning import (
    INDEPENDENT,
    ask_unseen,
    check_distinct,
    old_wins,
    undefined,
)
from palimpsest.evaluate.scene import Answers, Scene
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits, order
from palimpsest.model.borrowing import borrowed, trainable
from palimpsest.model.forward import forward, logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import within_memory
from palimpsest.model.tokens import Tokens, batches, collate
from palimpsest.record.row import Row

NO_LESSONS = "no fit or probe facts of the relation to train on"
OFFLOADED = "undefined for offloaded weights: set model.device_map=null"

Said = tuple[Answers, list[list[Answer]]]
"""What is said of the target facts, and of each test fact."""


@dataclass(frozen=True)
class Relearning:
    """AdamW on W_out and attention's output matrix of every block, or of the last ones.

    The loss is −log p a token of the true object after the fit prompt of fit and probe facts of the
    target's relations, a mean over the facts of a step. The same facts come in the same seeded
    order for every method. The change stays on meanwhile: gradients flow through what hooks do.
    Weights are trained in float32 and rounded to the model's precision after every step: added up
    in bfloat16, steps of this size would be lost.

    Attributes:
        steps: after how many steps the facts are asked about; at least one.
        batch: facts a step.
        lr: AdamW's learning rate; no weight decay.
        blocks: how many of the last blocks are trained; None for all. Few cost less, and are a
            weaker attack.
    """

    steps: list[int] = field(default_factory=lambda: [0, 20])
    batch: int = 8
    lr: float = 1e-4
    blocks: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: one is out of its range, or a step is named twice.
        """
        for step in self.steps:
            check_at_least("evaluate.relearning.steps", step, 0)
        check_distinct("evaluate.relearning.steps", self.steps)
        check_at_least("the number of evaluate.relearning.steps", len(self.steps), 1)
        check_at_least("evaluate.relearning.batch", self.batch, 1)
        check_number("evaluate.relearning.lr", self.lr, above=0)
        if self.blocks is not None:
            check_at_least("evaluate.relearning.blocks", self.blocks, 1)

    version: ClassVar[int] = 1
    along: ClassVar[bool] = False

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> None:
        """Nothing: what comes back is told as it is."""

    def measure(self, scene: Scene, prepared: None) -> Iterator[Row]:
        """Rows `relearned_old` and `relearned_test`; definitions stand in docs/metrics.md.

        The model is as it was, bit for bit, before the first row is given.
        """
        model, facts, change = scene.model, scene.facts, scene.change
        weights, lessons = self._weights(model), _lessons(model, facts, scene.seed)
        test = scene.dealt(facts.test)
        cause = None if lessons else NO_LESSONS
        cause = OFFLOADED if any(weight.is_meta for weight in weights) else cause
        cause = INDEPENDENT if change.independent else cause

        def said(step: int) -> Said:
            asked = ask_unseen(model, facts, fitted=True) if step else scene.answers
            return asked, _ask_test(model, facts, test)

        course = {} if cause else _course(model, self, weights, lessons, said)
        nothing: Said = [{} for _ in facts.target], [[] for _ in test]
        row = scene.row("recoverability")
        for step in sorted(self.steps):
            rows = _told(partial(row, step=step), facts, test, course.get(step, nothing))
            yield from (undefined(each, cause) for each in rows)

    def _weights(self, model: ModelHandle) -> list[nn.Parameter]:
        """What is trained."""
        first = 0 if self.blocks is None else max(0, model.n_layers - self.blocks)
        return [w for layer in range(first, model.n_layers) for w in model.writers(layer)]


def _lessons(model: ModelHandle, facts: Splits, seed: int) -> list[Tokens]:
    """Fit prompts with their true objects: relations take turns, and in each its classes do."""
    relations = {fact.relation for fact in facts.target}
    spared = {fact.subject.casefold() for fact in (*facts.target, *facts.test)}
    some = [
        fact
        for fact in (*facts.fit, *facts.probe)
        if fact.relation in relations and fact.subject.casefold() not in spared
    ]
    return [model.encode(fact.prompt, fact.true) for fact in order(some, seed)]


@within_memory
def _course(
    model: ModelHandle,
    method: Relearning,
    weights: Sequence[nn.Parameter],
    lessons: Sequence[Tokens],
    ask_after: Callable[[int], Said],
) -> dict[int, Said]:
    """Train, and ask after the wanted numbers of steps; the weights come back bit for bit."""
    found: dict[int, Said] = {}
    line = cycle(lessons)
    last = max(method.steps)
    with borrowed(model, weights, f"relearning {method}"), trainable(weights):
        precise = [weight.detach().float().clone() for weight in weights]
        adam = torch.optim.AdamW(precise, lr=method.lr, weight_decay=0.0)
        for step in range(last + 1):
            if step in method.steps:
                found[step] = ask_after(step)
            if step < last:
                _learn(model, list(islice(line, method.batch)))
                _move(adam, precise, weights)
    return found


def _learn(model: ModelHandle, rows: Sequence[Tokens]) -> None:
    """Add the gradient of one step's loss to the weights' own."""
    for group in batches(rows, model.batch_size):
        some = [rows[i] for i in group]
        states = forward(model, collate(some, model.device))
        reads = [(n, at) for n, row in enumerate(some) for at in range(row.prompt, len(row.ids))]
        picked = states[[n for n, _ in reads], [at - 1 for _, at in reads]]
        scores = torch.log_softmax(logits(model, picked), -1)
        told = scores[range(len(reads)), [some[n].ids[at] for n, at in reads]]
        share = [1 / (len(some[n].ids) - some[n].prompt) / len(rows) for n, _ in reads]
        (-told @ torch.tensor(share, device=told.device)).backward()


@torch.no_grad()
def _move(
    adam: torch.optim.Optimizer, precise: Sequence[torch.Tensor], weights: Sequence[nn.Parameter]
) -> None:
    """One step in float32, rounded into the model."""
    for copy, weight in zip(precise, weights, strict=True):
        copy.grad = None if weight.grad is None else weight.grad.float()
        weight.grad = None
    adam.step()
    for copy, weight in zip(precise, weights, strict=True):
        weight.copy_(copy)


def _ask_test(
    model: ModelHandle, facts: Splits, test: Sequence[tuple[int, Fact]]
) -> list[list[Answer]]:
    """Test facts' fit prompts, over the candidates."""
    asked = [Query(f.prompt, candidates(f, facts.classes[f.relation]), o) for o, f in test]
    return [[answer] for answer in ask(model, asked)]


def _told(
    row: partial[Row], facts: Splits, test: Sequence[tuple[int, Fact]], said: Said
) -> Iterator[Row]:
    """The rows of one step; null where nothing is said."""
    old, other = partial(row, metric="relearned_old"), partial(row, metric="relearned_test")
    for fact, own in zip(facts.target, said[0], strict=True):
        unseen = [own[prompt.id] for prompt in fact.paraphrases if prompt.id in own]
        fitted = [own[fact.prompt.id]] if fact.prompt.id in own else []
        target = partial(old, split="target")
        yield old_wins(partial(target, protocol="paraphrases"), fact, unseen)
        at = partial(target, protocol="fit_prompt", prompt_id=fact.prompt.id)
        yield old_wins(at, fact, fitted)
    for (_, fact), answer in zip(test, said[1], strict=True):
        at = partial(other, split="test", protocol="fit_prompt", prompt_id=fact.prompt.id)
        yield old_wins(at, fact, answer)
