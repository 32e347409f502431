"""Shell completion: argcomplete asks; argparse's parser and the composed configuration answer.

Nothing here imports torch or transformers: a shell waits for every answer.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from argcomplete.completers import DirectoriesCompleter, FilesCompleter, SuppressCompleter
from argcomplete.finders import CompletionFinder
from argcomplete.lexers import split_line
from argcomplete.shell_integration import shellcode
from omegaconf import DictConfig, OmegaConf

from palimpsest.cli.configuration import KEYS, resource
from palimpsest.cli.words import quoted

Completer = Callable[..., Iterable[str]]

PATHS = ("dir", "path", "text")
"""The last part of keys whose values are files or directories."""

CHOICE = re.compile(r"([\w/]+(?:@[\w.]+)?=[\w.-]+)(,[\w.,-]*)?")
"""An option of a group, or several of a multirun: the first one tells which keys there are."""


def script(shell: str) -> str:
    """What a shell (bash, zsh or fish) reads to complete the words after `palimpsest`."""
    return shellcode(["palimpsest"], shell=shell)


def answer(parser: argparse.ArgumentParser) -> None:
    """Write the candidates for the word under the cursor where the shell reads them, and exit.

    The shell names the line and the cursor's place by the variables `COMP_LINE` and `COMP_POINT`.
    """
    _equip(parser)
    _Finder()(parser, always_complete_options=False, default_completer=SuppressCompleter())


class _Finder(CompletionFinder):
    """Completes overrides after a flag too, where argparse expects none but Hydra takes them."""

    def collect_completions(
        self,
        active_parsers: list[argparse.ArgumentParser],
        parsed_args: argparse.Namespace,
        cword_prefix: str,
    ) -> list[str]:
        """The candidates for the word under the cursor."""
        found = super().collect_completions(active_parsers, parsed_args, cword_prefix)
        actions = active_parsers[-1]._actions
        waiting = [flag for each in actions if each.nargs != 0 for flag in each.option_strings]
        if found or cword_prefix.startswith("-") or _line()[-1] in waiting:
            return found
        takers = [each for each in actions if each.dest == "overrides"]
        return _overrides(cword_prefix, parsed_args) if takers else []


def _equip(parser: argparse.ArgumentParser) -> None:
    """Give a completer to every argument that takes a path, names or overrides."""
    completers: Mapping[str, Completer] = {
        "config_dir": DirectoriesCompleter(),
        "directory": DirectoriesCompleter(),
        "methods": lambda prefix, **_: methods(prefix),
        "name": lambda **_: fetchable(),
        "overrides": lambda prefix, parsed_args, **_: _overrides(prefix, parsed_args),
    }
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _equip(inner)
        elif action.dest in completers:
            action.completer = completers[action.dest]  # type: ignore[attr-defined]
        elif action.type is Path:
            action.completer = FilesCompleter()  # type: ignore[attr-defined]


def _line() -> list[str]:
    """The words before the one under the cursor."""
    return split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]


def _overrides(prefix: str, parsed: argparse.Namespace) -> list[str]:
    """Overrides of the configuration of the line's command; of most commands it is that of runs."""
    command = "trace" if "trace" in _line()[1:2] else "run"
    return overrides(prefix, _line(), _directory(parsed), command)


def _directory(parsed: argparse.Namespace) -> str | None:
    """What follows `--config-dir`, if the command has such a flag."""
    return getattr(parsed, "config_dir", None)


def fetchable() -> list[str]:
    """The models that `palimpsest fetch` knows: those whose yaml leaves the path to it."""
    files = sorted((resource("conf") / "model").glob("*.yaml"))
    return [file.stem for file in files if _content(file).get("path", "") is None]


def methods(prefix: str) -> list[str]:
    """What a list of methods, separated by commas, can be that begins with `prefix`."""
    return [word.removeprefix("intervene=") for word in overrides(f"intervene={prefix}", [])]


