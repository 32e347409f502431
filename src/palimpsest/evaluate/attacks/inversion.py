"""Inversion: which object did a change write, or drive away? Read off W' − W alone.

After Youssef et al. 2025 (arXiv 2505.20819), who report that the edited object can be named from
the changed weights, without the edit's prompt, with an accuracy of up to 99%. The read-outs are our
own: they train nothing and look where ΔW writes to. No subject, relation or prompt of a fact is
seen.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from palimpsest.errors import check_at_least, check_number
from palimpsest.evaluate.asking import NOT_FINITE, candidates
from palimpsest.evaluate.attacks.candidates import NO_THIRD, SAME_TOKEN
from palimpsest.evaluate.attacks.returning import check_distinct
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.facts.splits import Splits
from palimpsest.model.difference import Difference, merged
from palimpsest.model.forward import capturing, forward, logit_lens, logits, run_to
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import within_memory
from palimpsest.model.site import Change, Site
from palimpsest.model.tokens import Tokens, collate
from palimpsest.record.row import Row

NO_WEIGHT = "no W_out was changed"
ALL_WRITTEN = "every object of the relation is some changed fact's old or new one"


@dataclass(frozen=True)
class Inversion:
    """Two read-outs of the leading left singular vectors of ΔW, each in both directions.

    Of a change of several layers, the layer is read whose ΔW is largest against its W_out. There is
    one vector for a change of a single fact; as many as there are target facts, or as ΔW has rank,
    for one change of all.

    Attributes:
        budgets: B, candidates that an attacker may name; none for no attack.
        prompt: a text that holds neither subject nor relation.
        scale: length of what is added to the stream, in typical lengths of what W_out writes;
            chosen among 1, 3, 10 and 30 on sixteen dev facts of SmolLM2 (ROME at layer 5).
    """

    budgets: list[int] = field(default_factory=lambda: [1, 5, 20])
    prompt: str = "The answer is"
    scale: float = 30.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RequestError: one is out of its range, or a budget is named twice.
        """
        for budget in self.budgets:
            check_at_least("evaluate.inversion.budgets", budget, 1)
        check_distinct("evaluate.inversion.budgets", self.budgets)
        check_number("evaluate.inversion.scale", self.scale, above=0)

    def measure(
        self,
        model: ModelHandle,
        facts: Splits,
        change: Change,
        differences: Sequence[Difference],
    ) -> Iterator[Row]:
        """Rows `inversion_success`, `inversion_baseline` and `inversion_rank`: docs/metrics.md.

        Args:
            model: with the change applied.
            facts: whose objects are sought.
            change: of the model.
            differences: W' − W; none if no W_out was changed.
        """
        if not self.budgets:
            return
        row = partial(Row, axis="recoverability", scope=change.scope, split="target")
        aims = _aims(model, facts, change.independent)
        found = merged(differences)
        layer, spans = _spans(model, found, 1 if change.independent else len(facts.target))
        read = {
            "weights_lens": [_lens(model, span) if len(span) else None for span in spans],
            "weights_forward": self._forward(model, layer, spans),
        }
        for protocol, scores in read.items():
            for n, (fact, aim) in enumerate(zip(facts.target, aims, strict=True)):
                one = partial(row, fact_id=fact.id, relation=fact.relation)
                mine = scores[n % len(scores)]
                for name, token in (("old", aim.old), ("new", aim.new)):
                    named = partial(one, protocol=f"{protocol}_{name}")
                    yield from self._rows(named, token, aim, mine)

    def _rows(
        self, row: partial[Row], token: int, aim: "_Aim", scores: Tensor | None
    ) -> Iterator[Row]:
        """Whether an object's first token is among the B best, and how many others it beats."""
        cause = _why_null(aim, scores)
        alone = cause or (None if aim.unrelated else aim.alone)
        ranks = [0] * (1 + len(aim.unrelated)) if cause else _ranks(scores, [token, *aim.unrelated])
        for budget in self.budgets:
            hits = [float(rank < budget) for rank in ranks]
            at = partial(row, budget=budget)
            yield _or_null(at, "inversion_success", hits[:1], cause)
            yield _or_null(at, "inversion_baseline", hits[1:], alone)
        beaten = [(other > ranks[0]) + (other == ranks[0]) / 2 for other in ranks[1:]]
        yield _or_null(row, "inversion_rank", beaten, alone)

    def _forward(
        self, model: ModelHandle, layer: int, spans: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """By span, each token's largest rise in log-probability over directions and both signs."""
        if not any(len(span) for span in spans):
            return [None for _ in spans]
        text = model.encode(Prompt("neutral", self.prompt))
        length = self.scale * _typical(model, text, layer)
        pushes = [length * torch.cat([span, -span]) for span in spans]
        rises = _rises(model, text, layer, pushes)
        return [rise if len(span) else None for span, rise in zip(spans, rises, strict=True)]


@dataclass(frozen=True)
class _Aim:
    """First tokens that are looked for.

    Attributes:
        old: of the old object.
        new: of the new one.
        unrelated: of the relation's objects that ΔW has nothing to do with.
        cause: why a hit would say nothing; None if it does.
        alone: why there are none unrelated, if there are none.
    """

    old: int
    new: int
    unrelated: list[int]
    cause: str | None
    alone: str


def _aims(model: ModelHandle, facts: Splits, independent: bool) -> list[_Aim]:
    """One for each target fact; of one change of all facts, the others' objects are related too."""
    written = {(f.relation, name) for f in facts.target for name in (f.true, f.new)}
    return [
        _aim(model, fact, facts.classes[fact.relation], set() if independent else written)
        for fact in facts.target
    ]


def _aim(
    model: ModelHandle,
    fact: Fact,
    classes: Sequence[str],
    written: Collection[tuple[str, str | None]],
) -> _Aim:
    names = candidates(fact, classes)
    rows = {name: model.encode(fact.prompt, name) for name in names}
    first = {name: row.ids[row.prompt] for name, row in rows.items()}
    old, new = first[fact.true], first[fact.new or fact.true]
    related = {old, new, *(first[n] for n in names if (fact.relation, n) in written)}
    rest = sorted(set(first.values()) - related)
    cause = SAME_TOKEN if old == new else None
    return _Aim(old, new, rest, cause, ALL_WRITTEN if written else NO_THIRD)


def _spans(
    model: ModelHandle, differences: Sequence[Difference], most: int
) -> tuple[int, list[Tensor]]:
    """The layer that is read, and for each ΔW of it its leading directions `[k, d_model]`."""
    if not differences:
        return 0, [torch.empty(0, model.width)]
    shares = [d.norms().mean() / model.w_out(d.layer).double().norm().cpu() for d in differences]
    chosen = differences[int(torch.stack(shares).argmax())]
    return chosen.layer, [chosen.directions(n, most) for n in range(chosen.facts)]


@torch.no_grad()
def _lens(model: ModelHandle, span: Tensor) -> Tensor:
    """By token, the largest logit that a direction of the span gives it, `[vocabulary]`.

    The length of the vector of the directions' logits, so that it depends on the span alone,
    exactly where the norm before the head is an RMS norm; logits are halves of what the two signs
    differ by, as a norm's or head's bias says nothing.
    """
    up, down = (logit_lens(model, sign * span * model.width**0.5) for sign in (1, -1))
    lengths: Tensor = ((up - down) / 2).norm(dim=0)
    return lengths.cpu()


@within_memory
@torch.no_grad()
def _typical(model: ModelHandle, text: Tokens, layer: int) -> float:
    """The median length of what W_out writes in a text, at all tokens but the first."""
    site = Site(layer, "mlp")
    with capturing(model, [site]) as states:
        run_to(model, collate([text], model.device), layer)
    return float(states[site][0, min(1, len(text.ids) - 1) :].float().norm(dim=-1).median())


@within_memory
@torch.no_grad()
def _rises(model: ModelHandle, text: Tokens, layer: int, pushes: Sequence[Tensor]) -> list[Tensor]:
    """By group of vectors `[k, d_model]`, the largest rise of each token's log-probability.

    Each vector is added to the stream after the block, at the text's last token.
    """
    plain = _after_push(model, text, layer, torch.zeros(1, model.width))[0]
    found = [torch.full_like(plain, -torch.inf) for _ in pushes]
    home = [n for n, group in enumerate(pushes) for _ in group]
    vectors = torch.cat(list(pushes))
    for start in range(0, len(vectors), model.batch_size):
        some = vectors[start : start + model.batch_size]
        for n, said in zip(home[start:], _after_push(model, text, layer, some), strict=False):
            found[n] = torch.maximum(found[n], said - plain)
    return found


def _after_push(model: ModelHandle, text: Tokens, layer: int, vectors: Tensor) -> Tensor:
    """Log-probabilities `[n, vocabulary]` after the text, one vector added in each row."""

    def push(states: Tensor) -> Tensor:
        moved = states.clone()
        moved[:, -1] += vectors.to(states)
        return moved

    batch = collate([text] * len(vectors), model.device)
    with model.hooked([(model.blocks[layer], push)]):
        states = forward(model, batch)[:, -1]
    return torch.log_softmax(logits(model, states), -1).cpu()


def _why_null(aim: _Aim, scores: Tensor | None) -> str | None:
    """Why a hit would say nothing; None if it does."""
    if scores is None:
        return NO_WEIGHT
    return aim.cause if bool(scores.isfinite().all()) else NOT_FINITE


def _ranks(scores: Tensor | None, tokens: Sequence[int]) -> list[int]:
    """How many tokens of the vocabulary have a higher score than each of some."""
    assert scores is not None
    return [int((scores > scores[token]).sum()) for token in tokens]


def _or_null(row: partial[Row], metric: str, values: Sequence[float], cause: str | None) -> Row:
    """The mean; null if there is a cause."""
    row = partial(row, metric=metric)
    if cause is not None:
        return row(value=None, n=0, note=cause)
    return row(value=fmean(values), n=len(values))
