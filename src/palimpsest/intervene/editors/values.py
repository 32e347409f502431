"""v* and z: what a layer should write at a subject's last token.

For ROME, v* is an output of W_out (section 3.1, equation 4); for MEMIT and its descendants, z is a
state of the residual stream. Many facts are optimised in one batch. Their losses are summed, each
depends on its own δ alone, and Adam works element by element, so every fact goes the way it would
go by itself.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from palimpsest.cache import cached_tensors
from palimpsest.errors import RequestError, check_at_least, check_number, check_seed
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.intervene.editors.objectives import Aim, Objective, followed
from palimpsest.intervene.editors.prefixes import in_contexts
from palimpsest.model.forward import features, keys, logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import within_memory
from palimpsest.model.partial import Resume
from palimpsest.model.site import Site, check_choice
from palimpsest.model.tokens import Tokens, collate


@dataclass(frozen=True)
class Values:
    """What the optimisation found, for F facts at one site.

    Attributes:
        start: v₀ `[F, d_model]`, the site's output at the subject in the bare prompt.
        delta: δ `[F, d_model]`; v* = v₀ + δ. Zero where the search failed.
        loss: `[F]` the loss at the last evaluation (nats); not a number where the search failed.
    """

    start: Tensor
    delta: Tensor
    loss: Tensor

    @property
    def failed(self) -> list[int]:
        """Facts whose search came to no finite loss."""
        return [i for i, loss in enumerate(self.loss.tolist()) if not math.isfinite(loss)]


@dataclass(frozen=True)
class Hold:
    """What δ of one fact must be in some directions: it is `base` plus anything across `basis`.

    Attributes:
        base: `[d_model]` float32; the search begins there.
        basis: `[d_model, r]` float32, orthonormal: the directions in which nothing is added.
    """

    base: Tensor
    basis: Tensor

    def across(self, step: Tensor) -> Tensor:
        """The part of a vector `[d_model]` that is orthogonal to the basis."""
        return step - self.basis @ (self.basis.T @ step)


@dataclass(frozen=True)
class ValueSearch:
    """Hyper-parameters of the search.

    Attributes:
        steps: evaluations of the loss; there is one Adam step fewer.
        lr: Adam's learning rate.
        kl: weight of KL(p_new ‖ p_old) on "{subject} is a", read at the subject's last token.
        weight_decay: weight of ‖δ‖ / ‖v₀‖².
        clamp: δ, or what is added to its base, is kept to clamp · ‖v₀‖ after each step.
        stop_below: a fact whose loss falls below this (nats) is left as it is; not so of `erase`,
            whose loss is a probability.
        objective: one of `objectives.Objective`; the loss of `erase` is a probability.
        noise: standard deviation of the noise, in those of the input embeddings.
        seed: of the noise.
    """

    steps: int = 20
    lr: float = 0.5
    kl: float = 0.0625
    weight_decay: float = 0.5
    clamp: float = 4.0
    stop_below: float = 0.05
    objective: str = "inject"
    noise: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers and the objective.

        Raises:
            RequestError: no step, an unknown objective, or a number out of its range.
        """
        check_at_least("intervene.search.steps", self.steps, 1)
        check_choice("intervene.search.objective", self.objective, Objective)
        for name in ("lr", "clamp", "noise"):
            check_number(f"intervene.search.{name}", getattr(self, name), above=0)
        for name in ("kl", "weight_decay"):
            check_number(f"intervene.search.{name}", getattr(self, name), least=0)
        check_number("intervene.search.stop_below", self.stop_below)
        check_seed("intervene.search.seed", self.seed)

    def check(self, fact: Fact) -> None:
        """Refuse a fact that the objective cannot be pursued on.

        Raises:
            RequestError: no new object though one is to be written, or a fit prompt without its
                subject.
        """
        self.aim.check(fact)
        if fact.prompt.span is None:
            raise RequestError(
                "expected a subject in the prompt of every target fact, found fact "
                f"{fact.id} without a subject in its prompt; mend the facts file"
            )

    @property
    def aim(self) -> Aim:
        """The objective with its noise."""
        return Aim(self.objective, self.noise, self.seed)

    def find(
        self,
        model: ModelHandle,
        facts: Sequence[Fact],
        site: Site,
        contexts: tuple[str, ...],
        holds: Sequence[Hold] = (),
    ) -> Values:
        """v* of each fact, from the cache or optimised, as many facts at a time as fill a batch.

        Args:
            model: the model as it stands, changed perhaps.
            facts: facts that `check` passes.
            site: `mlp` for an output of W_out, `residual` for a block's.
            contexts: put before the prompts, besides the bare prompt.
            holds: one for each fact, or none: δ is free.
        """
        some = max(1, model.batch_size // (len(contexts) + 2))
        chunks = [slice(first, first + some) for first in range(0, len(facts), some)]
        found = [
            self._found(model, facts[c], site, contexts, holds[c], c.start if model.changes else 0)
            for c in chunks
        ]
        return Values(**{name: torch.cat([each[name] for each in found]) for name in found[0]})

    def _found(
        self,
        model: ModelHandle,
        facts: Sequence[Fact],
        site: Site,
        contexts: tuple[str, ...],
        holds: Sequence[Hold],
        first: int,
    ) -> dict[str, Tensor]:
        key = {
            "version": 4,
            "search": asdict(self),
            "model": model.state,
            "prefix": model.prefix,
            "batch_size": model.batch_size,
            "device": model.device.type,
            "torch": torch.__version__,
            "site": [site.layer, site.part],
            "contexts": list(contexts),
            "facts": [[f.prompt.text, f.prompt.span, f.subject, f.true, f.new] for f in facts],
            **({"holds": _digest(holds)} if holds else {}),
            **({"first": first} if first else {}),
        }
        search = within_memory(
            lambda model: self.optimise(model, facts, site, contexts, holds, first)
        )
        return cached_tensors("values", key, lambda: search(model))

    def optimise(
        self,
        model: ModelHandle,
        facts: Sequence[Fact],
        site: Site,
        contexts: tuple[str, ...],
        holds: Sequence[Hold] = (),
        first: int = 0,
    ) -> dict[str, Tensor]:
        """`find` without the cache: `start`, `delta` and `loss` by name.

        `first` is the number of the first fact, by which a change that the model carries knows it.
        """
        bare = [model.encode(fact.prompt, owner=i) for i, fact in enumerate(facts, first)]
        start = _outputs(model, bare, site)
        parts = self._parts(model, facts, site, contexts, first)
        base = _bases(holds).to(start) if holds else torch.zeros_like(start)
        delta = base.clone().requires_grad_()
        adam = torch.optim.Adam([delta], lr=self.lr)
        limit = self.clamp * start.norm(dim=1, keepdim=True)
        enough = -torch.inf if self.aim.lowered else self.stop_below
        for step in range(self.steps):
            adam.zero_grad()
            with torch.set_grad_enabled(step < self.steps - 1):
                loss = self._loss(model, parts, delta, start)
            going = loss >= enough
            if step == self.steps - 1 or not bool(going.any()):
                break
            before = delta.detach().clone()
            adam.step()
            with torch.no_grad():
                added = delta - base
                shrink = (limit / added.norm(dim=1, keepdim=True)).clamp(max=1.0)
                kept = base + _across(holds, added * shrink)
                delta.copy_(torch.where(going[:, None], kept, before))
        found = torch.where(loss.isfinite()[:, None], delta.detach(), 0.0)
        return {"start": start.cpu(), "delta": found.cpu(), "loss": loss.cpu()}

    def _parts(
        self,
        model: ModelHandle,
        facts: Sequence[Fact],
        site: Site,
        contexts: tuple[str, ...],
        first: int,
    ) -> list["_Part"]:
        """What the loss is made of: the objective's prompts, and the subjects' essence."""
        wanted, count = self.aim.wanted(model, facts), len(contexts) + 1
        targets = _targets(model, facts, wanted, contexts, first)
        essences = _essences(model, facts, first)
        if self.objective != "force":
            return list(_captured(model, [*targets, *essences], site, count, first))
        with self.aim.forced(model, facts):
            forced = list(_captured(model, targets, site, count, first))
        return [*forced, *_captured(model, essences, site, 1, first)]

    def _loss(
        self, model: ModelHandle, parts: Sequence["_Part"], delta: Tensor, start: Tensor
    ) -> Tensor:
        """Each fact's loss `[F]`; gradients, if any, are left in `delta.grad`, part by part."""
        decay = self.weight_decay * delta.norm(dim=1) / start.norm(dim=1) ** 2
        total = torch.zeros_like(decay)
        shares = (part.loss(model, delta, self.aim.lowered, self.kl) for part in parts)
        for share in chain([decay], shares):
            if share.requires_grad:
                share.sum().backward()
            total = total + share.detach()
        return total


@dataclass(frozen=True)
class _Part:
    """Rows resumed at the edited layer, each from its subject's last token on.

    A row is a prompt with the object that is wanted or unwanted after it, or an essence, "{subject}
    is a", which has no object and is read at the subject's last token.

    Attributes:
        resume: the resumed pass.
        fact: `[n]` each row's fact, counted from 0.
        site: where δ is added.
        row: `[m]` the row of each token of an object.
        column: `[m]` the column that it is predicted at.
        token: `[m]` the token.
        length: `[n]` the tokens of each row's object; 0 for essences.
        count: prompts a fact.
        essence: `[e]` the rows of essences.
        reference: `[e, vocabulary]` log-probabilities there without δ.
    """

    resume: Resume
    fact: Tensor
    site: Site
    row: Tensor
    column: Tensor
    token: Tensor
    length: Tensor
    count: int
    essence: Tensor
    reference: Tensor

    def loss(self, model: ModelHandle, delta: Tensor, lowered: bool, kl: float) -> Tensor:
        """These rows' share of each fact's loss, `[F]` nats.

        For an object −log p, a mean over its tokens, or if it is to be lowered p of the whole; of
        that a mean over the fact's prompts. For an essence KL(p_new ‖ p_old), times `kl`.
        """
        logprobs = self._logprobs(model, delta)
        objects, essences = logprobs[: len(self.token)], logprobs[len(self.token) :]
        each = objects.gather(1, self.token[:, None])[:, 0]
        whole = torch.zeros_like(self.length, dtype=each.dtype).index_add(0, self.row, each)
        wanted = whole.exp() if lowered else -whole / self.length.clamp(min=1)
        divergence = (essences.exp() * (essences - self.reference)).sum(-1)
        by_row = wanted * (self.length > 0) / self.count
        by_row = by_row.index_add(0, self.essence, kl * divergence)
        return torch.zeros_like(delta[:, 0]).index_add(0, self.fact, by_row)

    def _logprobs(self, model: ModelHandle, delta: Tensor) -> Tensor:
        """Log-probabilities `[m + e, vocabulary]` at the places, δ added at the subjects."""

        def add(value: Tensor) -> Tensor:
            first = value[:, :1] + delta[self.fact].unsqueeze(1).to(value)
            return torch.cat([first, value[:, 1:]], 1)

        with model.hooked([(model.module(self.site), add)]):
            states = self.resume.run(model)
        read = torch.cat([states[self.row, self.column], states[self.essence, 0]])
        return torch.log_softmax(logits(model, read), -1)


def _bases(holds: Sequence[Hold]) -> Tensor:
    return torch.stack([hold.base for hold in holds])


def _across(holds: Sequence[Hold], steps: Tensor) -> Tensor:
    """Steps `[F, d_model]`, each across its fact's hold; as they are where there is none."""
    if not holds:
        return steps
    return torch.stack(
        [hold.across(step) for hold, step in zip(holds, steps.cpu(), strict=True)]
    ).to(steps)


def _digest(holds: Sequence[Hold]) -> str:
    """What the cache knows holds by."""
    hashed = hashlib.sha256()
    for tensor in (t for hold in holds for t in (hold.base, hold.basis)):
        hashed.update(f"{tuple(tensor.shape)};".encode())
        hashed.update(tensor.contiguous().numpy().data)
    return hashed.hexdigest()


def _outputs(model: ModelHandle, bare: Sequence[Tokens], site: Site) -> Tensor:
    """The site's output at each subject's last token, `[F, d_model]` float32."""
    if site.part == "mlp":
        return keys(model, bare, site.layer)[1].float()
    return features(model, bare, [site], ["last_subject"])[0, 0].float().to(model.device)


def _targets(
    model: ModelHandle,
    facts: Sequence[Fact],
    wanted: Sequence[str | tuple[int, ...]],
    contexts: tuple[str, ...],
    first: int,
) -> list[Tokens]:
    return [
        followed(model, prompt, wanted[owner - first], owner)
        for owner, fact in enumerate(facts, first)
        for prompt in in_contexts(fact, contexts)
    ]


def _essences(model: ModelHandle, facts: Sequence[Fact], first: int) -> list[Tokens]:
    return [
        model.encode(Prompt.fill("essence", "{} is a", fact.subject), owner=owner)
        for owner, fact in enumerate(facts, first)
    ]


def _captured(
    model: ModelHandle, rows: Sequence[Tokens], site: Site, count: int, first: int
) -> Iterator[_Part]:
    """Groups of rows whose subjects end at like places, each run once up to there."""
    order = sorted(
        range(len(rows)), key=lambda i: (rows[i].at("last_subject"), len(rows[i].ids), i)
    )
    for start in range(0, len(order), model.batch_size):
        some = [rows[i] for i in order[start : start + model.batch_size]]
        yield _part(model, some, site, count, first)


def _part(model: ModelHandle, group: Sequence[Tokens], site: Site, count: int, first: int) -> _Part:
    device = model.device
    starts = torch.tensor([row.at("last_subject") for row in group], device=device)
    runs = [replace(row, ids=row.ids[: _last_read(row) + 1]) for row in group]
    resume = Resume.capture(model, collate(runs, device), site.layer, starts)
    reads = [
        (n, at - 1 - row.at("last_subject"), row.ids[at])
        for n, row in enumerate(group)
        for at in range(row.prompt, len(row.ids))
    ]
    row, column, token = torch.tensor(reads, dtype=torch.long, device=device).view(-1, 3).T
    length = torch.tensor([len(r.ids) - r.prompt for r in group], device=device)
    essence = (length == 0).nonzero()[:, 0]
    with torch.no_grad():
        reference = torch.log_softmax(logits(model, resume.run(model)[essence, 0]), -1)
    fact = resume.batch.owner - first
    return _Part(resume, fact, site, row, column, token, length, count, essence, reference)


def _last_read(row: Tokens) -> int:
    """The last place of a row that anything is read at."""
    return len(row.ids) - 2 if len(row.ids) > row.prompt else row.at("last_subject")
