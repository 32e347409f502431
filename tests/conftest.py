"""What every room's tests share."""

from pathlib import Path

import pytest

from palimpsest.locks import held
from palimpsest.model.fetch import fetch


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a model directory, from the user's own cache; converted once, by one worker."""
    lock = tmp_path_factory.getbasetemp().parent / "palimpsest-smollm2.lock"
    with held(lock):
        return fetch("smollm2")
