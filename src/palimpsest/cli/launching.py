"""Grids through Hydra's launchers: planned first, launched once a run, every outcome told."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from palimpsest.cli.configuration import as_request, resource
from palimpsest.cli.signals import stoppable
from palimpsest.cli.words import explained, say
from palimpsest.errors import RequestError, Stopped


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        code: 0 done, 1 the work failed, 2 the request was wrong.
        text: where it is done, or the cause of a failure.
        shown: the user has been told already.
    """

    code: int = 0
    text: str = ""
    shown: bool = False


Work = Callable[[DictConfig], str]
"""One job: from its configuration, a line that says where it is done."""


@dataclass(frozen=True)
class Planned:
    """One job of a grid before it is launched.

    Attributes:
        name: the overrides in which it differs from the others.
        overrides: all that it is given.
        same: what two jobs share if they come to the same run and measures; None if that is not
            known.
        done: the finished run that it asks for; None if there is none.
        wrong: why it cannot be launched; None if it can.
    """

    name: str
    overrides: tuple[str, ...]
    same: Any = None
    done: Path | None = None
    wrong: Outcome | None = None


def perform(work: Work, home: int, config: DictConfig) -> Outcome:
    """Do one job, in whatever process; a failure is its outcome and no exception.

    An exception would be told by each launcher in a way of its own, and by some for one job alone.

    Args:
        work: the job.
        home: the process of the command; a signal that stops it stops all jobs.
        config: the job's configuration.
    """
    try:
        with stoppable():  # a launcher's worker has not passed through `main`
            line = work(config)
    except Stopped as stop:
        if os.getpid() == home:
            raise
        return Outcome(1, f"error: {stop}")
    except Exception as error:
        return Outcome(*explained(as_request(error)))
    shown = "SUBMITIT_EXECUTOR" not in os.environ  # whose jobs write into files
    if shown:
        say(line)
    return Outcome(0, line, shown)


class Grid:
    """A multirun of one command: its jobs planned, and launched by the launcher that is chosen."""

    def __init__(self, command: str, words: Sequence[str]) -> None:
        """Compose what the jobs have in common.

        Args:
            command: `run` or `trace`, the name of the configuration too.
            words: Hydra's flags and overrides.

        Raises:
            RequestError: the configuration is wrong.
        """
        from hydra._internal.hydra import Hydra
        from hydra._internal.utils import create_config_search_path, get_args_parser
        from hydra.core.config_search_path import SearchPathQuery
        from hydra.types import RunMode
        from hydra.version import setbase

        setbase("1.3")
        options = get_args_parser().parse_args(list(words))
        search = create_config_search_path(f"file://{resource('conf')}")
        if options.config_dir is not None:
            own = f"file://{os.path.abspath(options.config_dir)}"
            search.prepend("command-line", own, SearchPathQuery(provider="schema"))
        self._hydra = Hydra.create_main_hydra2(f"palimpsest {command}", search)
        self.config = self._hydra.compose_config(
            config_name=command, overrides=options.overrides, run_mode=RunMode.MULTIRUN
        )
        self.jobs = _product(self._hydra.config_loader, self.config)

    def each(self, overrides: Sequence[str]) -> DictConfig:
        """The whole configuration of one job."""
        loader = self._hydra.config_loader
        config: DictConfig = loader.load_sweep_config(self.config, list(overrides))
        return config

    def plan(self, look: Callable[[DictConfig], tuple[Any, Path | None]]) -> list[Planned]:
        """Every job of the grid.

        Args:
            look: of a job's configuration, what it shares with jobs that come to the same run, and
                the finished run if there is one.
        """
        names = named(self.jobs)
        return [self._planned(n, job, look) for n, job in zip(names, self.jobs, strict=True)]

    def _planned(
        self,
        name: str,
        job: tuple[str, ...],
        look: Callable[[DictConfig], tuple[Any, Path | None]],
    ) -> Planned:
        from hydra.core.hydra_config import HydraConfig

        try:
            config = self.each(job)
            HydraConfig.instance().set_config(config)
            with open_dict(config):
                del config["hydra"]
            same, done = look(config)
        except Exception as error:
            return Planned(name, job, wrong=Outcome(*explained(as_request(error))))
        return Planned(name, job, same, done)

    def launch(self, jobs: Sequence[Planned], work: Work) -> list[Outcome | Exception]:
        """Launch jobs, all by one launcher.

        Returns:
            what became of each; of a job whose process died the launcher's exception.
        """
        from hydra._internal.callbacks import Callbacks
        from hydra.core.plugins import Plugins
        from hydra.types import HydraContext

        context = HydraContext(self._hydra.config_loader, Callbacks(self.config))
        launcher = Plugins.instance().instantiate_launcher(
            context, partial(perform, work, os.getpid()), self.config
        )
        try:
            returned = launcher.launch([job.overrides for job in jobs], initial_job_idx=0)
        except OSError:  # a place that cannot be written
            raise
        except Exception as error:
            return [error for _ in jobs]
        return [_outcome(each) for each in returned]


def _outcome(returned: Any) -> Outcome | Exception:
    try:
        found = returned.return_value
    except Exception as error:
        return error
    return found if isinstance(found, Outcome) else RuntimeError(f"no outcome: {found!r}")


@contextmanager
def grid(command: str, words: Sequence[str]) -> Iterator[Grid]:
    """A grid, and nothing of Hydra's left behind.

    Raises:
        RequestError: as of `Grid`.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    try:
        yield Grid(command, words)
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None


def _product(loader: Any, config: DictConfig) -> list[tuple[str, ...]]:
    """The overrides of every job; the command's door has counted them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(words))  # type: ignore[arg-type]
    choices = {
        key: [f"{key}={value}" for value in _values(override)]
        for override in parsed
        for key in [override.get_key_element()]
    }
    return list(itertools.product(*choices.values()))


def _values(override: Any) -> Iterator[str]:
    if not override.is_sweep_override():
        return iter([override.get_value_element_as_str()])
    if not override.is_discrete_sweep():
        raise RequestError(
            f"expected values or ranges in {override.input_line!r}, found an interval; name the "
            "values, or use a sweeper of Hydra's that draws from intervals"
        )
    found: Iterator[str] = override.sweep_string_iterator()
    return found


def named(jobs: Sequence[tuple[str, ...]]) -> list[str]:
    """By job, the overrides that not all jobs share; of a single job all of them."""
    shared = set.intersection(*(set(job) for job in jobs)) if len(jobs) > 1 else set()
    return [" ".join(word for word in job if word not in shared) or " ".join(job) for job in jobs]
