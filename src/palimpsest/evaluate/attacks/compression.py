"""Compression: weights are rounded or pruned as for deployment; is the old object back?

Zhang et al. 2024 (arXiv 2410.16454) report that models unlearned with a constraint on their utility
retain 21% of the knowledge on average, and 83% after quantization to 4 bits: a change that is small
against the step of the rounding is rounded away.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from palimpsest.errors import RequestError, check_at_least
from palimpsest.evaluate.asking import Answer, Query, ask, readable
from palimpsest.evaluate.attacks.returning import (
    INDEPENDENT,
    ask_unseen,
    check_distinct,
    old_wins,
    undefined,
    unseen,
)
from palimpsest.evaluate.scene import Answers, Scene
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.model.borrowing import borrowed
from palimpsest.model.difference import Difference
from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import NOBODY
from palimpsest.record.row import Row

Compressing = Callable[[Tensor], Tensor]
"""Of a weight `[out, in]`, what is left of it."""

Owned = Sequence[tuple[int, Fact]]
"""Facts with the owners whose change they feel."""


@dataclass(frozen=True)
class Compression:
    """Round-to-nearest quantization, or magnitude pruning, of every linear weight of the blocks.

    Embeddings, head, norms, biases and activations keep their precision. Of independent edits each
    fact's W_out is made and compressed by itself, and asked by that fact's prompts.

    Attributes:
        bits: widths to quantize to, each on its own: symmetric, see `quantized`.
        group: inputs that share one scale.
        pruned: percentages of each matrix's entries to set to zero, each on its own.
    """

    bits: list[int] = field(default_factory=lambda: [8, 4])
    group: int = 64
    pruned: list[int] = field(default_factory=lambda: [30, 50])

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: one is out of its range, or named twice.
        """
        for name, low, high in (("bits", 2, 16), ("pruned", 1, 99)):
            values = getattr(self, name)
            check_distinct(f"evaluate.compression.{name}", values)
            for value in values:
                if not low <= value <= high:
                    raise RequestError(
                        f"expected evaluate.compression.{name} from {low} to {high}, found "
                        f"{value}; choose such ones, or [] for none"
                    )
        check_at_least("evaluate.compression.group", self.group, 1)

    version: ClassVar[int] = 1
    along: ClassVar[bool] = False

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> None:
        """Nothing: what comes back is told as it is."""

    def measure(self, scene: Scene, prepared: None) -> Iterator[Row]:
        """Rows `compressed_old` and `compressed_other`; definitions stand in docs/metrics.md.

        The model is as it was, bit for bit, before the first row of each way to compress is given.
        Of independent edits nothing is measured without their differences of weights.
        """
        model, facts, change = scene.model, scene.facts, scene.change
        others = scene.dealt(facts.others)
        row = scene.row("recoverability")
        own = [each for each in scene.differences if each.independent]
        if change.independent and not own:
            for protocol in self._ways():
                rows = _told(partial(row, protocol=protocol), facts, others, _silence(facts), [])
                yield from (undefined(each, INDEPENDENT) for each in rows)
            return
        whole = {each.layer: model.w_out(each.layer).clone() for each in own}
        for protocol, compress in self._ways().items():
            with compressed(model, compress, protocol):
                if own:
                    said, elsewhere = _ask_singly(model, facts, others, own, whole, compress)
                else:
                    said = ask_unseen(model, facts, fitted=False)
                    elsewhere = ask(model, [Query(f.prompt, [f.true], o) for o, f in others])
            yield from _told(partial(row, protocol=protocol), facts, others, said, elsewhere)

    def _ways(self) -> dict[str, Compressing]:
        """By protocol, what is done to each weight."""
        rounding = {f"int{b}": partial(quantized, bits=b, group=self.group) for b in self.bits}
        return {**rounding, **{f"pruned_{p}": partial(pruned, percent=p) for p in self.pruned}}


@contextmanager
def compressed(model: ModelHandle, compress: Compressing, name: str) -> Iterator[None]:
    """Compress every linear weight of the blocks while the context lasts.

    Args:
        model: as it stands, a change applied or not.
        compress: gives what is left of a weight `[out, in]`.
        name: of what is done.
    """
    weights = model.matrices()
    with borrowed(model, weights, f"compression {name}"), torch.no_grad():
        for weight in weights:
            weight.copy_(compress(weight))
        yield


