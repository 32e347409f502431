"""What a call of the model by other code tells of its tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from palimpsest.errors import RequestError
from palimpsest.model.calls import Call, followed, forwards
from palimpsest.model.forward import forward
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import ORACLE_POLICIES
from palimpsest.model.tokens import Tokens, collate

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()


def places(**given: Any) -> list[list[int]]:
    call = Call.of({"input_ids": IDS, **given})
    assert call is not None
    assert call.positions.shape == call.ids.shape == IDS.shape
    return call.positions.tolist()


def cache(length: int) -> DynamicCache:
    """Keys and values of two rows."""
    held = DynamicCache()
    held.update(torch.zeros(2, 1, length, 1), torch.zeros(2, 1, length, 1), 0)
    return held


def test_without_a_mask_a_tokens_place_is_its_column() -> None:
    assert places() == [[0, 1, 2, 3]] * 2
    assert places(past_key_values=cache(0)) == [[0, 1, 2, 3]] * 2
    assert places(past_key_values=cache(5)) == [[5, 6, 7, 8]] * 2


def test_padding_is_no_place() -> None:
    assert places(attention_mask=LEFT) == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert places(attention_mask=LEFT.bool().flip(1)) == [[0, 1, 1, 1], [0, 1, 2, 3]]
    assert places(attention_mask=LEFT * 0) == [[0, 0, 0, 0]] * 2
    hole = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]])
    assert places(attention_mask=hole) == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_a_padding_mask_goes_before_position_ids() -> None:
    columns = torch.arange(4)
    assert places(attention_mask=LEFT, position_ids=columns)[0] == [0, 0, 0, 1]
    assert places(position_ids=columns + 2) == [[2, 3, 4, 5]] * 2
    packed = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])
    assert places(position_ids=packed) == packed.tolist()


def test_cached_tokens_are_counted() -> None:
    whole = torch.cat([LEFT, torch.ones(2, 4)], 1)
    assert places(attention_mask=whole, past_key_values=cache(4)) == [[2, 3, 4, 5], [4, 5, 6, 7]]
    longer = torch.cat([whole, torch.zeros(2, 9)], 1)  # slots of a static cache
    assert places(attention_mask=longer, past_key_values=cache(4)) == [[2, 3, 4, 5], [4, 5, 6, 7]]
    assert places(attention_mask=whole[:, :6], past_key_values=cache(4))[0] == [2, 3, 3, 3]


@pytest.mark.parametrize(
    "made",
    [
        lambda seen: seen,
        lambda seen: torch.zeros(seen.shape).masked_fill(~seen, torch.finfo().min),
        lambda seen: {"full_attention": seen, "sliding_attention": seen & ~seen.tril(-2)},
        lambda seen: {"sliding_attention": seen},
    ],
    ids=["boolean", "added", "by kind", "one kind"],
)
def test_a_ready_attention_mask_tells_places(made: Callable[[Tensor], Any]) -> None:
    seen = CAUSAL & LEFT.bool()[:, None, None, :]
    assert places(attention_mask=made(seen)) == [[0, 0, 0, 1], [0, 1, 2, 3]]
    slots = torch.nn.functional.pad(seen, (0, 3))  # a static cache's
    assert places(attention_mask=made(slots)) == [[0, 0, 0, 1], [0, 1, 2, 3]]
    given = torch.arange(4) + 1
    assert places(attention_mask=made(seen), position_ids=given)[0] == [1, 2, 3, 4]


@pytest.mark.parametrize("mask", [None, {"full_attention": None}, {}, "of no known kind"], ids=str)
def test_a_mask_that_tells_nothing_leaves_the_columns(mask: Any) -> None:
    assert places(attention_mask=mask) == [[0, 1, 2, 3]] * 2


def test_embeddings_stand_for_tokens() -> None:
    call = Call.of({"inputs_embeds": torch.zeros(2, 4, 8), "attention_mask": LEFT})
    assert call is not None
    assert call.positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert call.ids.tolist() == [[0] * 4] * 2
    assert Call.of({}) is None


def test_what_a_call_does_not_tell_is_refused_in_a_line() -> None:
    call = Call.of({"input_ids": IDS})
    assert call is not None
    assert call.selects("all").all()
    assert call.selects("all_but_sink").tolist() == [[False, True, True, True]] * 2
    asked: list[Callable[[], object]] = [
        lambda: call.owners(),
        lambda: call.holds(torch.tensor([1])),
        *(lambda policy=policy: call.selects(policy) for policy in ORACLE_POLICIES),
    ]
    for ask in asked:
        with pytest.raises(RequestError, match=r"expected .* found a call by other code .*; ") as e:
            ask()
        assert "\n" not in str(e.value)


# -- while a pass lasts ----------------------------------------------------------------------------


@pytest.fixture
def seen(llama: ModelHandle) -> list[Any]:
    """What `running` is, pass by pass, in the last block."""
    found: list[Any] = []
    llama.blocks[-1].register_forward_pre_hook(lambda *_: found.append(llama.running))
    return found


@torch.no_grad()
def test_every_call_has_a_batch_of_its_own(llama: ModelHandle, seen: list[Any]) -> None:
    model, static = llama.model, StaticCache(llama.model.config, max_cache_len=8)
    with followed(llama):
        model(IDS)
        model(input_ids=IDS[:1], attention_mask=LEFT[:1])
        llama.decoder(IDS)
        model(IDS, past_key_values=static)
        model(IDS[:, :1], past_key_values=static)
        assert llama.running is None
    assert [call.ids.shape for call in seen] == [(2, 4), (1, 4), (2, 4), (2, 4), (2, 1)]
    assert seen[-1].positions.tolist() == [[4]] * 2
    model(IDS)
    assert seen[-1] is None


@torch.no_grad()
def test_our_own_pass_keeps_its_batch(llama: ModelHandle, seen: list[Any]) -> None:
    batch = collate([Tokens((3, 4, 5), 2, (0, 1), 7)], llama.device)
    with followed(llama):
        forward(llama, batch)
    assert seen == [batch]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@torch.no_grad()
def test_nothing_runs_after_an_error(
    error: type[BaseException], llama: ModelHandle, seen: list[Any]
) -> None:
    def fail(_: Tensor) -> None:
        raise error

    before = llama.model(IDS).logits
    with followed(llama):
        with pytest.raises(error), llama.hooked([(llama.blocks[0], fail)]):
            llama.model(IDS)
        assert llama.running is None
        assert torch.equal(llama.model(IDS[:1]).logits, before[:1])
        assert seen[-1].ids.shape == (1, 4)
    assert torch.equal(llama.model(IDS).logits, before)
    assert [m for m in llama.model.modules() if "forward" in vars(m)] == []


@torch.no_grad()
def test_what_the_model_itself_refuses_it_refuses_as_before(llama: ModelHandle) -> None:
    def told(*args: Any, **given: Any) -> str:
        with pytest.raises((TypeError, ValueError)) as refused:
            llama.model(*args, **given)
        return str(refused.value)

    calls: list[tuple[tuple, dict]] = [((), {}), ((IDS,), {"input_ids": IDS}), ((IDS,) * 99, {})]
    before = [told(*args, **given) for args, given in calls]
    with followed(llama):
        found = [told(*args, **given) for args, given in calls]
        assert found[:2] == before[:2]
        assert llama.running is None


def test_a_part_called_by_itself_has_no_batch(llama: ModelHandle) -> None:
    with followed(llama), pytest.raises(RequestError, match=r"expected a call of the whole model"):
        llama.under_way  # noqa: B018


def test_a_forward_method_of_an_instances_own_comes_back(llama: ModelHandle) -> None:
    block, plain = llama.blocks[0], llama.blocks[0].forward
    block.forward = plain
    with forwards([block, llama.blocks[1]], lambda _: str):  # type: ignore[arg-type]
        assert block.forward is str
    assert vars(block)["forward"] is plain
    assert "forward" not in vars(llama.blocks[1])
