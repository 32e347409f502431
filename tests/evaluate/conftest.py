from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from palimpsest.evaluate import scene
from palimpsest.evaluate.probing import measuring
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from tests.evaluate.planting import Plant, Planted, State
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


@pytest.fixture
def plant(model: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts states of one's own in place of the model's."""

    def to(facts: Splits, state: Callable[[State], Tensor]) -> Planted:
        planted = Planted(model, facts, state)
        monkeypatch.setattr(scene, "features", planted)
        monkeypatch.setattr(measuring, "features", planted)
        return planted

    return to
