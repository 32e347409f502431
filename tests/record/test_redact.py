"""Errors that are kept hold no secrets."""

import pytest

from palimpsest.record.redact import one_line, redacted


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
