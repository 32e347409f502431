from pathlib import Path

import pytest

from palimpsest.errors import RequestError
from palimpsest.facts.lines import LONGEST, Problem, read


def lines(path: Path, content: bytes) -> list[object]:
    path = path / "x.jsonl"
    path.write_bytes(content)
    return [(n, str(value) if isinstance(value, Problem) else value) for n, value in read(path)]


def test_values_are_numbered_and_blank_lines_passed_over(tmp_path: Path) -> None:
    assert lines(tmp_path, b'{"a": 1}\r\n\n  \n[2]\n3') == [(1, {"a": 1}), (4, [2]), (5, 3)]
    assert lines(tmp_path, b"") == []


def test_a_byte_order_mark_is_told_and_the_line_still_read(tmp_path: Path) -> None:
    (first, told), second = lines(tmp_path, b"\xef\xbb\xbf1\n")
    assert (first, second) == (1, (1, 1))
    assert told == (
        "line 1: expected plain UTF-8, found a byte order mark before the text; save without it"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"\xff"', "expected UTF-8, found byte 0xff at place 2; save the file as UTF-8"),
        (b"{'a': 1}", "found Expecting property name enclosed in double quotes at column 2"),
        (b"NaN", "expected one JSON value on the line, found NaN, which is not JSON; correct"),
        (b"[-Infinity]", "found -Infinity, which is not JSON"),
        (b'{"a": 1, "a": 2}', "found the key 'a' twice in one object"),
        (b"1" * 5000, "found Exceeds the limit"),
        (b"[" * 100_000, "found brackets nested too deeply"),
        (b'"\x00"', "found Invalid control character at"),
        (b"1 2", "found Extra data at column 3"),
    ],
)
def test_problems(tmp_path: Path, content: bytes, message: str) -> None:
    (one, told), two = lines(tmp_path, content + b"\n2\n")
    assert (one, two) == (1, (2, 2))
    assert message in str(told)
    assert "\n" not in str(told)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_line_too_long_is_skipped_whole(tmp_path: Path, times: int) -> None:
    (_, told), rest = lines(tmp_path, b"1" * (LONGEST * times + 1) + b"\n2\n")
    assert told == "line 1: expected at most 1000000 bytes, found more; split it"
    assert rest == (2, 2)


def test_the_longest_line_is_read(tmp_path: Path) -> None:
    text = b'"' + b"x" * (LONGEST - 2) + b'"'
    assert lines(tmp_path, text + b"\n2") == [(1, "x" * (LONGEST - 2)), (2, 2)]
    assert len(lines(tmp_path, text)) == 1


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone.jsonl"):
        with pytest.raises(RequestError, match=r"expected a JSONL file at .*, found none; correct"):
            list(read(path))
