"""From disk: in any precision, and with weights that stay in CPU memory or on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import AutoModelForCausalLM

from palimpsest.errors import RequestError
from palimpsest.intervene.changes.deltas import BiasShift
from palimpsest.intervene.intervention import Intervention
from palimpsest.model.forward import forward, logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.model.partial import Resume
from palimpsest.model.site import NORMS, Change, Site
from palimpsest.model.tokens import Batch
from tests.architectures.changes import LAYER, make_deltas, make_eraser, make_folded
from tests.architectures.tiny import TINY, WIDTH, close, make_handle, make_model, padded, ragged

Checkpoint = Callable[[str], Path]


@torch.no_grad()
def test_a_saved_checkpoint_is_the_model(
    name: str, handle: ModelHandle, checkpoint: Checkpoint
) -> None:
    loaded = Pretrained(path=str(checkpoint(name)), device="cpu").load()
    batch = padded(ragged(), "right")
    assert loaded.fingerprint == handle.fingerprint
    assert torch.equal(forward(loaded, batch), forward(handle, batch))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_half_precision_is_a_setting(name: str, dtype: str, checkpoint: Checkpoint) -> None:
    loaded = Pretrained(path=str(checkpoint(name)), dtype=dtype).load()
    batch = padded(ragged(), "right")
    plain, weight = forward(loaded, batch), loaded.w_out(LAYER).clone()
    assert {plain.dtype, weight.dtype} == {getattr(torch, dtype)}
    assert logits(loaded, plain).dtype == torch.float32
    for independent in (True, False):
        with make_deltas(loaded, len(ragged()), independent).applied(loaded):
            changed = forward(loaded, batch)
        assert changed.isfinite().all()
        assert not close(changed, plain, 0.01)
    with make_eraser(loaded, "residual", "all_but_sink").applied(loaded):
        assert forward(loaded, batch).dtype == plain.dtype
    assert torch.equal(loaded.w_out(LAYER), weight)
    assert torch.equal(forward(loaded, batch), plain)


# -- weights elsewhere -----------------------------------------------------------------------------


def on_disk(name: str, checkpoint: Checkpoint) -> ModelHandle:
    """Every block but the first on disk, the rest on the CPU."""
    plain = make_handle(name)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), device_map=device_map(plain))
    return ModelHandle(model, plain.tokenizer, name)


def in_memory(name: str, checkpoint: Checkpoint) -> ModelHandle:
    """Every weight in CPU memory, fetched to the device that the model runs on."""
    plain = make_handle(name)
    cpu_offload(plain.model, torch.device("cpu"))
    return ModelHandle(plain.model, plain.tokenizer, name)


def device_map(handle: ModelHandle) -> dict[str, str]:
    """By module name: blocks 1 and up on disk; modules that hold no block on the CPU."""
    names = {module: name for name, module in handle.model.named_modules()}
    where: dict[str, str] = {}

    def place(module: torch.nn.Module) -> None:
        if module in handle.blocks:
            where[names[module]] = "cpu" if module is handle.blocks[0] else "disk"
        elif set(handle.blocks) & set(module.modules()):
            for child in module.children():
                place(child)
        else:
            where[names[module]] = "cpu"

    place(handle.model)
    return where


@pytest.mark.parametrize("load", [on_disk, in_memory])
@torch.no_grad()
def test_offloaded_weights_are_read_changed_and_restored(
    name: str,
    handle: ModelHandle,
    load: Callable[[str, Checkpoint], ModelHandle],
    checkpoint: Checkpoint,
) -> None:
    away = load(name, checkpoint)
    batch = padded(ragged(), "right")
    plain = forward(handle, batch)
    assert away.module(Site(LAYER, "mlp")).weight.is_meta
    assert away.device == torch.device("cpu")
    assert away.fingerprint == handle.fingerprint
    assert torch.equal(forward(away, batch), plain)
    assert torch.equal(logits(away, plain), logits(handle, plain))
    assert torch.equal(away.w_out(LAYER), handle.w_out(LAYER))
    for change in (
        make_deltas(handle, len(ragged()), independent=True),
        make_deltas(handle, 1, independent=False),
        make_eraser(handle, "attention", "all_but_sink"),
        *in_place(name, handle),
    ):
        with change.applied(handle), change.applied(away):
            changed = forward(handle, batch)
            assert torch.equal(forward(away, batch), changed)
        assert not close(changed, plain)
        assert torch.equal(forward(away, batch), plain)
    assert torch.equal(away.w_out(LAYER), handle.w_out(LAYER))


def in_place(name: str, handle: ModelHandle) -> list[Intervention]:
    """Changes of biases, and of what reads norms."""
    found: list[Intervention] = []
    if TINY[name].norms:
        found += [make_folded(handle, make_eraser(handle, part, "all")) for part in NORMS]
    if getattr(handle.module(Site(LAYER, "mlp")), "bias", None) is not None:
        change, shift = Change("relation", False, LAYER), torch.linspace(-1, 1, WIDTH)
        found.append(BiasShift(change=change, model=handle.fingerprint, shift=shift))
    return found


def test_partial_passes_run_on_offloaded_weights(name: str, checkpoint: Checkpoint) -> None:
    away = on_disk(name, checkpoint)
    whole = padded(ragged(), "right")
    own = [vars(block)["forward"] for block in away.blocks]  # accelerate's
    here = gradient(make_handle(name), whole)
    assert close(gradient(away, whole), here)
    assert here.abs().max() > 0
    assert [vars(block)["forward"] for block in away.blocks] == own


def gradient(handle: ModelHandle, whole: Batch) -> Tensor:
    """Of something read from final states, with respect to what W_out gives."""
    delta = torch.zeros(WIDTH, requires_grad=True)
    resume = Resume.capture(handle, whole, LAYER, whole.subject_last)
    with handle.hooked([(handle.module(Site(LAYER, "mlp")), lambda states: states + delta)]):
        states = resume.run(handle)
    (states[:, 0] @ torch.linspace(-1, 1, states.shape[-1])).sum().backward()
    assert delta.grad is not None
    return delta.grad


def test_a_device_beside_a_device_map_is_refused() -> None:
    with pytest.raises(RequestError, match=r"model\.device or model\.device_map, found both"):
        Pretrained(device="cpu", device_map="auto")


@torch.no_grad()
def test_accelerate_may_place_the_model(checkpoint: Checkpoint) -> None:
    plain = make_handle("gpt2")
    placed = Pretrained(path=str(checkpoint("gpt2")), device_map="auto").load()
    batch = padded(ragged(), "right")
    assert close(forward(placed, batch), forward(plain, batch))


def test_a_device_map_that_is_none_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        RequestError, match=r"found everywhere.*; check model\.device_map, set model"
    ):
        Pretrained(path=str(checkpoint("gpt2")), device_map="everywhere").load()


def test_blocks_on_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt2")
    second = make_handle("gpt2").blocks[1]
    model.transformer.h[1] = second.to("meta")
    with pytest.raises(
        RequestError, match=r"expected all blocks to run on cpu, .* layer 1 on meta"
    ):
        ModelHandle(model, make_handle("gpt2").tokenizer, "split")
