"""The command's tiny model and surroundings, and one inquiry fitted on it."""

from pathlib import Path

import pytest

from palimpsest.ask.bench import Bench, Entry
from palimpsest.ask.relation import Library
from palimpsest.cli.jobs import compose_parts
from tests.ask.surroundings import METHODS, SILENT, overrides
from tests.cli.conftest import Tiny, cache, call, surroundings, tiny

__all__ = ["bench", "cache", "call", "surroundings", "tiny"]


@pytest.fixture(scope="session")
def bench(tiny: Tiny, cache: Path) -> Bench:
    """The tiny model with no change, ROME, its batch form, LEACE and a control."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(cache))
        parts = {name: compose_parts([*overrides(tiny), *words]) for name, words in METHODS.items()}
        entries = [Entry(name, each["intervene"], each["locate"]) for name, each in parts.items()]
        library = Library.read(parts["none"]["facts"], 0)
        return Bench(parts["none"]["model"].load(), entries, library, None, SILENT)
