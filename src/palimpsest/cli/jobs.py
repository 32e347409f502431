"""Runs through Hydra: one, or a grid of them."""

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from palimpsest.cli.configuration import as_request, check_config, resource
from palimpsest.cli.signals import stoppable
from palimpsest.cli.words import CONSOLE, complain, say, tell
from palimpsest.errors import RequestError
from palimpsest.record.redact import redacted, without_secrets

Job = Callable[[DictConfig, str], None]
"""One job of Hydra's: its configuration, and the command line for the record."""


def run(words: Sequence[str]) -> int:
    """`palimpsest run`."""
    return _hand_over("run", _run, words)


def trace(words: Sequence[str]) -> int:
    """`palimpsest trace`."""
    return _hand_over("trace", _trace, words)


def _hand_over(name: str, work: Job, words: Sequence[str]) -> int:
    """Hand over to Hydra; its errors come back as one line with the nearest valid names."""
    import hydra

    os.environ["HYDRA_FULL_ERROR"] = "1"
    words = _flags_first(name, words)
    command = without_secrets(shlex.join(["palimpsest", name, *words]))
    here = os.getpid()
    failures: list[Exception] = []

    @hydra.main(version_base="1.3", config_path=str(resource("conf")), config_name=name)
    def job(config: DictConfig) -> None:
        try:
            with stoppable():  # a launcher's worker has not passed through `main`
                work(config, command)
        except Exception as error:
            if os.getpid() != here:  # another process: only an exception tells the launcher
                raise
            failures.append(as_request(error))

    before = sys.argv
    sys.argv = [f"palimpsest {name}", *words]
    try:
        with _scratch(words):
            job()
    except OSError as error:
        raise _unwritable(error) from error
    except Exception as error:
        raise as_request(error) from error
    finally:
        sys.argv = before
    return _outcome(failures)


def _outcome(failures: Sequence[Exception]) -> int:
    """Tell every failure; the exit code is 2 only if all requests were wrong."""
    codes = [tell(error) for error in failures]
    return min(codes, default=0)


def _flags_first(name: str, words: Sequence[str]) -> list[str]:
    """Hydra's flags, then the overrides; its parser takes them in no other order.

    Raises:
        RequestError: an unknown flag, or an override that is not KEY=VALUE.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = partial(complain, f"palimpsest {name}")  # type: ignore[method-assign]
    overrides: list[str] = parser.parse_intermixed_args(list(words)).overrides
    for word in overrides:
        if not re.match(r"~|\+{0,2}[^=\s+~]+=", word):
            raise RequestError(
                f"expected KEY=VALUE, found {word!r}; see `palimpsest {name} --help`"
            )
    return [word for word in words if word not in overrides] + overrides


@contextmanager
def _scratch(words: Sequence[str]) -> Iterator[None]:
    """A directory, gone afterwards, for the file that Hydra leaves of every multirun.

    Submitit's jobs read theirs on other machines: it stays, in the working directory.
    """
    if "PALIMPSEST_SCRATCH" in os.environ or any("submitit" in word for word in words):
        yield
        return
    with tempfile.TemporaryDirectory() as directory:
        os.environ["PALIMPSEST_SCRATCH"] = directory
        try:
            yield
        finally:
            del os.environ["PALIMPSEST_SCRATCH"]


def _unwritable(error: OSError) -> Exception:
    """What stands in the way of a multirun's directory, in one line."""
    from palimpsest.files import cannot_write

    place = error.filename and Path(error.filename)
    return (cannot_write(place, error) if place else None) or as_request(error)


def _run(config: DictConfig, command: str) -> None:
    """One run: check the types, build the parts, run, say where the results are."""
    from hydra.core.hydra_config import HydraConfig

    check_config(config)
    hydra = HydraConfig.get()
    choices, name = hydra.runtime.choices, _method(hydra)
    _quiet()
    from palimpsest.experiment import Experiment, run

    parts = _parts(config)
    experiment = Experiment(
        parts["model"],
        parts["facts"],
        parts["locate"],
        parts["intervene"],
        parts["evaluate"],
        parts["record"],
        parts["seed"],
        {"intervene": name, "facts": choices["facts"]},
        _resolved(config),
        command,
    )
    with _phases(name, 6) as phase:
        _tell(name, *run(experiment, phase))


def _method(hydra: Any) -> str:
    """The chosen method, and of a pair the parts that are not those of its own configuration."""
    from hydra import compose

    name, lead = str(hydra.runtime.choices["intervene"]), "intervene@intervene."
    if not any(word.lstrip("+").startswith(lead) for word in hydra.overrides.task):
        return name
    plain = compose("run", [f"intervene={name}"], return_hydra_config=True).hydra.runtime.choices
    parts = [
        f"{key.removeprefix(lead)}={choice}"
        for key, choice in sorted(hydra.runtime.choices.items())
        if key.startswith(lead) and plain.get(key) != choice
    ]
    return f"{name}({', '.join(parts)})" if parts else name


def _trace(config: DictConfig, command: str) -> None:
    """The same for one trace."""
    from hydra.core.hydra_config import HydraConfig

    check_config(config, "trace")
    choices = HydraConfig.get().runtime.choices
    _quiet()
    from palimpsest.tracing import TraceExperiment, trace

    parts = _parts(config)
    experiment = TraceExperiment(
        parts["model"],
        parts["facts"],
        parts["tracing"],
        parts["record"],
        parts["split"],
        parts["seed"],
        {"facts": choices["facts"]},
        _resolved(config),
        command,
    )
    with _phases("trace", 3) as phase:
        _tell("trace", *trace(experiment, phase))


def _resolved(config: DictConfig) -> Any:
    return redacted(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def _tell(name: str, directory: Path, before: bool) -> None:
    say(f"{name}: {'done before, left as it is' if before else 'done'}: {directory}")


def _parts(config: DictConfig) -> Any:
    """Every part, made by its `_target_`; what a part's constructor raises is raised as it is."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        raise error.__cause__ or error from None


def compose_parts(words: Sequence[str]) -> Any:
    """The parts that a run with these overrides would be made of.

    Raises:
        RequestError: the configuration is wrong.
    """
    from hydra import compose, initialize_config_dir

    try:
        with initialize_config_dir(str(resource("conf")), version_base="1.3"):
            config = compose("run", list(words))
        check_config(config)
    except Exception as error:
        raise as_request(error) from error
    _quiet()
    return _parts(config)


@contextmanager
def _phases(name: str, count: int) -> Iterator[Any]:
    """A function that shows which phase of a run is under way, on a bar."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=CONSOLE,
        transient=True,
        disable=not CONSOLE.is_terminal,
    )
    with bar:
        task = bar.add_task(name, total=count)

        @contextmanager
        def phase(what: str) -> Iterator[None]:
            bar.update(task, description=f"{name}: {what}")
            yield
            bar.advance(task)

        yield phase


def _quiet() -> None:
    """Keep libraries' progress bars and notices out of the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
