"""`palimpsest report`: studies as conf/report.yaml lists them, and their report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from palimpsest.cli.configuration import as_request, resource
from palimpsest.cli.conversion import part
from palimpsest.cli.words import Parser, Screen, quoted
from palimpsest.errors import RequestError

if TYPE_CHECKING:
    from palimpsest.study.study import Study


def add_arguments(parser: Parser) -> None:
    """What the command takes."""
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="of the studies: studies.NAME.KEY=VALUE"
    )
    parser.add_argument(
        "--against", metavar="RUN", help="a label or method: differences from it, fact by fact"
    )
    parser.add_argument(
        "--config-dir",
        metavar="DIR",
        type=Path,
        help="studies of your own: +study@studies.NAME=FILE",
    )


def report(
    directory: Path,
    against: str | None = None,
    overrides: Sequence[str] = (),
    config_dir: Path | None = None,
) -> int:
    """Print the tables; write the page, CSV and LaTeX."""
    from palimpsest.report.page import write_report

    console = Screen()
    console.width = max(console.width, 110)  # narrower, the table would lose columns
    page = write_report(directory, studies(against, overrides, config_dir), console)
    console.show(f"report: {page}")
    return 0


def studies(
    against: str | None = None, overrides: Sequence[str] = (), config_dir: Path | None = None
) -> "list[Study]":
    """The studies of conf/report.yaml, and those that overrides add.

    Args:
        against: the label or method of the run that the others are set against.
        overrides: Hydra's, of `studies`.
        config_dir: a directory with configuration of the user's own.

    Raises:
        RequestError: the configuration is wrong.
    """
    from hydra import compose, initialize_config_dir

    words = list(overrides)
    if config_dir is not None:
        if not config_dir.is_dir():
            raise RequestError(
                f"expected a directory in --config-dir, found none at {config_dir}; correct it"
            )
        words.append(f"hydra.searchpath=[{quoted('file://' + str(config_dir.resolve()))}]")
    if against is not None:
        words.append(f"studies.against.run={quoted(against)}")
    try:
        with initialize_config_dir(str(resource("conf")), version_base="1.3"):
            config = compose("report", words)
    except Exception as error:
        raise as_request(error) from error
    return [_made(str(name), node) for name, node in config.studies.items()]


def _made(name: str, node: Any) -> "Study":
    """One study.

    Raises:
        RequestError: its configuration names no class, or not what the class takes.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    try:
        made: Study = instantiate(part(values, f"studies.{name}"), _convert_="all")
    except InstantiationException as error:
        raise error.__cause__ or error from None
    return made
