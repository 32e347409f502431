"""A changed model in other people's hands: plain forward passes and `generate`, every row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from palimpsest.apply import Chosen, apply
from palimpsest.intervene.changes.composition import Composition
from palimpsest.intervene.intervention import Intervention
from palimpsest.model.forward import forward, greedy, logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.model.tokens import Batch, Tokens, collate
from tests.architectures.changes import make_deltas, make_eraser, make_folded
from tests.architectures.tiny import TINY, close, make_handle, padded, ragged, unpadded

NEW = 6
"""Tokens that are generated: rows then pass the sliding window, and so does the longest prompt."""

LEFT = padded(ragged(), "left")
RIGHT = padded(ragged(), "right")
RELATIVE = [name for name in TINY if name != "gpt2"]
"""Models that need no position ids where rows are padded on the left."""


def said(handle: ModelHandle, batch: Batch, **given: Any) -> list[Tensor]:
    """The model's logits of each row's own tokens, by other people's call of it."""
    return unpadded(handle.model(**given).logits, batch)


def alike(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(close(*pair) for pair in zip(found, wanted, strict=True))


@pytest.fixture
def wanted(handle: ModelHandle) -> list[Tensor]:
    """Each row's logits by our own pass of a model that carries an eraser."""
    with torch.no_grad(), make_eraser(handle, "residual", "all_but_sink").applied(handle):
        return unpadded(logits(handle, forward(handle, RIGHT)), RIGHT)


# -- erasure ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_eraser_acts_in_a_plain_forward_pass(
    name: str, handle: ModelHandle, wanted: list[Tensor]
) -> None:
    embedded = handle.model.get_input_embeddings()(LEFT.ids)
    masked = {"attention_mask": LEFT.mask, "position_ids": LEFT.positions}
    with make_eraser(handle, "residual", "all_but_sink").applied(handle):
        assert alike(said(handle, RIGHT, input_ids=RIGHT.ids), wanted)
        given = {"input_ids": RIGHT.ids, "attention_mask": RIGHT.mask}
        assert alike(said(handle, RIGHT, **given), wanted)
        assert alike(said(handle, LEFT, input_ids=LEFT.ids, **masked), wanted)
        assert alike(said(handle, LEFT, inputs_embeds=embedded, **masked), wanted)
        if name in RELATIVE:
            given = {"input_ids": LEFT.ids, "attention_mask": LEFT.mask}
            assert alike(said(handle, LEFT, **given), wanted)
    assert not alike(said(handle, RIGHT, input_ids=RIGHT.ids), wanted)


@pytest.mark.parametrize("part", ["residual", "mlp", "attention"])
@torch.no_grad()
def test_every_token_of_every_part_can_be_erased(part: Any, handle: ModelHandle) -> None:
    with make_eraser(handle, part, "all").applied(handle):
        wanted = unpadded(logits(handle, forward(handle, RIGHT)), RIGHT)
        given = {"attention_mask": LEFT.mask, "position_ids": LEFT.positions}
        assert alike(said(handle, LEFT, input_ids=LEFT.ids, **given), wanted)
    with make_eraser(handle, part, "all_but_sink").applied(handle):
        assert not alike(said(handle, RIGHT, input_ids=RIGHT.ids), wanted)


def generated(handle: ModelHandle, **more: Any) -> Any:
    torch.manual_seed(0)
    given = {"attention_mask": LEFT.mask, "max_new_tokens": NEW, "pad_token_id": 0}
    kept = {"output_logits": True, "return_dict_in_generate": True}
    return handle.model.generate(LEFT.ids, **given, **kept, **{"do_sample": False, **more})


@pytest.mark.parametrize(
    "how", [{}, {"do_sample": True}, {"cache_implementation": "static"}], ids=str
)
@torch.no_grad()
def test_an_eraser_acts_while_text_is_generated(how: dict[str, Any], handle: ModelHandle) -> None:
    """Each new token's logits are those of the whole text so far, computed anew."""
    with make_eraser(handle, "residual", "all_but_sink").applied(handle):
        found = generated(handle, **how)
        texts = found.sequences[:, LEFT.ids.shape[1] :].tolist()
        assert how or texts == [list(text) for text in greedy(handle, ragged(), NEW)]
        rows = [Tokens((*r.ids, *t), r.prompt) for r, t in zip(ragged(), texts, strict=True)]
        whole = logits(handle, forward(handle, collate(rows, handle.device)))
    for n, row in enumerate(ragged()):
        anew = whole[n, row.prompt - 1 : row.prompt - 1 + NEW]
        assert close(torch.stack([step[n] for step in found.logits]).float(), anew)


