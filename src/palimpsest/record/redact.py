"""What looks like a secret, and texts without it: one line about an error, fit to be kept."""

import os
import re
from collections.abc import Iterator
from typing import Any

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:[a-z]*key|[a-z]*token|secret|passw\w*|passphrase|credential|pat)s?(?:_|$)",
    re.IGNORECASE,
)
"""Environment variables of such names hold secrets."""

_KEY = re.compile(
    r"""
    (?:^|_) (?:secrets?|passwords?|passwd|passphrase|credentials?
             | (?:api|access|private|secret|auth|ssh)_?keys?) $
    | (?:^|_) (?:hf|hub|huggingface|hugging_face|wandb|api|access|auth|bearer|refresh|session
               |github|gitlab|secret|user)_?token $
    | ^token $
    """,
    re.VERBOSE,
)
"""The last word of a setting that holds a credential; `row_tokens` and `last_token` hold none."""

_CREDENTIALS = re.compile(
    r"""
    (?<=://)[^/\s@]+(?=@)                                    # user:password@ in an address
    | (?<=[?&])(?:[a-z_]*token|api_?key|key|secret|password)=[^\s&#'"]+  # and in its query
    | \bhf_[a-z0-9]{20,}                                     # tokens with a known prefix
    | \bgh[opusr]_[a-z0-9]{20,} | \bgithub_pat_\w{20,}
    | \bglpat-[\w-]{16,}
    | \bsk-(?:[\w-]*-)?(?=\w*\d)\w{16,}
    | \bxox[a-z]-[\w-]{10,}
    | (?-i:\b(?:AKIA|ASIA)[A-Z0-9]{16}\b)
    | \bAIza[\w-]{30,}
    | \bnpm_[a-z0-9]{30,} | \bpypi-(?=[\w-]*\d)[\w-]{32,}
    | \bwandb_v1_\w{16,}
    | \b(?:gsk_|nvapi-|r8_|dop_v1_|hvs\.|dckr_pat_|ya29\.)[\w-]{24,}
    | (?<=hooks\.slack\.com/services/)[\w/]+
    | \beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?                 # JSON Web Tokens
    | -----BEGIN\ [A-Z0-9\ ]+-----(?:.*?-----END\ [A-Z0-9\ ]+-----|.*)  # keys in PEM
    """,
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_SECRETS = re.compile(
    r"""
    \b[0-9a-f]{40}\b                                         # a wandb API key
    | (?<=bearer\ )\S+
    | (?:(?<=key=)(?<!measure_key=)|(?<=token=)|(?<=secret=)|(?<=password=))[^\s&]+
    """,
    re.IGNORECASE | re.VERBOSE,
)
_WORD = re.compile(r"(?<![\w/\\.~+-])[\w+-]{24,}(?![\w/\\]|\.\w)", re.ASCII)
"""Long words that are no part of a path or file name."""

_RUN = re.compile(r"[A-Za-z0-9]{16,}")
_PIECE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
_HEXADECIMAL = re.compile(r"[0-9a-fA-F]+")
_READABLE = re.compile(r"[A-Z]?[a-z]{3,}")

_LIMIT = 500
_HIDDEN = "[redacted]"


def one_line(error: BaseException | str) -> str:
    """The error's type and message on one line of at most 500 characters, without secrets.

    Secrets are the values of environment variables whose names speak of keys, tokens or passwords,
    and texts that look like credentials. Replaced by `[redacted]`.
    """
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}".rstrip(": ")
    text = " ".join(_SECRETS.sub(_HIDDEN, without_secrets(text)).split())
    return text if len(text) <= _LIMIT else text[: _LIMIT - 1] + "…"


def without_secrets(text: str) -> str:
    """The text without credentials, and without what environment variables hold of keys."""
    for value in environment_secrets():
        text = text.replace(value, _HIDDEN)
    text = _CREDENTIALS.sub(_HIDDEN, text)
    return _WORD.sub(lambda word: _HIDDEN if is_random(word[0]) else word[0], text)


def redacted(value: Any) -> Any:
    """A JSON-able value, every text in it without secrets, and those of secret keys left out."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {
            key: _HIDDEN if isinstance(item, str) and is_secret_key(str(key)) else redacted(item)
            for key, item in value.items()
        }
    return [redacted(item) for item in value] if isinstance(value, list) else value


def is_secret_key(name: str) -> bool:
    """Whether a setting's dotted name speaks of a credential: `hub.api_key`, `authToken`."""
    last = re.split(r"[./@]", name)[-1].replace("-", "_")
    return bool(_KEY.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", last).lower()))


def credentials(text: str) -> Iterator[str]:
    """What in a text looks like a credential: a known form, or a long word of no language.

    Hashes in hexadecimal, parts of paths and names made of words are none.
    """
    yield from (found[0] for found in _CREDENTIALS.finditer(text))
    yield from (word for word in _WORD.findall(text) if is_random(word))


def is_random(word: str) -> bool:
    """Whether upper case, lower case and digits alternate as in a random text, not as in a name.

    Of random texts of 24 characters nine in ten are found, of 40 characters nineteen in twenty.
    """
    return any(map(_alternates, _RUN.findall(word)))


def _alternates(run: str) -> bool:
    digits = sum(map(str.isdigit, run))
    one_case = run in (run.upper(), run.lower())
    if not digits or (one_case and (len(run) < 30 or _HEXADECIMAL.fullmatch(run))):
        return False
    readable = sum(map(len, _READABLE.findall(run)))
    pieces = len(_PIECE.findall(run))
    few_digits = digits < (0.6 if one_case else 0.35) * len(run)
    return len(run) < 2.6 * pieces and readable < 0.45 * len(run) and few_digits


def environment_secrets() -> list[str]:
    """Values worth hiding, longest first; short ones would hide ordinary words."""
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    return sorted((value for value in found if len(value) >= 8), key=len, reverse=True)
