"""Errors that are kept hold no secrets."""

import pytest

from palimpsest.record.redact import one_line


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


def test_ordinary_errors_are_kept_on_one_line():
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert one_line(ValueError("expected 3,\n  found 4")) == "ValueError: expected 3, found 4"


def test_long_errors_are_cut():
    assert len(one_line("x " * 900)) == 500
