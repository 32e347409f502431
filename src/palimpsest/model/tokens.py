"""Prompts as tokens, and batches of them: which token is the subject's, which the prompt's last."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from palimpsest.model.site import Policy, Position


class Spanned(Protocol):
    """A text, and the first and one-past-last character of its subject, if it has one."""

    @property
    def text(self) -> str:
        """The text."""
        ...

    @property
    def span(self) -> tuple[int, int] | None:
        """Where its subject stands."""
        ...


NOBODY = -1
"""The owner of a row that belongs to no fact; per-fact changes leave such a row alone."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One row of tokens.

    Attributes:
        ids: token ids: the model's prefix, the prompt, and a completion if there is one.
        prompt: number of tokens up to the end of the prompt (the rest is the completion).
        subject: indices of the subject's first and last token; None if the prompt holds none.
        owner: index of the fact that the row belongs to, or `NOBODY`.
    """

    ids: tuple[int, ...]
    prompt: int
    subject: tuple[int, int] | None = None
    owner: int = NOBODY

    def at(self, position: Position) -> int:
        """Index of the token at a named position.

        Raises:
            ValueError: the prompt holds no subject.
        """
        if position == "last_prompt":
            return self.prompt - 1
        if self.subject is None:
            raise ValueError("the prompt holds no subject")
        return self.subject[1]


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, ready for a forward pass. In a causal model the padding reaches no token.

    Attributes:
        ids: `[n, t]` token ids, 0 where padded.
        mask: `[n, cached + t]` ones for tokens (cached ones included), zeros for padding.
        positions: `[n, t]` each token's place in its row, counted from 0.
        owner: `[n]` the fact that each row belongs to; `NOBODY` for none.
        subject_last: `[n]` place of the subject's last token; -1 for none.
        prompt_last: `[n]` place of the prompt's last token.
        subject: `[n]` what stands for the subject's tokens, see `subject_key`; 0 for none.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    owner: Tensor
    subject_last: Tensor
    prompt_last: Tensor
    subject: Tensor

    def selects(self, policy: Policy) -> Tensor:
        """`[n, t]` boolean: the tokens that a policy names; padding among them is inert.

        Raises:
            RequestError: it is not known which they are.
        """
        if policy == "last_subject":
            return self.positions == self.subject_last.unsqueeze(1)
        if policy == "last_prompt":
            return self.positions == self.prompt_last.unsqueeze(1)
        return self.positions >= (1 if policy == "all_but_sink" else 0)

    def owners(self) -> Tensor:
        """`owner`, where it is known.

        Raises:
            RequestError: it is not.
        """
        return self.owner

    def holds(self, subjects: Tensor) -> Tensor:
        """`[n]` boolean: the rows whose subject is among those that numbers `[m]` stand for.

        Raises:
            RequestError: nothing is known of subjects.
        """
        return torch.isin(self.subject, subjects.to(self.subject.device))

    def take(self, rows: Tensor) -> "Batch":
        """Some of the rows, `[m]` indices; any may come several times."""
        return Batch(**{each.name: getattr(self, each.name)[rows] for each in fields(self)})

    def padded_left(self) -> "Batch":
        """The same rows, padded on the left: what follows a row then stands right after it."""
        width = self.ids.shape[1]
        empty = width - self.mask.sum(1, keepdim=True)
        places = torch.arange(width, device=self.ids.device) - empty
        ids = self.ids.gather(1, places % width)
        return replace(self, ids=ids, mask=(places >= 0).long(), positions=places.clamp(min=0))

    def followed_by(self, ids: Tensor) -> "Batch":
        """One token `[n]` more of each row padded on the left, all before it being cached."""
        positions = self.mask.sum(1, keepdim=True)
        mask = torch.cat([self.mask, torch.ones_like(positions)], 1)
        return replace(self, ids=ids.unsqueeze(1), mask=mask, positions=positions)

    def since(self, starts: Tensor) -> "Batch":
        """Each row from its own place `starts` `[n]` on, what comes before it being cached.

        The cached tokens are padded on the left, to the longest of them.
        """
        lengths = self.mask.sum(1)
        before, after = int(starts.max()), int((lengths - starts).max())
        columns = torch.arange(after, device=self.ids.device)
        positions = starts.unsqueeze(1) + columns
        present = positions < lengths.unsqueeze(1)
        positions = positions.clamp(max=self.ids.shape[1] - 1)  # a place that the model has
        ids = self.ids.gather(1, positions) * present
        cached = torch.arange(before, device=self.ids.device) >= (before - starts).unsqueeze(1)
        mask = torch.cat([cached, present], 1).long()
        return replace(self, ids=ids, mask=mask, positions=positions)


def collate(rows: Sequence[Tokens], device: torch.device) -> Batch:
    """Right-pad rows to one batch on `device`."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows], device=device)
    lengths = torch.tensor([[len(row.ids)] for row in rows], device=device)
    positions = torch.arange(width, device=device).expand(len(rows), width)
    return Batch(
        ids,
        (positions < lengths).long(),
        positions,
        torch.tensor([row.owner for row in rows], device=device),
        torch.tensor(
            [-1 if row.subject is None else row.subject[1] for row in rows], device=device
        ),
        torch.tensor([row.prompt - 1 for row in rows], device=device),
        torch.tensor([subject_key(row) for row in rows], device=device),
    )


def subject_key(row: Tokens) -> int:
    """A number that stands for the tokens of a row's subject: the same in every prompt; 0 for none.

    A checksum of 32 bits: two of a thousand subjects share one with a chance of about one in ten
    thousand.
    """
    if row.subject is None:
        return 0
    first, last = row.subject
    return zlib.crc32(repr(row.ids[first : last + 1]).encode())


def batches(rows: Sequence[Tokens], size: int) -> Iterator[list[int]]:
    """Indices of rows in groups of at most `size`, rows of like length together."""
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index].ids), index))
    for start in range(0, len(order), size):
        yield order[start : start + size]
