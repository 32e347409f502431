"""wandb sweep files as Hydra multiruns."""

import re
import textwrap
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from palimpsest.cli.configuration import check_part, resource
from palimpsest.cli.documents import read_document
from palimpsest.cli.door import in_grammar, refuse_credentials, refuse_many
from palimpsest.errors import RequestError


def results_directory(words: Sequence[str], name: str = "run") -> Path:
    """Where the runs of a command stand: composed from its overrides of `record`."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        config = compose(name, [word for word in words if re.match(r"[+~]*record\b", word)])
    return Path(instantiate(check_part(config, "record")).directory)


def sweep_overrides(file: Path) -> list[str]:
    """A wandb sweep file's grid as Hydra overrides; `record.sweep` is the file's name unless given.

    A file that is not there is looked for among the sweeps that come with Palimpsest.

    Raises:
        RequestError: no such file, no YAML, not a grid, no parameters, a credential among them, or
            too many jobs.
    """
    ours = resource("sweeps") / file.name
    if not file.exists() and file.parent in (Path(), Path("sweeps")) and ours.exists():
        file = ours
    try:
        sweep = read_document(file)
    except OSError as error:
        raise RequestError(
            f"expected a sweep file, found none at {file}; those that come with Palimpsest are in "
            f"{resource('sweeps')}"
        ) from error
    parameters = sweep.get("parameters") if isinstance(sweep, dict) else None
    if not parameters or not isinstance(parameters, dict) or sweep.get("method") != "grid":
        raise RequestError(
            f"expected a wandb sweep with 'method: grid' and 'parameters' in {file}, found "
            f"{textwrap.shorten(str(sweep), 80)}; see {resource('sweeps') / 'quickstart.yaml'}"
        )
    refuse_credentials([f"{name}={entry}" for name, entry in parameters.items()], f"{file}")
    options = {str(name): _options(str(name), entry, file) for name, entry in parameters.items()}
    refuse_many(prod(map(len, options.values())), f"{file}")
    options = {"record.sweep": [file.stem]} | options
    return [f"{name}={','.join(map(in_grammar, values))}" for name, values in options.items()]


def _options(name: str, entry: Any, file: Path) -> list[Any]:
    """The values that a parameter takes, one after another."""
    if not re.fullmatch(r"[^-\s=][^\s=]*", name):
        raise RequestError(
            f"expected the name of a setting under parameters in {file}, found {name!r}; see "
            "`palimpsest run --cfg job`"
        )
    values = entry.get("values") if isinstance(entry, dict) else None
    if values and isinstance(values, list):
        return values
    if isinstance(entry, dict) and "value" in entry:
        return [entry["value"]]
    raise RequestError(
        f"expected 'value' or 'values' under parameters.{name} in {file}, found "
        f"{repr(entry)[:80]}; a grid has no distributions"
    )
