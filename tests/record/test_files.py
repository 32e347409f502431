"""Files of users and of other programs are read within limits."""

import pytest

from palimpsest import files
from palimpsest.errors import RequestError
from palimpsest.files import DEEPEST, parse_json, read_json, read_text


def test_json_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, {"é": null}]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, {"é": None}]}


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 1_000_000,
        b"[" * 5000 + b"]" * 5000,
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1),
        b"9" * 5000,
        b'{"a": "\xe9"}',
        "{}".encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b"",
        b"{}{}",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_json_that_cannot_be_read_is_a_value_error(tmp_path, raw):
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r".") as caught:
        read_json(path)
    assert len(str(caught.value)) < 300


def test_json_may_be_as_deep_as_the_limit():
    text = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(text)
    assert parse_json('["' + "[" * 500 + '"]') == ["[" * 500]


def test_larger_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 10)
    path = tmp_path / "a"
    path.write_text('"12345678"')
    assert read_json(path) == "12345678"
    assert read_text(path) == '"12345678"'
    path.write_text('"123456789"')
    with pytest.raises(ValueError, match=r"^more than 10 bytes$"):
        read_json(path)
    with pytest.raises(RequestError, match=r"^expected at most 10 bytes in .*, found more; divide"):
        read_text(path)


def test_a_text_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(
        RequestError, match=r"^expected UTF-8 text in .*a\.txt, found .* at byte 3;"
    ):
        read_text(path)
