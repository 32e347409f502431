"""What causal tracing does to a subject: noise on its embeddings, or another subject's in place."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.facts.fact import Fact
from palimpsest.model.corruption import draw
from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import Tokens

NO_OTHER = "no other subject of the relation has another object and as many tokens"
"""Why a fact cannot be traced with another subject in its place."""


def subject_spread(model: ModelHandle, rows: Sequence[Tokens]) -> float:
    """Standard deviation of the embeddings of all tokens of all rows' subjects.

    Meng et al. 2022 (arXiv 2202.05262, section 2.1) take noise of three times that.
    """
    ids = [token for row in rows for token in _subject(row)]
    return float(_embedded(model, ids).std())


def noise(
    model: ModelHandle, row: Tokens, deviation: float, samples: int, seed: int
) -> list[Tensor]:
    """Gaussian noise `[subject tokens, d_model]` for each sample; it depends on seed and subject.

    Args:
        model: the model.
        row: a prompt with a subject.
        deviation: standard deviation.
        samples: how many.
        seed: of the generators.
    """
    drawn = [draw(model, [row], deviation, f"{seed}/{sample}") for sample in range(samples)]
    return [each[0] for each in drawn]


def other_subjects(
    model: ModelHandle,
    facts: Sequence[Fact],
    rows: Sequence[Tokens],
    which: int,
    samples: int,
    seed: int,
) -> list[Tensor]:
    """What turns a subject's embeddings into those of other facts' subjects, one a sample.

    Symmetric token replacement (Zhang and Nanda 2024, arXiv 2309.16042): the others are of the
    same relation, have another object and as many tokens, and are picked by a seeded hash.

    Args:
        model: the model.
        facts: among which others are looked for.
        rows: their prompts.
        which: the fact.
        samples: at most so many.
        seed: of the hash.

    Returns:
        `[subject tokens, d_model]` for each; none if there is no such subject.
    """
    fact, own = facts[which], _subject(rows[which])
    subjects = {
        other.subject: _subject(row)
        for other, row in zip(facts, rows, strict=True)
        if other.relation == fact.relation and other.true != fact.true
    }
    fitting = [name for name, ids in subjects.items() if len(ids) == len(own)]
    fitting.sort(key=lambda name: _hashed(f"{seed}/{fact.id}/{name}"))
    mine = _embedded(model, own)
    return [_embedded(model, subjects[name]) - mine for name in fitting[:samples]]


def _hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _subject(row: Tokens) -> tuple[int, ...]:
    if row.subject is None:
        raise ValueError("the prompt holds no subject")
    return row.ids[row.subject[0] : row.subject[1] + 1]


@torch.no_grad()
def _embedded(model: ModelHandle, ids: Sequence[int]) -> Tensor:
    """Input embeddings `[tokens, d_model]` float32."""
    table = model.model.get_input_embeddings()
    embedded: Tensor = table(torch.tensor(ids, device=model.device))
    return embedded.float()
