"""Files that are written whole or not at all, and a cache keyed by everything that matters."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
import safetensors
import safetensors.torch
from torch import Tensor

from palimpsest.errors import RequestError


def cache_dir() -> Path:
    """The user's cache directory for Palimpsest; `PALIMPSEST_CACHE` overrides it."""
    override = os.environ.get("PALIMPSEST_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("palimpsest"))


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value in canonical form: sorted keys, no white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on error it vanishes.

    Raises:
        RequestError: the directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise RequestError(
            f"cannot write {path}: {error.strerror or error}; free the disk, change the "
            "directory's permissions or choose another one"
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; keys keep their order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a text's wrong encoding into a wrong request.

    Raises:
        RequestError: what is read inside is not UTF-8.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise RequestError(
            f"expected UTF-8 text in {path}, found {error.reason} at byte {error.start}; "
            "convert the file"
        ) from error


def cached_tensors(
    kind: str, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors computed once per `key` and kept as safetensors in the user's cache.

    The file's name is the fingerprint of the whole key, so that two requests share a file only if
    everything that determines the result is equal.

    Args:
        kind: folder inside the cache, e.g. `"moments"`.
        key: JSON-able description of everything that the result depends on.
        make: computes the tensors when the cache has none.
    """
    path = cache_dir() / kind / f"{fingerprint(dict(key))[:32]}.safetensors"
    with suppress(OSError, safetensors.SafetensorError):  # not there, or damaged: made anew
        return safetensors.torch.load_file(path)
    tensors = {name: tensor.contiguous() for name, tensor in make().items()}
    with atomic(path) as temporary:
        safetensors.torch.save_file(tensors, temporary)
    return tensors
