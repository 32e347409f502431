"""What every room's tests share."""

from pathlib import Path

import pytest

from palimpsest.model.fetch import fetch


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2 as a model directory, from the user's own cache; converted once, by one worker."""
    return fetch("smollm2")
