"""One line about an error, fit to be kept: no secrets, no traceback."""

import os
import re
from typing import Any

_SECRET_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_CREDENTIALS = re.compile(
    r"""
    (?<=://)[^/\s@]+(?=@)                                    # user:password@ in an address
    | \b(?:hf|sk|ghp|gho|pypi|wandb_v1|github_pat)[-_][\w-]{16,}  # tokens with a known prefix
    """,
    re.IGNORECASE | re.VERBOSE,
)
_SECRETS = re.compile(
    r"""
    \b[0-9a-f]{40}\b                                         # a wandb API key
    | (?<=bearer\ )\S+
    | (?:(?<=key=)|(?<=token=)|(?<=secret=)|(?<=password=))[^\s&]+
    """,
    re.IGNORECASE | re.VERBOSE,
)
_LIMIT = 500


def one_line(error: BaseException | str) -> str:
    """The error's type and message on one line of at most 500 characters, without secrets.

    Secrets are the values of environment variables whose names speak of keys, tokens or passwords,
    and texts that look like credentials. Replaced by `[redacted]`.
    """
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}".rstrip(": ")
    text = " ".join(_SECRETS.sub("[redacted]", without_secrets(text)).split())
    return text if len(text) <= _LIMIT else text[: _LIMIT - 1] + "…"


def without_secrets(text: str) -> str:
    """The text without credentials, and without what environment variables hold of keys."""
    for value in _environment_secrets():
        text = text.replace(value, "[redacted]")
    return _CREDENTIALS.sub("[redacted]", text)


def redacted(value: Any) -> Any:
    """A JSON-able value, every text in it without secrets."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list) else value


def _environment_secrets() -> list[str]:
    """Values worth hiding, longest first; short ones would hide ordinary words."""
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    return sorted((value for value in found if len(value) >= 8), key=len, reverse=True)
