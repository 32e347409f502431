"""The API pages tell of every module, and of no other."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
SHOWN = {
    page: re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for page in PAGES
}
NAV = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nmarkdown_extensions:")[0]


def modules():
    """Every public module with a name of its own; of a package, the modules within."""
    for path in SOURCE.glob("palimpsest/**/*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if not any(part.startswith("_") for part in parts):
            yield ".".join(parts)


def test_every_public_module_stands_in_one_page():
    shown = sorted(name for names in SHOWN.values() for name in names)
    assert shown == sorted([*modules(), "palimpsest.cli"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_that_of_its_room(page):
    room = "cli" if page.stem == "command" else page.stem
    floors = (
        "apply",
        "experiment",
        "tracing",
        "further",
        "results",
        "cache",
        "errors",
        "files",
        "locks",
    )
    others = {f"palimpsest.{name}" for name in floors}
    allowed = others if page.stem == "command" else set()
    for name in SHOWN[page]:
        assert name in allowed or name.split(".")[:2] == ["palimpsest", room]


def test_every_page_is_in_the_navigation():
    (api,) = (entry["API"] for entry in yaml.safe_load(NAV)["nav"] if "API" in entry)
    named = [place for entry in api for place in entry.values()]
    assert sorted(named) == [f"api/{page.name}" for page in PAGES]
