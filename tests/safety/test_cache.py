"""Tensors of the cache are computed once, whoever asks for them at the same time."""

import errno
import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from palimpsest.cache import cached_tensors, in_one_pass
from tests.safety.test_locks import until

KEYS = [{"part": "a"}, {"part": "b"}]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never() -> dict[str, torch.Tensor]:
    raise AssertionError("it was computed again")


def both(work) -> list:
    """What two threads get that do the same."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda _: work(), range(2)))


def check_made_once(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever computes does so until the other is seen to wait."""
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        until(lambda: "it computes values" in caplog.text)
        return {"a": torch.ones(3)}

    first, second = both(lambda: cached_tensors("values", KEYS[0], make)["a"])
    assert len(made) == 1
    assert torch.equal(first, second)
    assert "waiting for " in caplog.text


def test_two_that_ask_at_once_compute_once(own_cache, caplog):
    check_made_once(caplog)
    assert [path.suffix for path in own_cache.rglob("*.*")] == [".safetensors"]


def test_a_damaged_entry_is_made_anew_once(own_cache, caplog):
    cached_tensors("values", KEYS[0], lambda: {"a": torch.zeros(3)})
    [file] = own_cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    check_made_once(caplog)
    assert cached_tensors("values", KEYS[0], never)["a"].tolist() == [1.0] * 3


def test_without_kernel_locks_they_compute_once_and_leave_one_file_more(
    own_cache, caplog, monkeypatch
):
    def no_flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    check_made_once(caplog)
    assert len([path for path in own_cache.rglob("*") if path.is_file()]) == 2


def test_who_fails_leaves_the_entry_to_the_next(own_cache):
    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        cached_tensors("values", KEYS[0], fail)
    assert cached_tensors("values", KEYS[0], lambda: {"a": torch.ones(1)})["a"].tolist() == [1.0]


def test_what_is_made_in_one_pass_is_not_begun_again_in_its_middle(own_cache, caplog):
    begun = threading.Event()

    def first() -> None:
        with in_one_pass("values", KEYS):
            cached_tensors("values", KEYS[0], lambda: {"a": torch.zeros(1)})
            begun.set()
            until(lambda: "it computes values" in caplog.text)
            cached_tensors("values", KEYS[1], lambda: {"a": torch.ones(1)})

    def second() -> list[float]:
        assert begun.wait(60)
        with in_one_pass("values", KEYS[::-1]):
            return [cached_tensors("values", key, never)["a"].item() for key in KEYS]

    with ThreadPoolExecutor(2) as pool:
        done, found = pool.submit(first), pool.submit(second)
        done.result()
        assert found.result() == [0.0, 1.0]


def test_a_pass_that_has_nothing_to_do_locks_nothing(own_cache, monkeypatch):
    for key in KEYS:
        cached_tensors("values", key, lambda: {"a": torch.zeros(1)})
    monkeypatch.setattr("palimpsest.cache.held", never)
    with in_one_pass("values", KEYS):
        assert cached_tensors("values", KEYS[0], never)["a"].item() == 0.0
