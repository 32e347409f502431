"""Weights that are overwritten or trained for a while, and come back bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from palimpsest.model.handle import ModelHandle


@contextmanager
def borrowed(handle: ModelHandle, weights: Sequence[Tensor], purpose: str) -> Iterator[None]:
    """Let weights be overwritten while the context lasts; afterwards they are as they were.

    Args:
        handle: the model.
        weights: parameters, or views that write through to them.
        purpose: what is done with them; stands among the handle's changes meanwhile, so that
            nothing that is kept of this model is taken for another's.
    """
    saved = [weight.detach().clone() for weight in weights]
    handle.changes.append(purpose)
    try:
        yield
    finally:
        handle.changes.pop()
        with torch.no_grad():
            for weight, before in zip(weights, saved, strict=True):
                weight.copy_(before)


@contextmanager
def trainable(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients reach weights while the context lasts; none is left on them."""
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
