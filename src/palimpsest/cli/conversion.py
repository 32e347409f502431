"""Configured values, converted to the types that the dataclasses declare."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from palimpsest.errors import RequestError, nearest

_YES = ("true", "yes", "y", "on", "1")
_NO = ("false", "no", "n", "off", "0")
_EXACT = 2**53
"""Up to here every whole number is a float of its own."""


def part(node: Any, path: str) -> dict[str, Any]:
    """A part's configuration with every value as the dataclass that `_target_` names declares it.

    Args:
        node: the part's keys and values, interpolations resolved.
        path: where it stands, for messages.

    Raises:
        RequestError: no such class, an unknown key, a missing one, or a value of the wrong type.
    """
    if not isinstance(node, Mapping):
        raise RequestError(_no_part(path, node))
    kind = target(node, path)
    known = {field.name: field for field in fields(kind) if field.init}
    for name, field in known.items():
        if _needed(field) and name not in node:
            raise RequestError(f"expected {path}.{name}, found none; leave it in the configuration")
    kinds = get_type_hints(kind)
    found: dict[str, Any] = {"_target_": node["_target_"]}
    for name in (str(key) for key in node if key != "_target_"):
        if name not in known:
            raise RequestError(unknown(f"{path}.{name}", [f"{path}.{key}" for key in known]))
        found[name] = _field(kinds[name], node[name], f"{path}.{name}")
    return found


def target(node: Mapping[Any, Any], path: str) -> type:
    """The dataclass that a node names.

    Raises:
        RequestError: there is no such class, it is no dataclass, or it is abstract.
    """
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


def _needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _field(kind: Any, value: Any, path: str) -> Any:
    if kind is Any and not _is_part(value):
        raise RequestError(_no_part(path, value))
    return convert(kind, value, path)


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def convert(kind: Any, value: Any, path: str) -> Any:
    """A value as the declared type.

    Truth values are also written yes, no, on, off, 1 and 0; numbers also as text; a whole number
    also as a float without a fraction. A whole number for a text becomes its digits. Fractions and
    truth values for a text are refused: how they were written is not known any more. Where null is
    allowed, the text `None` is null too: so wandb's agents write it.

    Args:
        kind: bool, int, float, str, a list, a mapping, a class of parts, or a union of these.
        value: as composed.
        path: where it stands, for messages.

    Raises:
        RequestError: it is no such value.
    """
    if kind in _SCALARS:
        return _scalar(kind, value, path)
    if kind is Any:
        return _free(value, path)
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(kind, value, path)
    if origin is Literal:
        return _literal(kind, value, path)
    if origin in (list, tuple, Sequence):
        return _list(kind, value, path)
    if origin in (dict, Mapping):
        return _mapping(kind, inner or (Any, Any), value, path)
    if _is_part(value):
        return part(value, path)
    raise RequestError(_no_part(path, value))


def _scalar(kind: Any, value: Any, path: str) -> Any:
    try:
        return _SCALARS[kind](value)
    except (ValueError, OverflowError) as error:
        raise RequestError(wrong_type(path, kind, value)) from error


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower() if isinstance(value, str | int) else ""
    if text not in _YES + _NO:
        raise ValueError("no truth value")
    return text in _YES


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, str):
            return int(value)
    except ValueError:
        pass
    number = _number(value)
    if number.is_integer() and abs(number) <= _EXACT:
        return int(number)
    raise ValueError("no whole number")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("no number")
    return float(value) + 0.0  # of the two zeros the positive one


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("no text")
    return str(value)


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: _truth,
    int: _whole,
    float: _number,
    str: _text,
}


def _free(value: Any, path: str) -> Any:
    """What is declared as anything: parts in it are converted, the rest stays."""
    if _is_part(value):
        return part(value, path)
    if isinstance(value, Mapping):
        return {key: _free(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_free(item, f"{path}[{place}]") for place, item in enumerate(value)]
    return value


def _one_of(kind: Any, value: Any, path: str) -> Any:
    """A union: the value's own type if it is among them, else the first that it converts to."""
    kinds = [each for each in get_args(kind) if each is not NoneType]
    if len(kinds) < len(get_args(kind)) and (value is None or value == "None"):
        return None
    if float in kinds:  # one number, one identity
        kinds = [each for each in kinds if each is not int]
    if _is_part(value) and not all(map(_plain, kinds)):
        return part(value, path)
    for each in sorted(kinds, key=lambda each: each is not type(value)):
        try:
            return convert(each, value, path)
        except RequestError:
            continue
    raise RequestError(wrong_type(path, kind, value))


def _plain(kind: Any) -> bool:
    """Whether a type takes values, and no parts."""
    origin = get_origin(kind) or kind
    return origin in (*_SCALARS, Literal, list, tuple, Sequence, dict, Mapping)


def _literal(kind: Any, value: Any, path: str) -> Any:
    for each in get_args(kind):
        try:
            if value is each or convert(type(each), value, path) == each:
                return each
        except RequestError:
            continue
    names = [str(each) for each in get_args(kind)]
    raise RequestError(
        f"expected {path} to be one of {', '.join(names)}, found {value!r}; "
        f"{nearest(str(value), names)}"
    )


def _list(kind: Any, value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(wrong_type(path, kind, value))
    inner = [each for each in get_args(kind) if each is not Ellipsis] or [Any]
    kinds = inner * len(value) if len(inner) == 1 else inner
    if len(kinds) != len(value):
        raise RequestError(wrong_type(path, kind, value))
    pairs = enumerate(zip(kinds, value, strict=True))
    return [convert(each, item, f"{path}[{place}]") for place, (each, item) in pairs]


def _mapping(kind: Any, inner: tuple[Any, ...], value: Any, path: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(wrong_type(path, kind, value))
    keys, values = inner
    return {
        convert(keys, key, f"a key of {path}"): convert(values, item, f"{path}.{key}")
        for key, item in value.items()
    }


def wrong_type(path: str, kind: Any, value: Any) -> str:
    """Words for a value of the wrong type."""
    name = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    wanted = name.replace("None", "null")
    if kind is str and isinstance(value, bool | float):
        remedy = "write it in quotes, which the shell leaves: " + f'''"{path}='...'"'''
    else:
        remedy = f"set {path} to such a value"
    return f"expected {path} to be {wanted}, found {_shown(value)}; {remedy}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write numbers of thousands of digits
        return "a number too long to be written"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _no_part(path: str, value: Any) -> str:
    return (
        f"expected {path} to be a part with a _target_, found {_shown(value)}; "
        f"leave it as it is, or set {path}._target_"
    )


def unknown(name: str, valid: Sequence[str]) -> str:
    """Words for a key that is not known, with those that are nearest."""
    if name in valid:
        group = name.split(".")[0]
        return (
            f"expected a key of the chosen {group}, found {name!r}, which only another {group} "
            "has; `palimpsest run --cfg job` shows the keys"
        )
    return f"expected a known configuration key, found {name!r}; {nearest(name, valid)}"
