"""v*: the output that W_out should give at a subject's last token (ROME, section 3.1, equation 4).

Many facts are optimised in one batch. Their losses are summed, each depends on its own δ alone, and
Adam works element by element, so every fact goes the way it would go by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from palimpsest.errors import check_at_least
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.files import cached_tensors
from palimpsest.intervene.prefixes import in_contexts
from palimpsest.model.forward import keys, logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.partial import Resume
from palimpsest.model.site import Site
from palimpsest.model.tokens import Tokens, collate


@dataclass(frozen=True)
class Values:
    """What v* optimisation found, for F facts at one layer.

    Attributes:
        start: v₀ `[F, d_model]`, the output of W_out at the subject in the bare prompt.
        delta: δ `[F, d_model]`; v* = v₀ + δ.
        loss: `[F]` the loss at the last evaluation (nats).
    """

    start: Tensor
    delta: Tensor
    loss: Tensor


@dataclass(frozen=True)
class ValueSearch:
    """Hyper-parameters of the search for v*.

    Attributes:
        steps: evaluations of the loss; there is one Adam step fewer.
        lr: Adam's learning rate.
        kl: weight of KL(p_new ‖ p_old) on "{subject} is a", read at the subject's last token.
        weight_decay: weight of ‖δ‖ / ‖v₀‖².
        clamp: δ is projected to ‖δ‖ ≤ clamp · ‖v₀‖ after each step.
        stop_below: a fact whose loss falls below this (nats) is left as it is.
    """

    steps: int = 20
    lr: float = 0.5
    kl: float = 0.0625
    weight_decay: float = 0.5
    clamp: float = 4.0
    stop_below: float = 0.05

    def __post_init__(self) -> None:
        """Check the number of steps.

        Raises:
            RequestError: none.
        """
        check_at_least("intervene.search.steps", self.steps, 1)

    def find(
        self, model: ModelHandle, facts: Sequence[Fact], layer: int, contexts: tuple[str, ...]
    ) -> Values:
        """v* of each fact's new object, from the cache or optimised.

        Args:
            model: the unchanged model.
            facts: facts with a new object and a subject in the fit prompt.
            layer: whose W_out.
            contexts: put before the prompts, besides the bare prompt.
        """
        key = {
            "version": 1,
            "search": asdict(self),
            "model": model.fingerprint,
            "prefix": model.prefix,
            "batch_size": model.batch_size,
            "layer": layer,
            "contexts": list(contexts),
            "facts": [[f.prompt.text, f.prompt.span, f.subject, f.new] for f in facts],
        }
        found = cached_tensors("values", key, lambda: self.optimise(model, facts, layer, contexts))
        return Values(**found)

    def optimise(
        self, model: ModelHandle, facts: Sequence[Fact], layer: int, contexts: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """`find` without the cache: `start`, `delta` and `loss` by name."""
        bare = [model.encode(fact.prompt, owner=i) for i, fact in enumerate(facts)]
        start = keys(model, bare, layer)[1].float()
        parts = [*_targets(model, facts, layer, contexts), *_essences(model, facts, layer)]
        delta = torch.zeros_like(start, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=self.lr)
        limit = self.clamp * start.norm(dim=1, keepdim=True)
        for step in range(self.steps):
            adam.zero_grad()
            loss = self._loss(model, parts, delta, start)
            going = loss >= self.stop_below
            if step == self.steps - 1 or not bool(going.any()):
                break
            before = delta.detach().clone()
            adam.step()
            with torch.no_grad():
                shrink = (limit / delta.norm(dim=1, keepdim=True)).clamp(max=1.0)
                delta.copy_(torch.where(going[:, None], delta * shrink, before))
        return {"start": start.cpu(), "delta": delta.detach().cpu(), "loss": loss.cpu()}

    def _loss(
        self, model: ModelHandle, parts: Sequence["_Part"], delta: Tensor, start: Tensor
    ) -> Tensor:
        """Each fact's loss `[F]`; gradients are left in `delta.grad`, part by part."""
        decay = self.weight_decay * delta.norm(dim=1) / start.norm(dim=1) ** 2
        decay.sum().backward()
        total: Tensor = decay.detach()
        for part in parts:
            weight = self.kl if isinstance(part, _Essence) else 1.0
            loss = weight * part.loss(model, delta)
            loss.sum().backward()
            total = total + loss.detach()
        return total


