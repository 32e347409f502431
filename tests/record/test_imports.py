"""Importing the room is cheap."""

import subprocess
import sys

import pytest

import palimpsest.record


def test_importing_the_room_loads_no_heavy_library():
    code = (
        "import sys, palimpsest.record\n"
        "heavy = {'wandb', 'plotly', 'torch', 'duckdb', 'rich', 'jinja2', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import palimpsest.record.tracker\n"
        "assert not {'wandb', 'plotly', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    for name in palimpsest.record.__all__:
        assert getattr(palimpsest.record, name) is not None


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = palimpsest.record.no_such_name
