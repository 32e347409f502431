"""The configuration: where it is, whether it fits the dataclasses, what to say if it does not."""

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

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
    "measure": ("model", "facts", "evaluate", "record", "seed"),
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
    """Hold the whole configuration of a command against the dataclasses.

    Raises:
        RequestError: an unknown key or a value of the wrong type.
    """
    valid = KEYS[command]
    for name in valid:
        if name in OWN and type(config.get(name)) is not OWN[name]:
            raise RequestError(_wrong_type(name, OWN[name], config.get(name)))
    for key in map(str, config):
        if key not in valid:
            raise RequestError(_unknown(key, valid))
    for part in PARTS:
        if part == "evaluate" and part in valid:
            for name in config[part]:
                _check_types(config[part][name], f"{part}.{name}")
        elif part in valid:
            _check_types(config[part], part)
    if "intervene" in valid:
        _check_method(config.intervene)
    return config


def _check_types(node: DictConfig, path: str) -> None:
    """Hold a configuration node against the dataclass that its `_target_` names."""
    target = _target(node, path)
    schema = OmegaConf.structured(target)
    OmegaConf.set_readonly(schema, False)
    OmegaConf.set_struct(schema, False)
    kinds = get_type_hints(target)
    known = {each.name for each in fields(target) if each.init}
    for field in fields(target):
        if field.init and _needed(field) and field.name not in node:
            raise RequestError(
                f"expected {path}.{field.name}, found none; leave it in the configuration"
            )
    for key in node:
        name = str(key)
        if name == "_target_":
            continue
        if name not in known:
            raise RequestError(_unknown(f"{path}.{name}", [f"{path}.{k}" for k in known]))
        value = node[name]
        if isinstance(value, DictConfig) and "_target_" in value:
            _check_types(value, f"{path}.{name}")
            continue
        _check_value(schema, name, value, f"{path}.{name}", kinds[name])


def _needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _target(node: DictConfig, path: str) -> type:
    """The dataclass that a node names."""
    from hydra.utils import get_class

    name = node.get("_target_")
    try:
        found = get_class(str(name))
    except (ImportError, ValueError) as error:
        raise RequestError(
            f"expected {path}._target_ to name a class, found {name!r} "
            f"({' '.join(str(error).split())[:160]}); correct it"
        ) from error
    if not is_dataclass(found):
        raise RequestError(
            f"expected {path}._target_ to name a dataclass, found {name!r}; decorate the class"
        )
    if inspect.isabstract(found):
        raise RequestError(
            f"expected {path}._target_ to name a class that is whole, found {name!r} without "
            f"{min(found.__abstractmethods__)}; write it, or name a class that derives from it"
        )
    return found


def _check_method(node: DictConfig) -> None:
    """Hold the class of the method against what is asked of one."""
    from palimpsest.intervene.method import check_method

    check_method(_target(node, "intervene"), "intervene")


def _check_value(schema: Any, name: str, value: Any, path: str, kind: Any) -> None:
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=True)
    if kind is Any:
        raise RequestError(
            f"expected {path} to be a part with a _target_, found {value!r}; "
            f"leave it as it is, or set {path}._target_"
        )
    try:
        schema[name] = value
    except OmegaConfBaseException as error:
        raise RequestError(_wrong_type(path, kind, value)) from error


def _wrong_type(path: str, kind: Any, value: Any) -> str:
    wanted = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    wanted = wanted.replace("None", "null")
    return f"expected {path} to be {wanted}, found {value!r}; set {path} to such a value"


def as_request(error: Exception) -> Exception:
    """Complaints of Hydra and OmegaConf as a wrong request; any other error as it is."""
    from hydra.errors import HydraException

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
        return _unknown(key[1], _valid_keys())
    if isinstance(error, OverrideParseException):
        cause = text.splitlines()[0]
        return (
            f"expected KEY=VALUE in Hydra's grammar, found {error.override!r} ({cause}); "
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


def _unknown(name: str, valid: Sequence[str]) -> str:
    if name in valid:
        group = name.split(".")[0]
        return (
            f"expected a key of the chosen {group}, found {name!r}, which only another {group} "
            "has; `palimpsest run --cfg job` shows the keys"
        )
    return f"expected a known configuration key, found {name!r}; {nearest(name, valid)}"


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
