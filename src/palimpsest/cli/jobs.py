"""Runs and traces through Hydra: one, or a grid of them."""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from palimpsest.cli.configuration import as_request, check_config, resource
from palimpsest.cli.door import check_count
from palimpsest.cli.grids import run_grid
from palimpsest.cli.launching import Outcome, Work, perform
from palimpsest.cli.words import CONSOLE, complain, say
from palimpsest.errors import RequestError
from palimpsest.record.redact import redacted, without_secrets

if TYPE_CHECKING:
    from palimpsest.evaluate.ruler import Ruler
    from palimpsest.experiment import Experiment
    from palimpsest.tracing import TraceExperiment


def run(words: Sequence[str], source: str | None = None) -> int:
    """`palimpsest run`.

    Args:
        words: Hydra's flags and overrides.
        source: the sweep file that they come from; the sweep's manifest then names its jobs.
    """
    return _hand_over("run", _run, experiment_of, words, source)


def trace(words: Sequence[str]) -> int:
    """`palimpsest trace`."""
    return _hand_over("trace", _trace, _tracing_of, words, None)


def _hand_over(name: str, work: Any, of: Any, words: Sequence[str], source: str | None) -> int:
    """Hand over to Hydra; its errors come back as one line with the nearest valid names."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    words, many = _flags_first(name, words)
    check_count(words)
    command = without_secrets(shlex.join(["palimpsest", name, *words]))
    before = sys.argv
    sys.argv = [f"palimpsest {name}", *words]
    try:
        if many:
            tasks = partial(work, command=command), partial(of, command=command)
            return run_grid(name, words, *tasks, source)
        return _one(name, partial(work, command=command))
    except OSError as error:
        raise _unwritable(error) from error
    except Exception as error:
        raise as_request(error) from error
    finally:
        sys.argv = before


def _one(name: str, work: Work) -> int:
    """One job, or what one of Hydra's own flags shows."""
    import hydra

    found: list[Outcome] = []

    @hydra.main(version_base="1.3", config_path=str(resource("conf")), config_name=name)
    def job(config: DictConfig) -> None:
        found.append(perform(work, os.getpid(), config))

    job()
    for outcome in found:
        if not outcome.shown:
            say(outcome.text)
    return max((outcome.code for outcome in found), default=0)


def _flags_first(name: str, words: Sequence[str]) -> tuple[list[str], bool]:
    """Hydra's flags, then the overrides, as its parser wants them; and whether it is a grid.

    A grid for one of Hydra's other sweepers is left to Hydra.

    Raises:
        RequestError: an unknown flag, or an override that is not KEY=VALUE.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = partial(complain, f"palimpsest {name}")  # type: ignore[method-assign]
    options = parser.parse_intermixed_args(list(words))
    overrides: list[str] = options.overrides
    for word in overrides:
        if not re.match(r"~|\+{0,2}[^=\s+~]+=", word):
            raise RequestError(
                f"expected KEY=VALUE, found {word!r}; see `palimpsest {name} --help`"
            )
    shown = options.cfg or options.info or options.hydra_help or options.shell_completion
    own = any(word.lstrip("+").startswith("hydra/sweeper=") for word in overrides)
    ordered = [word for word in words if word not in overrides] + overrides
    return ordered, bool(options.multirun and not shown and not own)


def _unwritable(error: OSError) -> Exception:
    """What stands in the way of a multirun's directory, in one line."""
    from palimpsest.files import cannot_write

    place = error.filename and Path(error.filename)
    return (cannot_write(place, error) if place else None) or as_request(error)


def experiment_of(config: DictConfig, command: str) -> "Experiment":
    """The experiment that a job's configuration asks for; no model is loaded.

    Raises:
        RequestError: the configuration is wrong.
    """
    from hydra.core.hydra_config import HydraConfig

    config = check_config(config)
    hydra = HydraConfig.get()
    _quiet()
    from palimpsest.experiment import Experiment

    parts = parts_of(config)
    return Experiment(
        parts["model"],
        parts["facts"],
        parts["locate"],
        parts["intervene"],
        ruler_of(parts),
        parts["record"],
        parts["seed"],
        {"intervene": _method(hydra), "facts": hydra.runtime.choices["facts"]},
        resolved(config),
        command,
    )


def _run(config: DictConfig, command: str) -> str:
    """One run: build the parts, run; a line that says where the results are."""
    experiment = experiment_of(config, command)
    from palimpsest.experiment import run

    name = experiment.names["intervene"]
    with phases(name, 6) as phase:
        return _line(name, *run(experiment, phase, say))


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


def _tracing_of(config: DictConfig, command: str) -> "TraceExperiment":
    """The trace that a job's configuration asks for."""
    from hydra.core.hydra_config import HydraConfig

    config = check_config(config, "trace")
    choices = HydraConfig.get().runtime.choices
    _quiet()
    from palimpsest.tracing import TraceExperiment

    parts = parts_of(config)
    return TraceExperiment(
        parts["model"],
        parts["facts"],
        parts["tracing"],
        parts["record"],
        parts["split"],
        parts["seed"],
        {"facts": choices["facts"]},
        resolved(config),
        command,
    )


def _trace(config: DictConfig, command: str) -> str:
    """One trace; a line that says where the results are."""
    experiment = _tracing_of(config, command)
    from palimpsest.tracing import trace

    with phases("trace", 3) as phase:
        return _line("trace", *trace(experiment, phase, say))


def ruler_of(parts: Any) -> "Ruler":
    """The ruler that the group `evaluate` is made of: its measures by name, in their order."""
    from palimpsest.evaluate.ruler import Ruler

    return Ruler(dict(parts["evaluate"]))


def resolved(config: DictConfig) -> Any:
    """The whole configuration as plain values, without secrets."""
    return redacted(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def _line(name: str, directory: Path, before: bool) -> str:
    return f"{name}: {'done before, left as it is' if before else 'done'}: {directory}"


def parts_of(config: DictConfig) -> Any:
    """Every part, made by its `_target_`; what a part's constructor raises is raised as it is."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        raise error.__cause__ or error from None


def composed(words: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """The configuration that a run with these overrides would have.

    Args:
        words: overrides.
        config_dir: further configuration of the user's own.

    Raises:
        RequestError: the configuration is wrong.
    """
    from hydra import compose, initialize_config_dir

    own = [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    try:
        with initialize_config_dir(str(resource("conf")), version_base="1.3"):
            return check_config(compose("run", [*own, *words]))
    except Exception as error:
        raise as_request(error) from error


def compose_parts(words: Sequence[str]) -> Any:
    """The parts that a run with these overrides would be made of.

    Raises:
        RequestError: the configuration is wrong.
    """
    config = composed(words)
    _quiet()
    return parts_of(config)


@contextmanager
def phases(name: str, count: int) -> Iterator[Any]:
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
