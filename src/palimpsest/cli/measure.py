"""`palimpsest measure`: finished runs are measured further."""

import argparse
import re
from collections.abc import Sequence
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

PLACES = r"model\.(path|device|device_map|batch_size|compile)|facts\.path|record\.tracker\.\w+"
"""Settings that say how or where a run is measured further, not what is measured."""

_PARTS = ("model", "facts", "intervene", "record", "seed")


def measure(options: argparse.Namespace) -> int:
    """Measure the finished runs of a directory with what they lack.

    Raises:
        RequestError: no finished run is there, or an override asks for something else.
    """
    runs = _finished(options.directory)
    ruler, places = _split(options.overrides)
    evaluate = composed(ruler, options.config_dir).evaluate
    wanted = [_further(path, run, evaluate, places) for path, run in runs]
    from palimpsest.further import measure

    with phases("measure", 4 * len(wanted)) as phase:
        for directory, before in measure(wanted, phase, say):
            say(f"{'measured before, left as it is' if before else 'measured'}: {directory}")
    return 0


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
            places[key] = yaml.safe_load(value) if value else None
        else:
            raise RequestError(
                f"expected evaluate=..., or where the model and the facts of the runs are, found "
                f"{word!r}; what was done is not changed by measuring it: use `palimpsest run`"
            )
    return ruler, places


def _further(
    path: Path, run: dict[str, Any], evaluate: DictConfig, places: dict[str, Any]
) -> "Further":
    """The run with its own model and facts, and the new ruler."""
    from palimpsest.further import Further

    try:
        config = OmegaConf.create({name: run["config"][name] for name in _PARTS})
        config.evaluate = evaluate
        config.record.dir = str(path.parent)
        for key, value in places.items():
            OmegaConf.update(config, key, value)
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
