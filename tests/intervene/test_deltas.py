"""A prompt feels its owner's delta exactly as it would feel the changed weight, and no other."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Prompt
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.model.forward import forward, next_token_logprobs, score
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site
from palimpsest.model.tokens import NOBODY, Tokens, collate
from tests.intervene.conftest import CONTEXTS, TARGETS, copy_of, splits

LAYER = 1
OWNERS = range(3)

PROMPTS = (
    *(fact.prompt for fact in TARGETS),
    Prompt.fill("other", "Where is {}? It is in", "Malonia"),
    Prompt("none", "Therefore"),
)
"""Of the targets, of another subject, of none; of many lengths."""


def deltas_of(
    handle: ModelHandle, rank: int = 1, independent: bool = True, scale: float = 1.0
) -> WeightDeltas:
    """Random deltas, large enough to matter."""
    width, generator = handle.w_out(LAYER).shape[1], torch.Generator().manual_seed(3)
    facts = len(OWNERS) if independent else 1
    return WeightDeltas(
        change=Change("fact", independent, LAYER),
        model=handle.fingerprint,
        left=torch.randn(facts, rank, width, generator=generator) / width**0.5,
        right=torch.randn(facts, rank, handle.width, generator=generator) * scale,
    )


def changed(handle: ModelHandle, matrix: Tensor) -> ModelHandle:
    """A copy whose weight, found by hand, is really changed."""
    copied = copy_of(handle)
    if copied.model.config.model_type == "gpt2":
        copied.model.transformer.h[LAYER].mlp.c_proj.weight.data += matrix.T
    else:
        copied.model.model.layers[LAYER].mlp.down_proj.weight.data += matrix
    return copied


def rows_of(handle: ModelHandle, owners: Sequence[int], completion: str = "") -> list[Tokens]:
    """Each prompt, its owners taking turns."""
    return [
        handle.encode(prompt, completion, owners[index % len(owners)])
        for index, prompt in enumerate(PROMPTS)
    ]


def states(handle: ModelHandle, rows: Sequence[Tokens]) -> list[Tensor]:
    """Final states at every token of every row, from one padded batch."""
    with torch.no_grad():
        final = forward(handle, collate(rows, handle.device))
    return [final[n, : len(row.ids)] for n, row in enumerate(rows)]


def distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Largest difference at any token."""
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


# -- each its own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("owner", OWNERS)
def test_rows_of_an_owner_run_as_if_the_weight_were_changed(
    model: ModelHandle, rank: int, owner: int
) -> None:
    deltas, rows = deltas_of(model, rank), rows_of(model, [owner])
    before = states(model, rows)
    with deltas.applied(model):
        felt = states(model, rows)
    expected = states(changed(model, deltas.matrix(owner)), rows)
    assert distance(felt, expected) < 1e-4
    assert all(float((a - b).abs().max()) > 0.1 for a, b in zip(felt, before, strict=True))


@pytest.mark.parametrize("shift", range(4))
def test_owners_mix_in_one_batch(model: ModelHandle, shift: int) -> None:
    owners = [*OWNERS, NOBODY]
    owners = owners[shift:] + owners[:shift]
    deltas, rows = deltas_of(model), rows_of(model, owners)
    with deltas.applied(model):
        felt = states(model, rows)
    for row, found in zip(rows, felt, strict=True):
        real = model if row.owner == NOBODY else changed(model, deltas.matrix(row.owner))
        assert distance([found], states(real, [row])) < 1e-4


def test_rows_of_nobody_feel_nothing(model: ModelHandle) -> None:
    rows = rows_of(model, [NOBODY])
    before = states(model, rows)
    with deltas_of(model).applied(model):
        after = states(model, rows)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_completions_are_scored_under_their_owners_delta(model: ModelHandle) -> None:
    deltas = deltas_of(model)
    rows = [
        row
        for completion in ("Greek", "Old Church Slavonic", "German")
        for row in rows_of(model, list(OWNERS), completion)
    ]
    with deltas.applied(model):
        felt = score(model, rows)
    for owner in OWNERS:
        mine = [index for index, row in enumerate(rows) if row.owner == owner]
        real = score(changed(model, deltas.matrix(owner)), [rows[i] for i in mine])
        found = [felt[i].logprob for i in mine]
        assert found == pytest.approx([s.logprob for s in real], abs=1e-3)
        base = [s.logprob for s in score(model, [rows[i] for i in mine])]
        assert found != pytest.approx(base, abs=0.1)


def test_romes_deltas_are_felt_as_changed_weights(model: ModelHandle) -> None:
    method = Rome(variant="plain", search=ValueSearch(8), prefixes=GivenPrefixes(list(CONTEXTS)))
    deltas = method.fit(model, splits(TARGETS), Site(LAYER, "mlp"))
    for owner in range(len(TARGETS)):
        rows = rows_of(model, [owner])
        with deltas.applied(model):
            felt = next_token_logprobs(model, rows)
        real = next_token_logprobs(changed(model, deltas.matrix(owner)), rows)
        torch.testing.assert_close(felt, real, rtol=0, atol=1e-3)


def test_a_delta_outside_a_batch_with_owners_is_refused(model: ModelHandle) -> None:
    with (
        deltas_of(model).applied(model),
        pytest.raises(RequestError, match=r"expected an owner"),
    ):
        model.model(torch.tensor([[1, 2]]))


# -- all at once -----------------------------------------------------------------------------------


def test_a_joint_delta_is_in_the_weight_whoever_owns_the_row(model: ModelHandle) -> None:
    deltas = deltas_of(model, rank=3, independent=False)
    rows = rows_of(model, [0, 2, NOBODY])
    with deltas.applied(model):
        felt = states(model, rows)
        without_owners = model.model(torch.tensor([rows[0].ids])).logits
    real = changed(model, deltas.matrix(0))
    assert distance(felt, states(real, rows)) < 1e-5
    torch.testing.assert_close(without_owners, real.model(torch.tensor([rows[0].ids])).logits)


def test_a_delta_in_half_precision_keeps_the_models_dtype(model: ModelHandle) -> None:
    half = copy_of(model, torch.bfloat16)
    rows = rows_of(half, [0])
    for independent in (True, False):
        deltas = deltas_of(half, independent=independent)
        before = half.w_out(LAYER).clone()
        with deltas.applied(half):
            felt = states(half, rows)
        assert felt[0].dtype == torch.bfloat16
        assert torch.equal(half.w_out(LAYER), before)
