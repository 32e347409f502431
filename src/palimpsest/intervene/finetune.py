"""Fine-tuning of one W_out: free (FT), or bounded (FT-L, Zhu et al. 2020, arXiv 2012.00363)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.errors import check_at_least, check_number
from palimpsest.facts.fact import Fact
from palimpsest.intervene.dense import DenseDeltas, by_owner
from palimpsest.intervene.editor import (
    Editing,
    Editor,
    diverged,
    tuning_rows,
)
from palimpsest.model.forward import logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import within_memory
from palimpsest.model.partial import Resume
from palimpsest.model.site import Change, Site
from palimpsest.model.tokens import collate


@dataclass(frozen=True)
class FineTune(Editor):
    """Gradient descent on −log p of the new object after the bare prompt, in one W_out.

    Every token of the object is scored where it stands. (ROME's public code scores all of them at
    the prompt's last token.)

    Attributes:
        steps: Adam's steps at most.
        lr: Adam's learning rate.
        stop_below: loss (nats a token, mean over the facts) at which to stop.
        bound: ε of FT-L, `|ΔW| ≤ ε` entry by entry after every step; None for FT.
    """

    steps: int = 25
    lr: float = 5e-4
    stop_below: float = 1e-2
    bound: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: an unknown protocol, no step, or a number out of its range.
        """
        super().__post_init__()
        check_at_least("intervene.steps", self.steps, 1)
        check_number("intervene.lr", self.lr, above=0)
        check_number("intervene.stop_below", self.stop_below)
        if self.bound is not None:
            check_number("intervene.bound", self.bound, above=0)

    def begin(self, model: ModelHandle, site: Site) -> "_Tuning":
        """Nothing is needed but the layer."""
        return _Tuning(self, site.layer)


@dataclass(frozen=True)
class _Tuning(Editing):
    """Fine-tuning at work on one layer."""

    method: FineTune
    layer: int

    def edit(self, model: ModelHandle, facts: tuple[Fact, ...], independent: bool) -> DenseDeltas:
        """One ΔW for each fact, or one for all."""
        groups = [(fact,) for fact in facts] if independent else [facts]
        tuned = [within_memory(self._tune)(model, group) for group in groups]
        losses = [loss for _, loss in tuned]
        failed = diverged(groups, losses)
        return DenseDeltas(
            change=Change("fact", independent, self.layer, "mlp", failed=failed),
            model=model.fingerprint,
            delta=torch.stack([delta for delta, _ in tuned]),
            diagnostics=tuple(tuning_rows(groups, self.layer, losses)),
        )

    def _tune(self, model: ModelHandle, facts: Sequence[Fact]) -> tuple[Tensor, float]:
        """ΔW `[d_model, d_mlp]` float32 and the last loss; zero if that is not finite."""
        delta = torch.zeros(1, *model.w_out(self.layer).shape, device=model.device)
        delta.requires_grad_()
        adam = torch.optim.Adam([delta], lr=self.method.lr)
        parts = Completions.of(model, facts, self.layer)
        for step in range(self.method.steps + 1):
            adam.zero_grad()
            with by_owner(model, self.layer, delta):
                loss = sum(part.backward(model) for part in parts)
            if step == self.method.steps or not loss >= self.method.stop_below:
                break
            adam.step()
            if self.method.bound is not None:
                with torch.no_grad():
                    delta.clamp_(-self.method.bound, self.method.bound)
        found = delta.detach()[0].cpu()
        return (found if math.isfinite(loss) else torch.zeros_like(found)), loss


@dataclass(frozen=True)
class Completions:
    """Facts' new objects after their bare prompts, a batch of them, resumed at a layer.

    Attributes:
        resume: the resumed pass, over whole rows.
        row: `[m]` the row of each place that is read.
        column: `[m]` its column.
        token: `[m]` the token to be predicted there.
        weight: `[m]` one over (tokens of the object × facts).
    """

    resume: Resume
    row: Tensor
    column: Tensor
    token: Tensor
    weight: Tensor

    @classmethod
    def of(cls, model: ModelHandle, facts: Sequence[Fact], layer: int) -> "list[Completions]":
        """All facts' completions in batches; every row belongs to owner 0."""
        rows = [model.encode(fact.prompt, fact.new or "", owner=0) for fact in facts]
        found = []
        for first in range(0, len(rows), model.batch_size):
            group = rows[first : first + model.batch_size]
            starts = torch.zeros(len(group), dtype=torch.long, device=model.device)
            resume = Resume.capture(model, collate(group, model.device), layer, starts)
            reads = [
                (n, at - 1, row.ids[at], len(row.ids) - row.prompt)
                for n, row in enumerate(group)
                for at in range(row.prompt, len(row.ids))
            ]
            row, column, token, length = torch.tensor(reads, device=model.device).T
            found.append(cls(resume, row, column, token, 1.0 / (length * len(facts))))
        return found

    def backward(self, model: ModelHandle) -> float:
        """This batch's share of the mean −log p, in nats; its gradient goes to what hooks add."""
        states = self.resume.run(model)
        scores = torch.log_softmax(logits(model, states[self.row, self.column]), -1)
        loss = -(self.weight * scores.gather(1, self.token[:, None])[:, 0]).sum()
        loss.backward()
        return float(loss.detach())
