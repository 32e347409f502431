"""The example of the documentation on the real model."""

import re

import pytest

from palimpsest.cli import main

pytestmark = [pytest.mark.model, pytest.mark.slow]


def test_the_tower_moves_and_the_questions_follow(smollm2_dir, capfd):
    code = main(
        [
            "ask", "The Eiffel Tower is located in the city of", "--subject", "the Eiffel Tower",
            "--old", "Paris", "--new", "London", "--methods", "rome",
            f"model.path={smollm2_dir}", "rome:intervene.variant=plain", "contexts=1",
            "--neighbor", "The Louvre is located in the city of=Paris",
        ]
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert code == 0, err
    assert re.search(r"^none +Paris", out, re.MULTILINE)
    assert re.search(r"^rome +London", out, re.MULTILINE)
    assert re.search(r"^rome +old .*\n +new .*█ London, rank 1$", out, re.MULTILINE)
    language = out[: out.index("French → English")][-400:]
    assert re.search(r"\bFrench\b.*\bEnglish\b", language)
    assert re.search(r"^The Louvre .* → \.\d+ kept", out, re.MULTILINE)
    assert "Nearest relation: city_country" in out
