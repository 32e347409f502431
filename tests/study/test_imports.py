"""Results are read on machines without a GPU: study and report import no heavy room or library."""

import subprocess
import sys
from pathlib import Path

import pytest

import palimpsest

HEAVY = ("torch", "transformers", "hydra", "wandb", "palimpsest.model", "palimpsest.facts")


@pytest.mark.parametrize("room", ["record.row", "record.store", "study", "report"])
def test_a_room_that_reads_results_loads_no_model_library(room):
    root = Path(palimpsest.__file__).parent
    place = root.joinpath(*room.split("."))
    modules = [f"palimpsest.{room}"]
    if place.is_dir():
        modules = [
            ".".join(path.relative_to(root.parent).with_suffix("").parts)
            for path in place.glob("**/*.py")
        ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_tracker_loads_no_wandb():
    code = "import sys, palimpsest.track.wandb\nassert 'wandb' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True)
