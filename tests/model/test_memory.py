"""Batches that fit: halved where memory runs out, and nothing else changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Prompt
from palimpsest.model.forward import features, keys, next_token_logprobs, score
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import default_rows, within_memory
from palimpsest.model.site import Site
from palimpsest.model.tokens import Tokens
from tests.model.tiny import make_handle

WORDS = ("Paris", "the city of Rome", "Oslo", "a small village", "Lima", "New York", "Ur")


def rows(handle: ModelHandle) -> list[Tokens]:
    return [handle.encode(Prompt.fill("p", "I saw {} once", word), "France") for word in WORDS]


def small_memory(handle: ModelHandle, most: int) -> list[int]:
    """Let the model run out of memory on more than so many rows; what it was asked for."""
    asked: list[int] = []

    def refuse(states: Tensor) -> None:
        asked.append(len(states))
        if len(states) > most:
            raise torch.OutOfMemoryError("none left")

    handle.blocks[0].register_forward_pre_hook(lambda module, args: refuse(args[0]))
    return asked


WORK: list[Callable[[ModelHandle], object]] = [
    lambda handle: features(handle, rows(handle), [Site(1)], ["last_subject"]).tolist(),
    lambda handle: keys(handle, rows(handle), 1)[0].tolist(),
    lambda handle: [found.logprob for found in score(handle, rows(handle))],
    lambda handle: next_token_logprobs(handle, rows(handle)).exp().tolist(),
]


@pytest.mark.parametrize("work", WORK)
def test_the_batch_is_halved_until_it_fits(work: Callable[[ModelHandle], list[float]]) -> None:
    roomy, tight = make_handle("llama"), make_handle("llama")
    roomy.batch_size = tight.batch_size = 7
    asked = small_memory(tight, most=2)
    expected, found = torch.tensor(work(roomy)), torch.tensor(work(tight))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert asked[0] > 2
    assert tight.batch_size == 1 or max(asked[-2:]) <= 2
    assert tight.batch_size in (1, 2, 3)
    assert tight.running is None


def test_a_model_that_cannot_hold_one_row_is_refused() -> None:
    handle = make_handle("gpt2")
    small_memory(handle, most=0)
    with pytest.raises(RequestError, match=r"expected cpu to hold one row.*model\.dtype=bfloat16"):
        score(handle, rows(handle))


def test_other_errors_pass_through() -> None:
    handle = make_handle("gpt2")

    @within_memory
    def fail(handle: ModelHandle) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        fail(handle)
    assert handle.batch_size == make_handle("gpt2").batch_size


def test_rows_by_device() -> None:
    assert default_rows(torch.device("cuda")) > default_rows(torch.device("cpu")) > 1
