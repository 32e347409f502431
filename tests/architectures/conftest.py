from collections.abc import Callable
from pathlib import Path

import pytest

from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import Batch
from tests.architectures.tiny import TINY, make_handle, padded, ragged


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    """Every row of the table, in turn."""
    return str(request.param)


@pytest.fixture
def handle(name: str) -> ModelHandle:
    """Its tiny model."""
    return make_handle(name)


@pytest.fixture(params=["left", "right"])
def batch(request: pytest.FixtureRequest) -> Batch:
    """Rows of unequal length, padded on either side."""
    return padded(ragged(), request.param)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a tiny model to disk, once."""
    home = tmp_path_factory.mktemp("checkpoints")

    def save(name: str) -> Path:
        path = home / name
        if not path.exists():
            handle = make_handle(name)
            handle.model.save_pretrained(path)
            handle.tokenizer.save_pretrained(path)
        return path

    return save
