"""Fine-tuning of one W_out: free (FT), or bounded (FT-L, Zhu et al. 2020, arXiv 2012.00363)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from palimpsest.errors import check_at_least, check_number, check_seed
from palimpsest.facts.fact import Fact
from palimpsest.intervene.changes.dense import DenseDeltas, by_owner
from palimpsest.intervene.editors.editor import (
    Editing,
    Editor,
    diverged,
    tuning_rows,
)
from palimpsest.intervene.editors.objectives import Aim, Objective, followed
from palimpsest.model.forward import logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import within_memory
from palimpsest.model.partial import Resume
from palimpsest.model.site import Change, Site, check_choice
from palimpsest.model.tokens import collate


@dataclass(frozen=True)
class Tuner(Editor):
    """Gradient descent on −log p of the new object after the bare prompt.

    Every token of the object is scored where it stands. (ROME's public code scores all of them at
    the prompt's last token.)

    Attributes:
        steps: Adam's steps at most.
        lr: Adam's learning rate.
        stop_below: loss (nats a token, mean over the facts) at which to stop; not so of `erase`,
            whose loss is a probability.
        objective: one of `objectives.Objective`.
        noise: of `force` and `trace_reversal`, in standard deviations of the input embeddings.
        seed: of all that is drawn.
    """

    steps: int = 25
    lr: float = 5e-4
    stop_below: float = 1e-2
    objective: str = "inject"
    noise: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the objective and the numbers.

        Raises:
            RequestError: an unknown protocol or objective, no step, or a number out of its range.
        """
        super().__post_init__()
        check_at_least("intervene.steps", self.steps, 1)
        check_choice("intervene.objective", self.objective, Objective)
        for name in ("lr", "noise"):
            check_number(f"intervene.{name}", getattr(self, name), above=0)
        check_number("intervene.stop_below", self.stop_below)
        check_seed("intervene.seed", self.seed)

    @property
    def aim(self) -> Aim:
        """The objective with its noise."""
        return Aim(self.objective, self.noise, self.seed)

    @property
    def enough(self) -> float:
        """The loss at which to stop."""
        return -math.inf if self.aim.lowered else self.stop_below

    def check(self, fact: Fact) -> None:
        """Refuse a fact that the objective cannot be pursued on.

        Raises:
            RequestError: no new object though one is to be written, or no subject to be noised.
        """
        self.aim.check(fact)


@dataclass(frozen=True)
class FineTune(Tuner):
    """Gradient descent in one W_out, free or bounded.

    Attributes:
        bound: ε of FT-L, `|ΔW| ≤ ε` entry by entry after every step; None for FT.
    """

    bound: float | None = None

    def __post_init__(self) -> None:
        """Check the bound too.

        Raises:
            RequestError: it is not positive, or as of `Tuner`.
        """
        super().__post_init__()
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
        parts = Completions.of(model, facts, self.layer, self.method.aim)
        for step in range(self.method.steps + 1):
            adam.zero_grad()
            with by_owner(model, self.layer, delta):
                loss = sum(part.backward(model) for part in parts)
            if step == self.method.steps or not loss >= self.method.enough:
                break
            adam.step()
            if self.method.bound is not None:
                with torch.no_grad():
                    delta.clamp_(-self.method.bound, self.method.bound)
        found = delta.detach()[0].cpu()
        return (found if math.isfinite(loss) else torch.zeros_like(found)), loss


@dataclass(frozen=True)
class Completions:
    """Facts' wanted or unwanted objects after their bare prompts, a batch resumed at a layer.

    Attributes:
        resume: the resumed pass, over whole rows; every row belongs to owner 0.
        row: `[m]` the row of each place that is read.
        column: `[m]` its column.
        token: `[m]` the token to be predicted there.
        length: `[n]` the tokens of each row's object.
        facts: how many there are in all batches.
        lowered: whether the objects are to become unlikely.
    """

    resume: Resume
    row: Tensor
    column: Tensor
    token: Tensor
    length: Tensor
    facts: int
    lowered: bool

    @classmethod
    def of(
        cls, model: ModelHandle, facts: Sequence[Fact], layer: int, aim: Aim
    ) -> "list[Completions]":
        """All facts' completions in batches, captured under the aim's noise if it has any."""
        wanted = aim.wanted(model, facts)
        rows = [followed(model, fact.prompt, wanted[n], n) for n, fact in enumerate(facts)]
        found = []
        for first in range(0, len(rows), model.batch_size):
            group = rows[first : first + model.batch_size]
            starts = torch.zeros(len(group), dtype=torch.long, device=model.device)
            with aim.forced(model, facts):
                resume = Resume.capture(model, collate(group, model.device), layer, starts)
            batch = replace(resume.batch, owner=torch.zeros_like(resume.batch.owner))
            reads = [
                (n, at - 1, row.ids[at])
                for n, row in enumerate(group)
                for at in range(row.prompt, len(row.ids))
            ]
            row, column, token = torch.tensor(reads, device=model.device).T
            found.append(
                cls(
                    resume=replace(resume, batch=batch),
                    row=row,
                    column=column,
                    token=token,
                    length=torch.bincount(row, minlength=len(group)),
                    facts=len(facts),
                    lowered=aim.lowered,
                )
            )
        return found

    def backward(self, model: ModelHandle) -> float:
        """This batch's share of the loss; its gradient goes to what hooks add.

        The loss is a mean over the facts: of −log p (nats, a mean over the object's tokens), or if
        the object is to become unlikely of p as a whole string.
        """
        states = self.resume.run(model)
        scores = torch.log_softmax(logits(model, states[self.row, self.column]), -1)
        each = scores.gather(1, self.token[:, None])[:, 0]
        whole = torch.zeros_like(self.length, dtype=each.dtype).index_add(0, self.row, each)
        loss = (whole.exp() if self.lowered else -whole / self.length).sum() / self.facts
        loss.backward()
        return float(loss.detach())
