"""wandb sweep files as Hydra multiruns."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from palimpsest.cli.configuration import check_part, resource
from palimpsest.cli.words import quoted
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
        RequestError: no such file, no YAML, not a grid, or no parameters.
    """
    ours = resource("sweeps") / file.name
    if not file.exists() and file.parent in (Path(), Path("sweeps")) and ours.exists():
        file = ours
    try:
        sweep = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(
            f"expected a sweep file, found none at {file}; those that come with Palimpsest are in "
            f"{resource('sweeps')}"
        ) from error
    except yaml.YAMLError as error:
        raise RequestError(
            f"expected YAML in {file}, found {' '.join(str(error).split())}; mend it"
        ) from error
    parameters = sweep.get("parameters") if isinstance(sweep, dict) else None
    if not parameters or not isinstance(parameters, dict) or sweep.get("method") != "grid":
        raise RequestError(
            f"expected a wandb sweep with 'method: grid' and 'parameters' in {file}, found "
            f"{textwrap.shorten(str(sweep), 80)}; see {resource('sweeps') / 'quickstart.yaml'}"
        )
    parameters = {"record.sweep": {"value": file.stem}, **parameters}
    return [f"{name}={_values(name, entry, file)}" for name, entry in parameters.items()]


def _values(name: str, entry: Any, file: Path) -> str:
    values = entry.get("values") if isinstance(entry, dict) else None
    if values and isinstance(values, list):
        return ",".join(_word(value) for value in values)
    if isinstance(entry, dict) and "value" in entry:
        return _word(entry["value"])
    raise RequestError(
        f"expected 'value' or 'values' under parameters.{name} in {file}, found {entry!r}; "
        "a grid has no distributions"
    )


def _word(value: Any) -> str:
    """A YAML value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_word, value)) + "]"
    if isinstance(value, str):
        return _spelt(value)
    return "null" if value is None else str(value)


def _spelt(text: str) -> str:
    """A text that Hydra reads as this very text: in quotes, unless it is a plain name."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in ("nan", "inf")
    if plain and isinstance(yaml.safe_load(text), str):
        return text
    return quoted(text)
