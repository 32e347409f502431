"""Noise on the embeddings of subjects (Meng et al. 2022, arXiv 2202.05262, section 2.1)."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from palimpsest.model.calls import Call
from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import Tokens


def spread(handle: ModelHandle) -> float:
    """Standard deviation of the input embeddings, over the vocabulary and dimensions."""
    with torch.no_grad():
        return float(handle.model.get_input_embeddings().weight.float().std())


def draw(handle: ModelHandle, rows: Sequence[Tokens], scale: float, seed: int | str) -> Tensor:
    """Gaussian noise for the subjects of rows, one row an owner.

    A subject's noise depends on the seed and its own tokens alone.

    Args:
        handle: the model.
        rows: one row of each owner, in order; each holds a subject.
        scale: standard deviation.
        seed: of the generators.

    Returns:
        float32 `[owners, longest subject, d_model]`, shorter subjects led by zeros.
    """
    longest = max(len(_subject(row)) for row in rows)
    noise = torch.zeros(len(rows), longest, handle.width)
    for owner, row in enumerate(rows):
        ids = _subject(row)
        digest = hashlib.sha256(f"{seed}/{ids}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        noise[owner, -len(ids) :] = scale * torch.randn(len(ids), handle.width, generator=generator)
    return noise.to(handle.device)


def _subject(row: Tokens) -> tuple[int, ...]:
    if row.subject is None:
        raise ValueError("the prompt holds no subject")
    first, last = row.subject
    return row.ids[first : last + 1]


@contextmanager
def corrupted(handle: ModelHandle, noise: Tensor) -> Iterator[None]:
    """Add each owner's noise to the embeddings of its subject, their last tokens together.

    Rows that nobody owns, or that hold no subject, are left alone.

    Args:
        handle: the model.
        noise: as `draw` gives it.
    """
    width = noise.shape[1]

    def add(embedded: Tensor) -> Tensor:
        batch = handle.running
        if batch is None or isinstance(batch, Call):
            raise RuntimeError("noise needs a batch with subjects: use model.forward")
        place = batch.positions - batch.subject_last.unsqueeze(1) + width - 1
        owned = (batch.owner >= 0) & (batch.subject_last >= 0)
        inside = (place >= 0) & (place < width) & owned.unsqueeze(1)
        chosen = noise[batch.owner.clamp(min=0).unsqueeze(1), place.clamp(0, width - 1)]
        return embedded + (chosen * inside.unsqueeze(-1)).to(embedded)

    with handle.hooked([(handle.model.get_input_embeddings(), add)]):
        yield
