"""Errors that are kept hold no secrets."""

import random
import string

import pytest

from palimpsest.record.redact import (
    credentials,
    environment_secrets,
    is_secret_key,
    one_line,
    redacted,
)


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnopqrstuvwx",
        "ghp_0123456789abcdefABCDEF",
        "0123456789abcdef0123456789abcdef01234567",
        "Bearer eyJhbGciOi",
        "api_key=hunter2",
        "?token=hunter2&x=1",
        "https://me:hunter2@host",
        "dckr_pat_0123456789abcdefghijklmn",
        "ya29.a0AfH6SMBx0123456789abcdefgh",
        "https://hooks.slack.com/services/T0000/B0000/XXXX",
        "k3j9x2m7q4w8e1r5t6y0u3i8o2p7a4s9d1f6",
        "Q5ZK2M7XR3TN6WB4YH2DJ5PC7VF3LG6S",
    ],
)
def test_credentials_are_replaced(secret):
    line = one_line(f"cannot reach {secret} today")
    assert "[redacted]" in line
    for part in ("hunter2", "abcdefghijkl", "0123456789abcdef", "eyJ"):
        assert part not in line


def test_a_configuration_is_kept_without_credentials(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct horse battery")
    kept = redacted(
        {
            "model": {"path": "https://me:hunter2@host/m", "revision": "0123456789abcdef" * 2},
            "list": ["hf_abcdefghijklmnopqrstuvwx", 3, None, "correct horse battery"],
        }
    )
    assert kept == {
        "model": {"path": "https://[redacted]@host/m", "revision": "0123456789abcdef" * 2},
        "list": ["[redacted]", 3, None, "[redacted]"],
    }


def test_ordinary_errors_are_kept_on_one_line():
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert one_line(ValueError("expected 3,\n  found 4")) == "ValueError: expected 3, found 4"


def test_long_errors_are_cut():
    assert len(one_line("x " * 900)) == 500


def test_secret_settings_are_kept_without_their_values():
    config = {"hub": {"api_key": "hunter2", "token": "hunter2"}, "tokens": "all", "row_tokens": 3}
    assert redacted(config) == {
        "hub": {"api_key": "[redacted]", "token": "[redacted]"},
        "tokens": "all",
        "row_tokens": 3,
    }


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("token", True),
        ("model.hf_token", True),
        ("apiKey", True),
        ("client_secret", True),
        ("tokens", False),
        ("last_token", False),
        ("row_tokens", False),
        ("measure_key", False),
        ("keys", False),
        ("secretary", False),
        ("token.place", False),
    ],
)
def test_a_setting_speaks_of_a_credential(name, secret):
    assert is_secret_key(name) is secret


def test_nine_in_ten_random_texts_are_told_from_names():
    draw = random.Random(0)
    signs = string.ascii_letters + string.digits
    for length, least in ((24, 0.85), (32, 0.9), (43, 0.95)):
        texts = ["".join(draw.choices(signs, k=length)) for _ in range(400)]
        assert sum(any(credentials(text)) for text in texts) >= least * len(texts)


def test_words_in_a_text_are_replaced_and_paths_are_not():
    word = "".join(random.Random(3).choices(string.ascii_letters + string.digits, k=30))
    text = f"cannot take {word}, nor '{word}'; see /tmp/{word}/a and {word}.json"
    assert one_line(text) == (
        f"cannot take [redacted], nor '[redacted]'; see /tmp/{word}/a and {word}.json"
    )


def test_a_name_that_only_begins_as_a_secrets_does_is_none(monkeypatch):
    for name in ("TOKENIZER_NAME", "KEYBOARD_LAYOUT", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "gpt2-medium")
    assert "gpt2-medium" not in environment_secrets()
    for name in ("WANDB_API_KEY", "OPENAI_APIKEY", "HF_TOKEN", "DB_PASSWORD", "GH_PAT"):
        monkeypatch.setenv(name, f"hunter2-{name}")
        assert f"hunter2-{name}" in environment_secrets()


def test_a_measures_key_is_no_secret():
    told = "two rows with measure_key='03e3feaf9243'"
    assert one_line(told) == told
