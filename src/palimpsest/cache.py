"""Tensors that are computed once and kept on disk, under a key of all that they depend on."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from palimpsest.files import atomic, cache_dir, fingerprint, temporary_beside, writing


def is_cached(kind: str, key: Mapping[str, Any]) -> bool:
    """Whether `cached_tensors` has a file for a key."""
    return _cached(kind, key).exists()


def _cached(kind: str, key: Mapping[str, Any]) -> Path:
    return cache_dir() / kind / f"{fingerprint(dict(key))[:32]}.safetensors"


def cached_tensors(
    kind: str, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors computed once per `key` and kept as safetensors in the user's cache.

    The file's name is the fingerprint of the whole key, so that two requests share a file only if
    everything that determines the result is equal.

    Args:
        kind: folder inside the cache, e.g. `"moments"`.
        key: JSON-able description of everything that the result depends on.
        make: computes the tensors when the cache has none and can be written.

    Raises:
        RequestError: the cache has none and cannot be written.
        WriteError: there is no room.
    """
    path = _cached(kind, key)
    with suppress(OSError, safetensors.SafetensorError):  # not there, or damaged: made anew
        return safetensors.torch.load_file(path)
    with writing(path):
        temporary_beside(path).unlink()  # told before the work is done
    tensors = {name: tensor.contiguous() for name, tensor in make().items()}
    with atomic(path) as temporary:
        safetensors.torch.save_file(tensors, temporary)
    return tensors