@torch.no_grad()
def _ask_singly(
    model: ModelHandle,
    facts: Splits,
    others: Owned,
    own: Sequence[Difference],
    whole: Mapping[int, Tensor],
    compress: Compressing,
) -> tuple[Answers, list[Answer]]:
    """Ask each fact's prompts of the model whose W_out are W + ΔW of that fact, compressed.

    They are nobody's prompts here: what acts for their owner, beside the weights, is left out.

    Args:
        model: compressed.
        facts: the target facts, and the relations' objects.
        others: facts of other relations; each feels its owner's ΔW.
        own: each fact's ΔW, by layer.
        whole: W by layer, before it was compressed.
        compress: gives what is left of a weight `[out, in]`.
    """
    said = _silence(facts)
    elsewhere: dict[int, Answer] = {}
    for owner, fact in enumerate(facts.target):
        for layer, weight in whole.items():
            delta = sum(d.matrix(owner).to(weight.device) for d in own if d.layer == layer)
            precise = weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta
            model.w_out(layer).copy_(compress(precise.to(weight.dtype)))
        mine = {n: other for n, (o, other) in enumerate(others) if o == owner}
        queries = [Query(other.prompt, [other.true], NOBODY) for other in mine.values()]
        asked = unseen(fact, facts, NOBODY)
        answers = ask(model, [*asked, *queries])
        for query, answer in zip(asked, answers, strict=False):
            said[owner][query.prompt.id] = answer
        elsewhere |= zip(mine, answers[len(asked) :], strict=True)
    return said, [elsewhere[n] for n in range(len(others))]


def _silence(facts: Splits) -> Answers:
    return [{} for _ in facts.target]


def quantized(weight: Tensor, bits: int, group: int) -> Tensor:
    """`s q` with `s = max |w| / (2^(bits − 1) − 1)` and q = w / s rounded to the nearest integer.

    Symmetric: the levels are those from −(2^(bits − 1) − 1) to its opposite. The maximum is taken
    over `group` neighbouring inputs of one output; the last group of an output may be shorter.

    Args:
        weight: `[out, in]`.
        bits: at least 2.
        group: inputs that share one scale.

    Returns:
        float32 `[out, in]`, of a weight in double precision float64.
    """
    out, width = weight.shape
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    grouped = pad(precise, (0, -width % group)).view(out, -1, group)
    scale = grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    levels = torch.round(grouped / torch.where(scale > 0, scale, 1))
    rounded: Tensor = (levels * scale).view(out, -1)[:, :width]
    return rounded


def pruned(weight: Tensor, percent: int) -> Tensor:
    """The weight without the given share of its entries, rounded down: the smallest in magnitude.

    Of equal ones the first, output by output, go.
    """
    count = weight.numel() * percent // 100
    if not count:
        return weight.clone()
    size = weight.abs().flatten().to(torch.promote_types(weight.dtype, torch.float32))
    bar = size.kthvalue(count).values
    gone = size <= bar
    if int(gone.sum()) > count:
        smaller, level = size < bar, size == bar
        gone = smaller | (level & (level.cumsum(0) <= count - smaller.sum()))
    return weight.masked_fill(gone.view(weight.shape), 0)


def _told(
    row: partial[Row], facts: Splits, others: Owned, said: Answers, elsewhere: Sequence[Answer]
) -> Iterator[Row]:
    """Rows of the target facts and of the others; null where nothing is said."""
    target = partial(row, metric="compressed_old", split="target")
    for fact, own in zip(facts.target, said, strict=True):
        yield old_wins(target, fact, [own[p.id] for p in fact.paraphrases if p.id in own])
    for n, (_, fact) in enumerate(others):
        one = partial(row, metric="compressed_other", split="others", prompt_id=fact.prompt.id)
        one = partial(one, fact_id=fact.id, relation=fact.relation)
        answer = elsewhere[n] if elsewhere else None
        if answer is None:
            yield one(value=None, n=0)
        else:
            yield readable(answer, one(value=float(answer[fact.true].argmax)))