@dataclass(frozen=True)
class _Part:
    """Rows whose subjects end at one token, resumed at the edited layer from there on.

    Attributes:
        resume: the resumed pass.
        layer: the edited layer.
        row: `[m]` the row of each place that is read.
        column: `[m]` its column.
        owner: `[m]` its fact.
    """

    resume: Resume
    layer: int
    row: Tensor
    column: Tensor
    owner: Tensor

    def logprobs(self, model: ModelHandle, delta: Tensor) -> Tensor:
        """Log-probabilities `[m, vocabulary]` at the places, δ added at the subjects."""

        def add(value: Tensor) -> Tensor:
            first = value[:, :1] + delta[self.resume.batch.owner].unsqueeze(1).to(value)
            return torch.cat([first, value[:, 1:]], 1)

        with model.hooked([(model.module(Site(self.layer, "mlp")), add)]):
            states = self.resume.run(model)
        return torch.log_softmax(logits(model, states[self.row, self.column]), -1)

    def loss(self, model: ModelHandle, delta: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class _Target(_Part):
    """−log p of the new object, averaged over its tokens and over the fact's prompts.

    Attributes:
        token: `[m]` the tokens to be predicted.
        weight: `[m]` one over (tokens of the object × prompts of the fact).
    """

    token: Tensor
    weight: Tensor

    def loss(self, model: ModelHandle, delta: Tensor) -> Tensor:
        """`[F]` nats."""
        nll = -self.logprobs(model, delta).gather(1, self.token[:, None])[:, 0]
        return torch.zeros_like(delta[:, 0]).index_add(0, self.owner, self.weight * nll)


@dataclass(frozen=True)
class _Essence(_Part):
    """KL(p_new ‖ p_old) on "{subject} is a", read at the subject's last token.

    Attributes:
        reference: `[m, vocabulary]` log-probabilities of the unchanged model.
    """

    reference: Tensor

    def loss(self, model: ModelHandle, delta: Tensor) -> Tensor:
        """`[F]` nats."""
        new = self.logprobs(model, delta)
        divergence = (new.exp() * (new - self.reference)).sum(-1)
        return torch.zeros_like(delta[:, 0]).index_add(0, self.owner, divergence)


def _targets(
    model: ModelHandle, facts: Sequence[Fact], layer: int, contexts: tuple[str, ...]
) -> Iterator[_Target]:
    rows = [
        model.encode(prompt, fact.new or "", owner)
        for owner, fact in enumerate(facts)
        for prompt in in_contexts(fact, contexts)
    ]
    for group, resume in _resumed(model, rows, layer):
        reads = [
            (n, at - 1 - row.at("last_subject"), row.owner, row.ids[at], len(row.ids) - row.prompt)
            for n, row in enumerate(group)
            for at in range(row.prompt, len(row.ids))
        ]
        row, column, owner, token, length = torch.tensor(reads, device=model.device).T
        weight = 1.0 / (length * (len(contexts) + 1))
        yield _Target(resume, layer, row, column, owner, token, weight)


def _essences(model: ModelHandle, facts: Sequence[Fact], layer: int) -> Iterator[_Essence]:
    rows = [
        model.encode(Prompt.fill("essence", "{} is a", fact.subject), owner=owner)
        for owner, fact in enumerate(facts)
    ]
    for group, resume in _resumed(model, rows, layer):
        row = torch.arange(len(group), device=model.device)
        column = torch.zeros_like(row)
        with torch.no_grad():
            states = resume.run(model)
            reference = torch.log_softmax(logits(model, states[row, column]), -1)
        yield _Essence(resume, layer, row, column, resume.batch.owner, reference)


def _resumed(
    model: ModelHandle, rows: Sequence[Tokens], layer: int
) -> Iterator[tuple[list[Tokens], Resume]]:
    """Groups of rows whose subjects end at like places, each run once up to there."""
    order = sorted(
        range(len(rows)), key=lambda i: (rows[i].at("last_subject"), len(rows[i].ids), i)
    )
    for first in range(0, len(order), model.batch_size):
        group = [rows[i] for i in order[first : first + model.batch_size]]
        starts = torch.tensor([row.at("last_subject") for row in group], device=model.device)
        yield group, Resume.capture(model, collate(group, model.device), layer, starts)
