"""YAML files of users, read within limits, and as wandb and Hydra read them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from palimpsest.errors import RequestError
from palimpsest.files import DEEPEST

LONGEST = 1_000_000
"""Bytes that a file may have, and characters that it may be with every alias written out."""

_BITS = 10_000
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_DATE = "tag:yaml.org,2002:timestamp"

_Plain: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


class Loader(_Plain):  # type: ignore[misc]
    """YAML as wandb reads it (1.1), but that what Hydra takes for a number is one.

    PyYAML's own loader takes `5e-1` for text. wandb's agents pass that text on, and Hydra's grammar
    and OmegaConf's loader take it for 0.5. Dates stay text.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping; a key that stands in it twice is an error."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"found the key {twice!r} twice in one mapping", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: Any) -> Any:
        """A whole number; one that Python cannot write again is an error."""
        value = super().construct_yaml_int(node)
        if value.bit_length() > _BITS:
            raise ValueError("a number too long")
        return value


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_FLOAT, _DATE)]
    for first, resolvers in _Plain.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"""(?:
          [-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        | [-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        | [-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        | [-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*
        | [-+]?\.(?:inf|Inf|INF) | \.(?:nan|NaN|NAN) )\Z""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


Loader.add_constructor(_INT, Loader.construct_yaml_int)


def read_document(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        OSError: the file cannot be read.
        RequestError: it is not UTF-8, not YAML, holds a tag or a key twice, is longer or deeper
            than the limits, or its anchors make it so.
    """
    text = _text(path)
    try:
        _Extent(path).check(text, tags=False)
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise RequestError(
            f"expected YAML in {path}, found {' '.join(str(error).split())[:300]}; mend it"
        ) from error


def check_document(path: Path) -> None:
    """Refuse a YAML file that cannot be read within the limits; whoever reads it finds the rest.

    Raises:
        RequestError: it is not UTF-8, or longer or deeper than the limits.
    """
    try:
        _Extent(path).check(_text(path), tags=True)
    except (yaml.YAMLError, OSError):
        return


def _text(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(LONGEST + 1)
    if len(raw) > LONGEST:
        raise RequestError(f"expected at most {LONGEST} bytes in {path}, found more; divide it")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"expected UTF-8 text in {path}, found {error.reason} at byte {error.start}; "
            "convert the file"
        ) from error


@dataclass
class _Extent:
    """How deep a document is, and how long with every alias written out; nothing is built of it.

    Attributes:
        path: the file, for messages.
        lengths: characters by anchor.
        open: anchor and characters so far of each mapping and list that has begun, the document
            first.
    """

    path: Path
    lengths: dict[str, int] = field(default_factory=dict)
    open: list[tuple[str | None, int]] = field(default_factory=lambda: [(None, 0)])

    def check(self, text: str, *, tags: bool) -> None:
        """Go through a document.

        Raises:
            RequestError: it is beyond the limits, endless, or has tags though it may not.
        """
        events: Iterable[Any] = yaml.parse(text, Loader=_Plain)
        for event in events:
            line = event.start_mark.line + 1
            if not tags and getattr(event, "tag", None) is not None:
                self._refuse(line, "plain values", f"the tag {event.tag!r}; leave it out")
            if isinstance(event, yaml.CollectionStartEvent):
                self.open.append((event.anchor, 1))
            elif isinstance(event, yaml.CollectionEndEvent):
                self._add(*self.open.pop())
            elif isinstance(event, yaml.ScalarEvent):
                self._add(event.anchor, len(event.value) + 1)
            elif isinstance(event, yaml.AliasEvent):
                self._add(None, self._length(event.anchor, line))
            self._limit(line)

    def _add(self, anchor: str | None, length: int) -> None:
        above, before = self.open[-1]
        self.open[-1] = (above, before + length)
        if anchor is not None:
            self.lengths[anchor] = length

    def _length(self, anchor: Any, line: int) -> int:
        if anchor in (above for above, _ in self.open):
            self._refuse(line, "values that end", f"the anchor {anchor!r} in itself; write it out")
        return self.lengths.get(anchor, 1)

    def _limit(self, line: int) -> None:
        if len(self.open) > DEEPEST:
            self._refuse(line, f"at most {DEEPEST} levels", "more; simplify it")
        if self.open[-1][1] > LONGEST:
            self._refuse(line, f"at most {LONGEST} characters with every alias written out",
                         "more; write out what is meant")  # fmt: skip

    def _refuse(self, line: int, wanted: str, found: str) -> NoReturn:
        raise RequestError(f"expected {wanted} in {self.path}, found in line {line} {found}")
