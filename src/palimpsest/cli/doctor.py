"""`palimpsest doctor`: whether this machine is fit to run, and what to do where it is not."""

import importlib.metadata
import platform
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from palimpsest import __version__
from palimpsest.errors import RequestError

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo

NAME = "palimpsest-lm"
"""The distribution whose requirements are checked."""

LEAST_FREE = 2 * 2**30
"""Bytes of free disk below which there is a warning."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        ok: nothing is wrong here.
        text: what was found and, where it helps, what to do.
    """

    ok: bool
    text: str

    def __str__(self) -> str:
        """The line as it is printed."""
        return f"{'ok' if self.ok else '! '} {self.text}"


def examine() -> Iterator[Finding]:
    """Look at everything in turn; a look that fails is a finding itself."""
    for look in (
        _python,
        _packages,
        _extras,
        _device,
        _hub,
        _models,
        _hub_models,
        _cache,
        _disk,
        _places,
        _tracking,
    ):
        yield from _guarded(look)


def _guarded(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    from palimpsest.record.redact import one_line

    name = look.__name__.strip("_")
    try:
        yield from look()
    except ImportError as error:
        yield Finding(False, f"{name}: {one_line(error)}; install it with pip")
    except OSError as error:
        place = error.filename or "a file"
        yield Finding(
            False, f"{name}: cannot read {place}: {error.strerror}; change its permissions"
        )
    except RequestError as error:
        yield Finding(False, f"{name}: {one_line(str(error))}")


# --- software -------------------------------------------------------------------------------------


def _wanted() -> tuple[str, list[str]]:
    """The range of Python and the requirements: of the installed package, else of the checkout.

    Raises:
        RequestError: there is neither.
    """
    from palimpsest.cli.configuration import ROOT

    try:
        about = importlib.metadata.metadata(NAME)
        return about["Requires-Python"] or "", importlib.metadata.requires(NAME) or []
    except importlib.metadata.PackageNotFoundError:
        file = ROOT / "pyproject.toml"
    if not file.is_file():
        raise RequestError(
            f"expected {NAME} to be installed, found neither it nor a checkout; "
            "`pip install -e .` in one"
        )
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    return project["requires-python"], project["dependencies"]


def _python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    wanted, found = _wanted()[0], platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        yield Finding(True, f"palimpsest {__version__} on Python {found}")
    else:
        yield Finding(
            False, f"python: expected {wanted}, found {found}; make an environment with another one"
        )


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, _wanted()[1]):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version and requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version}")
            continue
        yield Finding(
            False,
            f"package {requirement.name}: expected {requirement.specifier}, found "
            f"{version or 'none'}; `pip install '{requirement}'`",
        )
    yield Finding(True, f"packages within their ranges: {', '.join(found)}")


def _extras() -> Iterator[Finding]:
    """What only some methods and launchers need; no fault if it is not there."""
    names = ("peft", "hydra-joblib-launcher", "hydra-submitit-launcher")
    found = [f"{name} {_version(name) or 'not installed'}" for name in names]
    yield Finding(True, f"optional packages: {', '.join(found)}")


def _hub() -> Iterator[Finding]:
    """Whether gated models, such as Llama's, could be fetched."""
    from huggingface_hub import get_token

    logged_in = "a token is set" if get_token() else "no token; `hf auth login` for gated models"
    yield Finding(True, f"model hub: {logged_in}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> Iterator[Finding]:
    import torch

    from palimpsest.record.provenance import device_name

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    yield Finding(True, f"devices: {', '.join(map(device_name, devices))}")


# --- files ----------------------------------------------------------------------------------------


def _models() -> Iterator[Finding]:
    from palimpsest.model.fetch import CATALOGUE, find

    for name in CATALOGUE:
        path = find(name)
        if path is None:
            yield Finding(False, f"model {name}: not in the cache; `palimpsest fetch {name}`")
        else:
            yield Finding(True, f"model {name}: in the cache, {_words(_size(path))}")


def _hub_models() -> Iterator[Finding]:
    """What lies in the hub's cache with weights that can be loaded; no fault if nothing does."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    home = Path(constants.HF_HUB_CACHE)
    try:
        repos = scan_cache_dir(home).repos
    except (CacheNotFound, ValueError):  # nothing fetched yet, or a file in its place
        repos = frozenset()
    found = [f"{repo.repo_id} {_words(repo.size_on_disk)}" for repo in repos if _is_model(repo)]
    listed = ", ".join(sorted(found)) or "none; model.path=OWNER/NAME fetches one"
    yield Finding(True, f"models in the hub's cache {home}: {listed}")


def _is_model(repo: "CachedRepoInfo") -> bool:
    """Whether a repository's files in the cache are those of a model, with weights."""
    files = [file.file_name for revision in repo.revisions for file in revision.files]
    return repo.repo_type == "model" and any(name.endswith(".safetensors") for name in files)


def _cache() -> Iterator[Finding]:
    from palimpsest.files import cache_dir

    home = cache_dir()
    if not home.exists():
        yield Finding(True, f"cache: {home}, empty; PALIMPSEST_CACHE names another directory")
        return
    sizes = {path.name: _size(path) for path in sorted(home.iterdir()) if path.is_dir()}
    kinds = ", ".join(f"{name} {_words(size)}" for name, size in sizes.items())
    yield Finding(
        True,
        f"cache: {home}, {_words(sum(sizes.values()))} ({kinds or 'empty'}); to clear it, delete "
        "it or a folder in it: what is missing is computed or fetched again",
    )


def _disk() -> Iterator[Finding]:
    from palimpsest.files import cache_dir

    for name, path in (("results", Path("results")), ("the cache", cache_dir())):
        free = shutil.disk_usage(_nearest(path)).free
        text = f"disk: {_words(free)} free for {name}"
        if free >= LEAST_FREE:
            yield Finding(True, text)
        else:
            yield Finding(
                False, f"{text}, expected {_words(LEAST_FREE)}; free the disk or use another one"
            )


def _places() -> Iterator[Finding]:
    from palimpsest.files import cache_dir

    yield _writable(Path("results"), "record.dir=")
    yield _writable(cache_dir(), "PALIMPSEST_CACHE=")


def _writable(path: Path, other: str) -> Finding:
    """Whether files can be made in a directory, or in the one in which it would be made."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(path)):
            return Finding(True, f"can write to {path}")
    except OSError as error:
        return Finding(
            False,
            f"cannot write to {path}: {error.strerror or error}; change its permissions, move away "
            f"what is there, or choose another place with {other}",
        )


def _nearest(path: Path) -> Path:
    """The path itself or the nearest directory above that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _size(path: Path) -> int:
    """Bytes of all files in a directory."""
    files = (file for file in path.rglob("*") if not file.is_symlink() and file.is_file())
    return sum(file.stat().st_size for file in files)


def _words(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


# --- tracking -------------------------------------------------------------------------------------


def _tracking() -> Iterator[Finding]:
    from palimpsest.track.wandb import Tracker

    advice = {
        "online": "WANDB_MODE=offline keeps runs on this machine",
        "offline": "`wandb login` or WANDB_API_KEY makes it online",
        "disabled": "unset WANDB_MODE to track runs",
    }
    mode = Tracker().resolved_mode()
    yield Finding(True, f"wandb: {mode}; {advice[mode]}")