@torch.no_grad()
def test_an_eraser_acts_in_beam_search(handle: ModelHandle) -> None:
    with make_eraser(handle, "residual", "all_but_sink").applied(handle):
        found = generated(handle, num_beams=3).sequences
        assert torch.equal(found, generated(handle, num_beams=3, use_cache=False).sequences)
    assert not torch.equal(found, generated(handle, num_beams=3).sequences)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
@torch.no_grad()
def test_an_eraser_acts_in_half_precision(name: str) -> None:
    half = make_handle(name)
    half = ModelHandle(half.model.to(torch.bfloat16), half.tokenizer, name)
    with make_eraser(half, "residual", "all_but_sink").applied(half):
        own = unpadded(logits(half, forward(half, RIGHT)), RIGHT)
        found = said(half, RIGHT, input_ids=RIGHT.ids, attention_mask=RIGHT.mask)
    assert all(torch.equal(a.float(), b) for a, b in zip(found, own, strict=True))


# -- changes of weights ----------------------------------------------------------------------------


def edit(handle: ModelHandle) -> Intervention:
    return make_deltas(handle, 3, independent=True).alone(1)


def fold(handle: ModelHandle) -> Intervention:
    return make_folded(handle, make_eraser(handle, "mlp_norm", "all"))


CHANGES = [(name, edit) for name in TINY] + [(n, fold) for n, tiny in TINY.items() if tiny.norms]


@pytest.mark.parametrize(("name", "make"), CHANGES)
@torch.no_grad()
def test_weights_are_changed_as_in_the_directory_that_apply_writes(
    name: str,
    make: Callable[[ModelHandle], Intervention],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    handle = make_handle(name)
    change = make(handle)
    chosen = Chosen(change, change.digest, change.kind, None, None, None)
    apply(Pretrained(path=str(checkpoint(name)), device="cpu"), chosen, tmp_path / "changed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "changed").eval()
    there = ModelHandle(model, handle.tokenizer, name)
    given = {"input_ids": LEFT.ids, "attention_mask": LEFT.mask}
    plain = handle.model(**given).logits
    with change.applied(handle):
        found = handle.model(**given).logits
        assert torch.equal(found, there.model(**given).logits)
        assert torch.equal(generated(handle).sequences, generated(there).sequences)
    assert torch.equal(handle.model(**given).logits, plain)
    assert not close(found, plain)


@torch.no_grad()
def test_the_owners_change_is_felt_by_every_row(handle: ModelHandle) -> None:
    deltas = make_deltas(handle, 5, independent=True)
    with deltas.applied(handle):
        own = unpadded(logits(handle, forward(handle, RIGHT)), RIGHT)
    for owner in range(3):
        with deltas.applied(handle, owner=owner):
            found = said(handle, RIGHT, input_ids=RIGHT.ids, attention_mask=RIGHT.mask)
            ours = unpadded(logits(handle, forward(handle, RIGHT)), RIGHT)
        with deltas.alone(owner).applied(handle):
            really = said(handle, RIGHT, input_ids=RIGHT.ids, attention_mask=RIGHT.mask)
        assert all(torch.equal(*pair) for pair in zip(found, really, strict=True))
        assert alike(ours, found)  # whatever owners the rows bring
        assert [close(a, b) for a, b in zip(found, own, strict=True)].index(True) == owner


@torch.no_grad()
def test_an_owner_is_named_of_edits_beside_an_eraser(handle: ModelHandle) -> None:
    deltas = make_deltas(handle, 5, independent=True)
    eraser = make_eraser(handle, "residual", "all_but_sink")
    both = Composition(change=deltas.change, model=deltas.model, parts=(deltas, eraser))
    with both.applied(handle):
        own = unpadded(logits(handle, forward(handle, RIGHT)), RIGHT)
    with both.applied(handle, owner=2):
        found = said(handle, RIGHT, input_ids=RIGHT.ids, attention_mask=RIGHT.mask)
    assert close(found[2], own[2])
    assert not close(found[0], own[0])
