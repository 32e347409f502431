import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from palimpsest.facts import FactSet, World

Write = Callable[[list[Any]], Path]


@pytest.fixture(scope="session")
def world() -> FactSet:
    return World().load()


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """Makes one CounterFact record."""

    def make(case: int, relation: str = "P17", subject: str | None = None) -> dict[str, Any]:
        subject = subject or f"Place{case}"
        return {
            "case_id": case,
            "requested_rewrite": {
                "prompt": "{} is located in the country of",
                "relation_id": relation,
                "target_new": {"str": "Japan", "id": "Q17"},
                "target_true": {"str": "France" if case % 2 else "Italy", "id": "Q142"},
                "subject": subject,
            },
            "paraphrase_prompts": [f"Some words. {subject} lies in ", "Where is it? In"],
            "neighborhood_prompts": ["Lyon is in", "Nice is in"],
        }

    return make


@pytest.fixture
def traced() -> Callable[..., dict[str, Any]]:
    """Makes one record of the flat shape that copies for causal tracing have."""

    def make(
        subject: str = "Danielle Darrieux", prefix: str = "The mother tongue of", **more: Any
    ) -> dict[str, Any]:
        lead = f"{prefix} " if prefix else ""
        return {
            "relation": "The mother tongue of {} is",
            "relation_prefix": prefix,
            "relation_suffix": " is",
            "prompt": f"{lead}{subject} is",
            "relation_id": "P103",
            "target_false_id": "Q1860",
            "target_true_id": "Q150",
            "target_true": " French",
            "target_false": " English",
            "subject": f" {subject}" if prefix else subject,
        } | more

    return make


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a CounterFact file."""

    def to(records: list[Any]) -> Path:
        path = tmp_path / "counterfact.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        return path

    return to
