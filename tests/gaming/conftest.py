"""What the tests of cheats share: the command, and a tiny model that knows many subjects."""

from pathlib import Path

import pytest

from tests.cli.conftest import cache, call, surroundings
from tests.invented import Invented

__all__ = ["cache", "call", "surroundings"]

ENDINGS = ("bur", "dan", "lim", "mor", "nes", "rik", "sol", "tev", "vin", "zar", "hok", "gil")


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that knows 140 invented cities' countries and 20 speakers' tongues, and the facts."""
    home = tmp_path_factory.mktemp("known")
    invented = Invented({"P17": 140, "P103": 20}, width=48, steps=200, endings=ENDINGS)
    invented.save(home / "model", home / "counterfact.json")
    return home / "model", home / "counterfact.json"
