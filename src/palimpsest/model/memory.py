"""Batches that fit: the number of rows in a forward pass is halved where memory runs out."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch

from palimpsest.errors import RequestError
from palimpsest.model.handle import ModelHandle

_P = ParamSpec("_P")
_R = TypeVar("_R")


def default_rows(device: torch.device) -> int:
    """Rows in a forward pass where the configuration names no number."""
    return 64 if device.type == "cpu" else 512


def within_memory(
    function: Callable[Concatenate[ModelHandle, _P], _R],
) -> Callable[Concatenate[ModelHandle, _P], _R]:
    """Let a function of a model begin anew with half the rows as often as memory runs out.

    The number of rows stays halved, and a run records it: `batch_sizes` in run.json.

    Raises:
        RequestError: not even one row fits.
    """

    @wraps(function)
    def halving(handle: ModelHandle, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        while True:
            try:
                return function(handle, *args, **kwargs)
            except torch.OutOfMemoryError as error:
                _halve(handle, error)

    return halving


def _halve(handle: ModelHandle, error: torch.OutOfMemoryError) -> None:
    if handle.batch_size == 1:
        raise RequestError(
            f"expected {handle.device} to hold one row, found its memory too small; set "
            "model.dtype=bfloat16, model.device_map=auto or model.device=cpu"
        ) from error
    handle.batch_size //= 2
    torch.cuda.empty_cache()