def _content(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def overrides(
    prefix: str, words: Sequence[str], directory: str | None = None, command: str = "run"
) -> list[str]:
    """What a KEY=VALUE override that begins with `prefix` can be.

    Before the first dot these are groups and keys, after it the dotted keys, after `@` groups whose
    choice stands elsewhere, such as the parts of a pair; after `=` a group's options, or a key's
    value as composed, and files where the key takes one.

    Args:
        prefix: the word so far; Hydra's `+`, `++` and `~` may stand before the key, and before
            these `METHOD:`, of which it then is a key.
        words: the words before it; the options that they choose decide which keys there are.
        directory: that of `--config-dir`, searched besides Palimpsest's own.
        command: whose configuration it is, `run` or `trace`.
    """
    method = re.match(r"(\w+):", prefix)
    if method:
        chosen = [*words, f"intervene={method[1]}"]
        return [method[0] + word for word in overrides(prefix[method.end() :], chosen, directory)]
    word = prefix.lstrip("+~")
    sign = prefix[: len(prefix) - len(word)]
    key, equals, value = word.partition("=")
    with _composed(words, directory, command) as composed:
        found = _values(composed, key, value) if equals else _keys(composed, key)
    foreign = {name for keys in KEYS.values() for name in keys} - {*KEYS[command]}
    own = (each for each in found if re.split(r"[.=/]", each)[0] not in foreign)
    return [f"{sign}{each}" for each in own if each.startswith(word)]


@dataclass(frozen=True)
class _Composed:
    """What Hydra composes from the words of a line.

    Attributes:
        config: the configuration, Hydra's own node included.
        groups: the groups within a group, by its name; "" holds the outermost.
        options: the options of a group, by its name; none where it is no group.
    """

    config: DictConfig
    groups: Callable[[str], list[str]]
    options: Callable[[str], list[str]]


@contextmanager
def _composed(words: Sequence[str], directory: str | None, command: str) -> Iterator[_Composed]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.object_type import ObjectType
    from hydra.errors import HydraException

    place = [f"hydra.searchpath=[{quoted(str(Path(directory).resolve()))}]"] if directory else []
    chosen = [found[1] for word in words if (found := CHOICE.fullmatch(word))]
    with initialize_config_dir(str(resource("conf")), version_base="1.3"):
        try:
            config = compose(command, [*place, *chosen], return_hydra_config=True)
        except HydraException:  # a word of the line is wrong, or not yet right
            config = compose(command, place, return_hydra_config=True)
        options = GlobalHydra.instance().config_loader().get_group_options
        yield _Composed(
            config,
            lambda group: options(group, ObjectType.GROUP, command, place),
            lambda group: options(group, ObjectType.CONFIG, command, place),
        )


def _keys(composed: _Composed, word: str) -> list[str]:
    """Groups and keys, each with the sign that goes on from it."""
    tree: dict[str, Any] = OmegaConf.to_container(composed.config)  # type: ignore[assignment]
    if "@" in word:
        return [f"{key}=" for key in tree["hydra"]["runtime"]["choices"] if "@" in key]
    if "." in word:
        return [f"{key}=" for key in _leaves(tree, "")]
    parent, slash, _ = word.rpartition("/")
    groups = [f"{parent}{slash}{name}" for name in composed.groups(parent)]
    keys = [] if slash else [f"{key}{'.' if isinstance(tree[key], dict) else '='}" for key in tree]
    options = [f"{group}=" for group in groups if composed.options(group)]
    inner = [f"{group}/" for group in groups if not composed.options(group)]
    return [*options, *inner, *keys]


def _leaves(tree: Mapping[Any, Any], prefix: str) -> Iterator[str]:
    """The dotted keys of all values, but for `_target_`."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif key != "_target_":
            yield f"{prefix}{key}"


def _values(composed: _Composed, key: str, value: str) -> list[str]:
    """Overrides of a group or key; of a group's list, the last option is the open one."""
    before = value[: value.rfind(",") + 1]
    group = key.partition("@")[0]
    options = [f"{key}={before}{option}" for option in composed.options(group)]
    if options:
        return options
    files = FilesCompleter()(value) if key.rpartition(".")[2] in PATHS else []
    return [f"{key}={each}" for each in (*_shown(composed.config, key), *files)]


def _shown(config: DictConfig, key: str) -> list[str]:
    """The value as composed, if it can stand in a shell's word; of a switch, both."""
    value = OmegaConf.select(config, key)
    if isinstance(value, bool):
        return ["true", "false"]
    text = "null" if value is None else str(value)
    return [text] if re.fullmatch(r"[\w.+/-]+", text) else []
