from pathlib import Path

import pytest

from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from tests.evaluate.toy import make_splits
from tests.model.tiny import make_handle


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model() -> ModelHandle:
    """A tiny model."""
    return make_handle("llama", batch_size=16)


@pytest.fixture
def facts() -> Splits:
    """Four classes; two facts a class to change."""
    return make_splits()
