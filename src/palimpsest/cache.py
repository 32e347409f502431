"""Tensors that are computed once and kept on disk, under a key of all that they depend on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from palimpsest.files import atomic, cache_dir, fingerprint
from palimpsest.locks import announced, held


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
    everything that determines the result is equal. Of several processes or threads that ask for the
    same key at once, one computes and the others wait for it. A damaged file is made anew.

    Args:
        kind: folder inside the cache, e.g. `"moments"`.
        key: JSON-able description of everything that the result depends on.
        make: computes the tensors when the cache has none and can be written.

    Raises:
        RequestError: the cache has none and cannot be written.
        WriteError: there is no room.
    """
    path = _cached(kind, key)
    kept = _kept(path)
    if kept is not None:
        return kept
    with held(path.with_suffix(".lock"), announced(f"computes {kind}")):
        kept = _kept(path)
        return _made(path, make) if kept is None else kept


@contextmanager
def in_one_pass(kind: str, keys: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Let one process at a time compute several entries together; no lock if all are there.

    Without it, a process that waited for the first entry could begin to compute the others, too.

    Args:
        kind: as in `cached_tensors`, which is called inside for each of `keys`.
        keys: in any order.

    Raises:
        RequestError: an entry is missing, and the cache cannot be written.
        WriteError: there is no room.
    """
    if all(is_cached(kind, key) for key in keys):
        yield
        return
    name = fingerprint(sorted(_cached(kind, key).stem for key in keys))[:32]
    with held(cache_dir() / kind / f"{name}.lock", announced(f"computes {kind}")):
        yield


def _kept(path: Path) -> dict[str, Tensor] | None:
    """What the file holds; None if it is not there or damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError):
        return None


def _made(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    tensors = {name: tensor.contiguous() for name, tensor in make().items()}
    with atomic(path) as temporary:
        safetensors.torch.save_file(tensors, temporary)
    return tensors
