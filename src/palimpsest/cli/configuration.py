"""The configuration: where it is, whether it fits the dataclasses, what to say if it does not."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from palimpsest.cli.conversion import convert, part, target, unknown
from palimpsest.errors import RequestError, nearest

ROOT = Path(__file__).resolve().parents[3]

OWN: dict[str, type] = {
    "seed": int,
    "protocol": str,
    "objective": str,
    "contexts": int,
    "split": str,
}
"""Keys beside the parts, and their types."""

PARTS = ("model", "facts", "locate", "tracing", "intervene", "evaluate", "record")
"""One part each, of a class that its configuration names."""

KEYS = {
    "run": (
        *("model", "facts", "locate", "intervene", "evaluate", "record"),
        *("seed", "protocol", "objective", "contexts"),
    ),
    "trace": ("model", "facts", "tracing", "record", "seed", "split"),
    "measure": ("model", "facts", "intervene", "evaluate", "record", "seed"),
}
"""What the configuration of each command is made of."""

_NO_CHOICE = "Config group override must be a string"


def resource(name: str) -> Path:
    """The directory `conf` or `sweeps`: beside the source in a checkout, else in the package."""
    checkout = ROOT / name
    if (ROOT / "pyproject.toml").is_file() and checkout.is_dir():
        return checkout
    return Path(__file__).parents[1] / name


def check_config(config: DictConfig, command: str = "run") -> DictConfig:
    """The whole configuration of a command, every value as the dataclasses declare it.

    Returns:
        what the parts are made from, without interpolations.

    Raises:
        RequestError: an unknown key or a value of the wrong type.
    """
    valid = KEYS[command]
    own = {name: convert(OWN[name], config.get(name), name) for name in valid if name in OWN}
    for key in map(str, config):
        if key not in valid:
            raise RequestError(unknown(key, valid))
    parts = {name: _part(config, name) for name in PARTS if name in valid}
    if "intervene" in parts:
        _check_method(parts["intervene"])
    return _plain({**parts, **own})


def check_part(config: DictConfig, name: str) -> DictConfig:
    """One part's configuration, every value as its dataclass declares it.

    Raises:
        RequestError: an unknown key or a value of the wrong type.
    """
    return _plain(_part(config, name))


def _part(config: DictConfig, name: str) -> dict[str, Any]:
    node = config[name]
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    if name == "evaluate" and isinstance(node, dict):
        return {str(key): part(measure, f"{name}.{key}") for key, measure in node.items()}
    return part(node, name)


def _check_method(node: dict[str, Any]) -> None:
    """Hold the class of the method against what is asked of one."""
    from palimpsest.intervene.method import check_method

    check_method(target(node, "intervene"), "intervene")


def _plain(values: dict[str, Any]) -> DictConfig:
    """A configuration of these very values: no text in it is an interpolation."""
    return DictConfig(_escaped(values))


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value


def as_request(error: Exception) -> Exception:
    """Complaints of Hydra and OmegaConf as a wrong request; any other error as it is."""
    from hydra.errors import HydraException

    if isinstance(error, yaml.YAMLError):
        cause = " ".join(str(error).split())[:300]
        return RequestError(f"expected YAML in a configuration file, found {cause}; mend it")
    if isinstance(error, HydraException | OmegaConfBaseException) or _NO_CHOICE in str(error):
        return RequestError(_explained(error))
    return error


def _explained(error: Exception) -> str:
    """Hydra's complaint in one line, with the nearest valid names."""
    from hydra.errors import OverrideParseException

    text = str(error)
    option = re.search(r"Could not find '([^/']+)/([^']*)'", text)
    if option:
        valid = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return _unknown_choice(option[1], option[2], valid)
    key = re.search(r"Could not override '([^']+)'", text)
    if key and key[1].startswith("intervene@"):
        return (
            "expected intervene@intervene.first or intervene@intervene.then, the parts of a pair "
            f"(intervene=erase_then_edit or edit_then_erase), found {key[1]!r}; choose a pair too"
        )
    if key:
        return unknown(key[1], _valid_keys())
    if isinstance(error, OverrideParseException):
        cause, found = text.splitlines()[0][:200], str(error.override)[:80]
        return (
            f"expected KEY=VALUE in Hydra's grammar, found {found!r} ({cause}); "
            "quote the value, or close its brackets"
        )
    if text.startswith("Ambiguous value"):
        return (
            f"expected one value, found several in {text.splitlines()[0].split(chr(39))[1]!r}; "
            "write `palimpsest run -m` to run each, or [a,b] for a list"
        )
    if _NO_CHOICE in text:
        return "expected the name of an option for each group, found null; name one, or leave it"
    return (
        f"expected a valid configuration, found: {' '.join(text.split())}; "
        "see `palimpsest run --help`"
    )


def _unknown_choice(group: str, found: str, valid: Sequence[str]) -> str:
    hint = ", or set model.path=DIR" if group == "model" else ""
    return (
        f"expected {group} to be one of {', '.join(valid)}, found {found!r}; "
        f"{nearest(found, valid)}{hint}"
    )


def _valid_keys() -> list[str]:
    """Every key that any configuration file holds, dotted, and the groups themselves."""
    keys = set(OWN)
    for path in resource("conf").glob("*/**/*.yaml"):
        group = path.relative_to(resource("conf")).parts[0]
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for prefix in _prefixes(group, path):
            keys |= {prefix, *_dotted(content, prefix)}
    return sorted(keys)


def _prefixes(group: str, path: Path) -> tuple[str, ...]:
    """Where a file's keys stand; what has the name of a part also stands for itself."""
    if path.parent.name == "shared" and path.stem in PARTS:
        return path.stem, f"{group}.{path.stem}"
    return (group,)


def _dotted(node: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in node.items():
        if key not in ("_target_", "defaults"):
            yield f"{prefix}.{key}"
            if isinstance(value, dict):
                yield from _dotted(value, f"{prefix}.{key}")
