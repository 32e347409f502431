from pathlib import Path

import pytest

from palimpsest.model.handle import ModelHandle
from tests.model.tiny import KINDS, make_handle


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, unless it needs the real model, which lies in the user's."""
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=KINDS)
def handle(request: pytest.FixtureRequest) -> ModelHandle:
    """A tiny model of each architecture."""
    return make_handle(request.param)


@pytest.fixture
def llama() -> ModelHandle:
    """A tiny model, where the architecture does not matter."""
    return make_handle("llama")
