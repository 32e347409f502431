"""What is looked at before anything is done: the words of the command as they come in."""

import ast
import os
import re
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from palimpsest.cli.words import quoted
from palimpsest.errors import RequestError, visible
from palimpsest.files import DEEPEST
from palimpsest.record.redact import credentials, environment_secrets, is_secret_key

MOST = 10_000
"""Jobs that one command may launch."""

_OVERRIDE = re.compile(r"[+~]*([^=\s]+)=(.*)", re.DOTALL)
_INNER_KEY = re.compile(r"""[{,]\s*['"]?([\w.-]+)['"]?\s*:\s*([^,}\]]*)""")
_HARMLESS = re.compile(r"['\"]?(|null|none|true|false|\d{1,3})['\"]?", re.IGNORECASE)
_PLACES = ("--config-dir", "-cd", "--config-path", "-cp")
_SEARCHED = re.compile(r"file://([^\]\s,'\"]+)")


def admitted(words: Sequence[str]) -> list[str]:
    """The command's words, those of wandb's agents in Hydra's grammar.

    Raises:
        RequestError: a word holds a credential, or brackets too deep; or a file of `--config-dir`
            is beyond what is read.
    """
    hydra = words[:1] in (["run"], ["trace"])
    found = [*words[:1], *from_agent(words[1:])] if hydra else list(words)
    refuse_credentials(found)
    for word in found:
        if _depth(word) > DEEPEST:
            raise RequestError(
                f"expected at most {DEEPEST} brackets within each other, found more in "
                f"{visible(word[:40])}…; simplify the value"
            )
    for place in _directories(found):
        _check_directory(place)
    return found


def refuse_credentials(words: Sequence[str], place: str = "") -> None:
    """Refuse words that hold a credential, before they are kept anywhere.

    Trackers, launchers and shells keep a command's words, and no setting needs a credential.

    Args:
        words: of the command.
        place: where they come from, for the message.

    Raises:
        RequestError: without the credential itself.
    """
    secrets = [value for value in environment_secrets() if not os.path.exists(value)]
    for word in words:
        for value in secrets:
            if value in word:
                name = next(name for name, held in os.environ.items() if held == value)
                raise RequestError(
                    f"expected no secret in {place or 'the command'}, found the value of the "
                    f"environment variable {name}; leave it out: programs read it there"
                )
        shaped = any(credentials(word))
        if shaped or any(_secret_settings(word)):
            raise RequestError(
                f"expected no credential, found what looks like one in {place or _name(word)}; put "
                "it into an environment variable such as HF_TOKEN or WANDB_API_KEY, and renew it "
                "if others may have seen it"
                + ("; of a name, part the words by hyphens" if shaped else "")
            )


def _name(word: str) -> str:
    """The setting of an override, unless that is what must not be said."""
    key = _OVERRIDE.fullmatch(word)
    return "the command" if not key or any(credentials(key[1])) else visible(key[1])


def _secret_settings(word: str) -> Iterator[str]:
    """Names of settings in a word that speak of credentials and have a value."""
    found = _OVERRIDE.fullmatch(word)
    if found:
        pairs = [(found[1], found[2])]
        pairs += _INNER_KEY.findall(found[2]) if found[2][:1] in ("{", "[") else []
        yield from (k for k, value in pairs if is_secret_key(k) and not _HARMLESS.fullmatch(value))


def _depth(word: str) -> int:
    """How many brackets are open at once at most, quotes or not."""
    depth = most = 0
    for sign in re.findall(r"[\[\](){}]", word):
        depth += 1 if sign in "[({" else -1
        most = max(most, depth)
    return most


def _directories(words: Sequence[str]) -> Iterator[Path]:
    """Directories of the user's own configuration."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in _PLACES or (flag.startswith("--c") and _PLACES[0].startswith(flag)):
            yield Path(value if equals else "".join(words[place + 1 : place + 2]) or ".")
        elif "hydra.searchpath" in flag:
            yield from map(Path, _SEARCHED.findall(value))


def _check_directory(place: Path) -> None:
    """Refuse a directory with a file that Hydra would need minutes for, or could not read.

    Files are looked at where Hydra finds options: in the directory, and in those of the groups.
    """
    from palimpsest.cli.configuration import PARTS
    from palimpsest.cli.documents import check_document

    groups = (place / name for name in PARTS)
    files = [*place.glob("*.yaml"), *(file for group in groups for file in group.rglob("*.yaml"))]
    for file in sorted(files):
        check_document(file)


def from_agent(words: Sequence[str]) -> list[str]:
    """Words as wandb's agents write them, in Hydra's grammar.

    Mappings come in Python's notation. A run that wandb starts again comes with all that is known
    of it: beside the parameters of the sweep `_wandb={...}` and whole parts with their `_target_`,
    which the parameters compose anyway.
    """
    from palimpsest.cli.configuration import PARTS

    again = any(word.startswith("_wandb=") for word in words)
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        mapping = _mapping(value) if equals else None
        if again and (key == "_wandb" or (key in PARTS and mapping)):
            continue
        found.append(f"{key}={mapping}" if mapping else word)
    return found


def _mapping(text: str) -> str | None:
    """A mapping in Python's notation as Hydra writes it; None for anything else."""
    if not re.match(r"\{\s*['\"]", text) or _depth(text) > DEEPEST:
        return None
    try:
        value = ast.literal_eval(text)
        return in_grammar(value) if isinstance(value, dict) else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def in_grammar(value: Any) -> str:
    """A value of YAML or Python in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{in_grammar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(in_grammar, value)) + "]"
    if isinstance(value, str):
        return _spelt(value)
    return "null" if value is None else str(value)


def _spelt(text: str) -> str:
    """A text that Hydra reads as this very text: in quotes, unless it is a plain name."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text)
    return text if plain and text.lower() not in _NO_NAMES else quoted(text)


_NO_NAMES = ("nan", "inf", "null", "true", "false")
"""What Hydra reads as something else than text."""


def check_count(words: Sequence[str]) -> None:
    """Refuse a multirun of too many jobs, counted without listing them.

    Raises:
        RequestError: the words describe more than `MOST` jobs.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, counts = OverridesParser.create(), []
    for word in words:
        if not word.startswith("-") and re.search(r"=.*[,(]", word, re.DOTALL):
            try:
                override = parser.parse_override(word)
            except HydraException:  # told by the one who runs it
                continue
            if override.is_sweep_override():
                counts.append(_choices(override.value()))
    refuse_many(prod(counts), "these words")


def _choices(sweep: Any) -> int:
    """The number of values that Hydra takes one after another."""
    from hydra.core.override_parser.types import ChoiceSweep, RangeSweep

    if isinstance(sweep, ChoiceSweep):
        return len(sweep.list)
    if not isinstance(sweep, RangeSweep) or not sweep.step:
        return 1
    try:
        return max(0, int(-(((sweep.start or 0) - (sweep.stop or 0)) // sweep.step)))
    except (OverflowError, ValueError):  # an end that is not finite
        return MOST + 1


def refuse_many(count: int, place: str) -> None:
    """Refuse a number of jobs above `MOST`.

    Raises:
        RequestError: with the number.
    """
    if count > MOST:
        raise RequestError(
            f"expected at most {MOST} jobs, found {_shown(count)} in {place}; divide the grid, or "
            "leave out values"
        )


def _shown(count: int) -> str:
    return str(count) if count < 10**15 else "far more"
