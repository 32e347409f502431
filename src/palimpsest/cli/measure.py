"""`palimpsest measure`: finished runs are measured further."""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf

from palimpsest.cli.configuration import as_request, check_config
from palimpsest.cli.jobs import composed, parts_of, phases, ruler_of
from palimpsest.cli.words import say
from palimpsest.errors import RequestError
from palimpsest.record.store import is_done, run_of

if TYPE_CHECKING:
    from palimpsest.further import Further

PLACES = (
    r"model\.(path|device|device_map|batch_size|compile|trust_remote_code)|facts\.path"
    r"|record\.tracker\.\w+"
)
"""Settings that say how or where a run is measured further, not what is measured."""

_OURS = "palimpsest."

_PARTS = ("model", "facts", "intervene", "record", "seed")


def measure(options: argparse.Namespace) -> int:
    """Measure the finished runs of a directory with what they lack.

    Raises:
        RequestError: no finished run is there, or an override asks for something else.
    """
    runs = _finished(options.directory)
    ruler, places = _split(options.overrides)
    evaluate = composed(ruler, options.config_dir).evaluate
    wanted = list(_wanted(runs, evaluate, places, options.own_classes))
    from palimpsest.further import measure

    with phases("measure", 4 * len(wanted)) as phase:
        for directory, before in measure(wanted, phase, say):
            say(f"{'measured before, left as it is' if before else 'measured'}: {directory}")
    return 0


def _wanted(
    runs: Sequence[tuple[Path, dict[str, Any]]],
    evaluate: DictConfig,
    places: dict[str, Any],
    own_classes: bool,
) -> Iterator["Further"]:
    """The runs that can be measured; of several, those that cannot are passed over and told."""
    made = 0
    for place, (path, run) in enumerate(runs, start=1):
        try:
            yield _further(path, run, evaluate, places, own_classes)
            made += 1
        except RequestError as error:
            if place == len(runs) and not made:
                raise
            say(f"passed over: {path}: {error}")


def _finished(directory: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The finished runs that changed something, and their run.json."""
    own = (directory / "run.json").is_file()
    places = [directory] if own else sorted(p.parent for p in directory.glob("*/run.json"))
    found = [(path, run) for path in places if is_done(path) and (run := run_of(path))]
    found = [(path, run) for path, run in found if run["method"] != "trace"]
    if not found:
        raise RequestError(
            f"expected finished runs of this version's schema in {directory}, found none; make "
            "them with `palimpsest run`"
        )
    return found


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The words about the ruler, and the settings that say where model and facts are.

    Raises:
        RequestError: a word about anything else.
    """
    ruler, places = [], {}
    for word in words:
        key, _, value = word.partition("=")
        if re.match(r"[+~]*evaluate\b", word):
            ruler.append(word)
        elif re.fullmatch(PLACES, key):
            places[key] = _value(word, value)
        else:
            raise RequestError(
                f"expected evaluate=..., or where the model and the facts of the runs are, found "
                f"{word!r}; what was done is not changed by measuring it: use `palimpsest run`"
            )
    return ruler, places


def _value(word: str, value: str) -> Any:
    """What a setting is set to.

    Raises:
        RequestError: it is not YAML.
    """
    try:
        return yaml.safe_load(value) if value else None
    except yaml.YAMLError as error:
        found = " ".join(str(error).split())
        raise RequestError(f"expected a value in {word!r}, found {found}; quote it") from error


def _check_ours(path: Path, config: DictConfig) -> None:
    """Refuse classes that are not ours: results come from others, and a class runs its code.

    Raises:
        RequestError: names the first one.
    """
    text = OmegaConf.to_container(config)
    waiting: list[Any] = [text[name] for name in _PARTS if isinstance(text, dict)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        waiting += value.values()
        target = value.get("_target_")
        if target is not None and not str(target).startswith(_OURS):
            raise RequestError(
                f"expected classes of palimpsest in {path / 'run.json'}, found "
                f"{str(target)[:80]!r}; if the code of that name is yours, give --own-classes"
            )


def _further(
    path: Path,
    run: dict[str, Any],
    evaluate: DictConfig,
    places: dict[str, Any],
    own_classes: bool,
) -> "Further":
    """The run with its own model and facts, and the new ruler.

    Nothing that run.json says makes code run: neither the model's own nor a class of somebody's.
    """
    from palimpsest.further import Further

    if run["run_id"] != path.name:
        raise RequestError(
            f"expected the directory of run {run['run_id'][:40]!r} to bear its name, found {path}; "
            "name it so"
        )
    try:
        config = _configured(path, run, evaluate, places)
        if not own_classes:
            _check_ours(path, config)
        parts = parts_of(check_config(config, "measure"))
    except KeyError as error:
        raise RequestError(
            f"expected the configuration in {path / 'run.json'}, found no {error}; run it again"
        ) from error
    except Exception as error:
        raise as_request(error) from error
    return Further(
        run,
        parts["intervene"],
        parts["model"],
        parts["facts"],
        ruler_of(parts),
        parts["record"],
        parts["seed"],
    )


def _configured(
    path: Path, run: dict[str, Any], evaluate: DictConfig, places: dict[str, Any]
) -> DictConfig:
    """The run's own configuration with the new ruler, where things are on this machine.

    Raises:
        KeyError: a part is missing.
    """
    config = OmegaConf.create({name: (run.get("config") or {})[name] for name in _PARTS})
    config.evaluate = evaluate
    config.record.dir = str(path.parent)
    config.model.trust_remote_code = False
    for key, value in places.items():
        OmegaConf.update(config, key, value)
    return config
