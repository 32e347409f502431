from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from palimpsest.model.forward import forward
from palimpsest.model.handle import ModelHandle
from palimpsest.model.partial import Resume
from palimpsest.model.site import Part, Site
from palimpsest.model.tokens import Batch, collate
from tests.model.tiny import make_handle, ragged, relative

LENGTHS = [len(row.ids) for row in ragged()]

STARTS = {
    "each row its own": [3, 0, 11, 2, 8, 1, 2],
    "the first token": [0] * 7,
    "the last token": [length - 1 for length in LENGTHS],
    "one for all": [2] * 7,
}

Hook = Callable[[Tensor], Tensor]


@pytest.fixture
def batch() -> Batch:
    """Rows of 3 to 12 tokens, padded on the right."""
    return collate(ragged(), torch.device("cpu"))


@pytest.fixture
def pushes() -> Tensor:
    """What is added, for each row."""
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(3)) * 3


def push(handle: ModelHandle, starts: Tensor, pushes: Tensor, onward: bool = False) -> Hook:
    """Adds to each row at its start, or from there on."""

    def hook(states: Tensor) -> Tensor:
        assert handle.running is not None
        at = handle.running.positions
        here = at >= starts[:, None] if onward else at == starts[:, None]
        return states + here[..., None] * pushes[:, None]

    return hook


def compared(full: Tensor, resumed: Tensor, starts: list[int]) -> float:
    """The largest relative difference at the tokens that both passes have."""
    pairs = [
        (resumed[n, : length - start], full[n, start:length])
        for n, (start, length) in enumerate(zip(starts, LENGTHS, strict=True))
    ]
    return max(relative(mine, whole) for mine, whole in pairs)


@pytest.mark.parametrize("onward", [False, True])
@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("name", STARTS)
@torch.no_grad()
def test_resuming_equals_the_full_pass(
    handle: ModelHandle, batch: Batch, pushes: Tensor, name: str, layer: int, onward: bool
) -> None:
    starts = torch.tensor(STARTS[name])
    part: Part = "residual" if onward else "mlp"
    hooks = [(handle.module(Site(layer, part)), push(handle, starts, pushes, onward))]
    plain = forward(handle, batch)
    with handle.hooked(hooks):
        full = forward(handle, batch)
    assert compared(full, plain, [0] * 7) > 0.1  # the change matters

    resume = Resume.capture(handle, batch, layer, starts)
    with handle.hooked(hooks):
        resumed = resume.run(handle)

    assert compared(full, resumed, STARTS[name]) < 1e-5


@torch.no_grad()
def test_resuming_without_a_change_gives_the_unchanged_states(
    handle: ModelHandle, batch: Batch
) -> None:
    starts = STARTS["each row its own"]
    resume = Resume.capture(handle, batch, 2, torch.tensor(starts))
    assert compared(forward(handle, batch), resume.run(handle), starts) < 1e-5


@torch.no_grad()
def test_a_change_at_a_later_block_is_felt_too(
    handle: ModelHandle, batch: Batch, pushes: Tensor
) -> None:
    starts = STARTS["each row its own"]
    hooks = [(handle.blocks[3], push(handle, torch.tensor(starts), pushes))]
    resume = Resume.capture(handle, batch, 1, torch.tensor(starts))
    with handle.hooked(hooks):
        assert compared(forward(handle, batch), resume.run(handle), starts) < 1e-5


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("layer", [0, 2])
def test_gradients_are_those_of_the_full_pass(
    handle: ModelHandle, batch: Batch, pushes: Tensor, name: str, layer: int
) -> None:
    starts = torch.tensor(STARTS[name])
    read = torch.randn(7, 12, 32, generator=torch.Generator().manual_seed(4))
    gradients = []
    for resumed in (False, True):
        leaf = pushes.clone().requires_grad_(True)
        resume = Resume.capture(handle, batch, layer, starts)
        site = handle.module(Site(layer, "mlp"))
        with handle.hooked([(site, push(handle, starts, leaf))]):
            states = resume.run(handle) if resumed else forward(handle, batch)
        loss = torch.zeros(())
        for n, (start, length) in enumerate(zip(STARTS[name], LENGTHS, strict=True)):
            mine = states[n, : length - start] if resumed else states[n, start:length]
            loss = loss + (mine * read[n, start:length]).sum()
        loss.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert float(gradients[0].norm(dim=1).min()) > 1e-2
    assert relative(gradients[1], gradients[0]) < 1e-4


@torch.no_grad()
def test_running_changes_nothing_that_was_kept(
    handle: ModelHandle, batch: Batch, pushes: Tensor
) -> None:
    starts = torch.tensor(STARTS["each row its own"])
    resume = Resume.capture(handle, batch, 2, starts)
    kept = [resume.states.clone(), *(x.clone() for pair in resume.cached.values() for x in pair)]
    with handle.hooked([(handle.blocks[2], push(handle, starts, pushes))]):
        first = resume.run(handle)
        second = resume.run(handle)
    now = [resume.states, *(x for pair in resume.cached.values() for x in pair)]
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_only_what_is_needed_is_kept(handle: ModelHandle, batch: Batch) -> None:
    resume = Resume.capture(handle, batch, 2, torch.tensor(STARTS["each row its own"]))
    assert sorted(resume.cached) == [0, 2, 3]
    assert resume.states.shape == (7, 6, 32)  # the longest rest has 6 tokens
    assert all(keys.shape[2] == 11 for keys, _ in resume.cached.values())
    assert not resume.states.requires_grad


def test_the_blocks_below_are_not_run(handle: ModelHandle, batch: Batch) -> None:
    resume = Resume.capture(handle, batch, 2, torch.tensor([1] * 7))
    ran: list[int] = []
    for layer in range(4):
        site = handle.module(Site(layer, "mlp"))
        site.register_forward_hook(lambda *_, at=layer: ran.append(at))
    with torch.no_grad():
        resume.run(handle)
    assert ran == [2, 3]


@torch.no_grad()
def test_the_model_is_whole_again_after_a_run(handle: ModelHandle, batch: Batch) -> None:
    before = forward(handle, batch)
    Resume.capture(handle, batch, 3, torch.tensor([1] * 7)).run(handle)
    assert all("forward" not in vars(block) for block in handle.blocks)
    assert torch.equal(forward(handle, batch), before)


@torch.no_grad()
def test_the_model_is_whole_again_after_an_error(handle: ModelHandle, batch: Batch) -> None:
    before = forward(handle, batch)
    resume = Resume.capture(handle, batch, 2, torch.tensor([1] * 7))

    def interrupt(_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with handle.hooked([(handle.blocks[2], interrupt)]):
        with pytest.raises(KeyboardInterrupt):
            resume.run(handle)
        with pytest.raises(KeyboardInterrupt):
            Resume.capture(handle, batch, 2, torch.tensor([1] * 7))
    assert handle.running is None
    for block in handle.blocks:
        assert "forward" not in vars(block)
        assert not block._forward_hooks
        assert not block._forward_pre_hooks
    assert torch.equal(forward(handle, batch), before)


@torch.no_grad()
def test_padding_asks_for_no_position_that_the_model_lacks(batch: Batch) -> None:
    handle = make_handle("gpt2", n_positions=12)  # as long as the longest row
    starts = [0, 0, 11, 0, 0, 0, 0]
    resume = Resume.capture(handle, batch, 1, torch.tensor(starts))
    assert compared(forward(handle, batch), resume.run(handle), starts) < 1e-5
