"""Whom a change reaches: calls by other code, the owner that is named, and what is refused."""

from dataclasses import replace

import pytest
import torch

from palimpsest.errors import RequestError
from palimpsest.intervene.changes.composition import Composition, History
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.changes.dense import DenseDeltas
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.intervention import Intervention, Unchanged
from palimpsest.model.forward import next_token_logprobs
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Policy, Site
from palimpsest.model.tokens import subject_key
from tests.intervene.conftest import TARGETS, assert_untouched, weights

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
FACTS = 3


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def deltas(handle: ModelHandle, dense: bool = False) -> WeightDeltas | DenseDeltas:
    width, change = handle.w_out(1).shape[1], Change("fact", True, 1)
    if dense:
        delta = noise(FACTS, handle.width, width)
        return DenseDeltas(change=change, model=handle.fingerprint, delta=delta)
    left, right = noise(FACTS, 1, width), noise(FACTS, 1, handle.width)
    return WeightDeltas(change=change, model=handle.fingerprint, left=left, right=right)


def erasure(handle: ModelHandle, policy: Policy = "all") -> Erasure:
    basis = torch.linalg.qr(noise(handle.width, 3).double()).Q
    return Erasure(
        change=Change("relation", False, 1, "residual", policy),
        model=handle.fingerprint,
        proj_left=basis,
        proj_right=basis.T,
        bias=noise(handle.width).double(),
    )


def gated(handle: ModelHandle) -> Erasure:
    keys = torch.tensor([subject_key(handle.encode(TARGETS[0].prompt))])
    plain = erasure(handle)
    return replace(plain, change=replace(plain.change, gated=True), subjects=keys)


# -- what cannot be known is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (deltas, r"expected an owner.*; name a fact.*applied\(model, owner=0\)"),
        (lambda h: deltas(h, dense=True), r"expected an owner"),
        (lambda h: erasure(h, "last_prompt"), r"for a change at last_prompt.*intervene\.policy"),
        (lambda h: erasure(h, "last_subject"), r"for a change at last_subject"),
        (gated, r"expected to be told each prompt's subject.*intervene\.gate=always"),
        (
            lambda h: Composition(
                change=Change("fact", True, 1),
                model=h.fingerprint,
                parts=(erasure(h), deltas(h)),
            ),
            r"expected an owner",
        ),
    ],
    ids=["deltas", "dense", "last_prompt", "last_subject", "gate", "both"],
)
@torch.no_grad()
def test_what_a_call_does_not_tell_is_never_guessed(make, told, model: ModelHandle) -> None:
    change, before, plain = make(model), weights(model), model.model(IDS).logits
    rows = [model.encode(TARGETS[0].prompt, owner=0)]
    unchanged = next_token_logprobs(model, rows)
    with change.applied(model):
        for call in (model.model, model.decoder, model.model.base_model):
            with pytest.raises(RequestError, match=told) as refused:
                call(IDS)
            assert "\n" not in str(refused.value)
        with pytest.raises(RequestError, match=told):
            model.model.generate(IDS, max_new_tokens=2, pad_token_id=0)
        assert not torch.allclose(next_token_logprobs(model, rows), unchanged)  # ours, it is told
    assert_untouched(model, before)
    assert torch.equal(model.model(IDS).logits, plain)


@torch.no_grad()
def test_a_part_of_the_model_called_by_itself_is_refused(model: ModelHandle) -> None:
    with (
        deltas(model).applied(model),
        pytest.raises(RequestError, match="expected a call of the whole model"),
    ):
        model.module(Site(1, "mlp"))(noise(1, 2, model.w_out(1).shape[1]))


# -- an owner is named -----------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
@torch.no_grad()
def test_a_named_owners_change_stands_in_the_weight(dense: bool, model: ModelHandle) -> None:
    change, before = deltas(model, dense), weights(model)
    for owner in range(FACTS):
        wanted = model.w_out(1) + change.matrix(owner)
        with change.applied(model, owner=owner):
            assert torch.equal(model.w_out(1), wanted)
            assert model.changes == [change.alone(owner).digest]
        assert model.changes == []
    assert_untouched(model, before)


def test_owners_are_told_apart(gpt2: ModelHandle) -> None:
    change, states = deltas(gpt2), set()
    for owner in (None, *range(FACTS)):
        with change.applied(gpt2, owner=owner):
            states.add(gpt2.state)
    assert len(states) == FACTS + 1


@pytest.mark.parametrize("owner", [-1, FACTS])
def test_an_owner_that_is_none_is_refused(owner: int, gpt2: ModelHandle) -> None:
    told = f"expected owner to be a target fact's place, from 0 to 2, found {owner}; "
    with pytest.raises(RequestError, match=told), deltas(gpt2).applied(gpt2, owner=owner):
        pass


@pytest.mark.parametrize("make", [erasure, lambda h: deltas(h).alone(0)])
def test_an_owner_of_a_change_that_all_share_is_refused(make, gpt2: ModelHandle) -> None:
    told = "expected an owner of independent changes alone, found owner=1 .*; leave owner out"
    with pytest.raises(RequestError, match=told), make(gpt2).applied(gpt2, owner=1):
        pass


def test_parts_that_all_facts_share_stay_as_they_are(gpt2: ModelHandle) -> None:
    parts: tuple[Intervention, ...] = (erasure(gpt2), deltas(gpt2))
    change = Change("fact", True, 1)
    both = Composition(change=change, model=gpt2.fingerprint, parts=parts).alone(2)
    assert not both.change.independent
    assert both.parts[0] is parts[0]
    assert torch.equal(both.parts[1].tensors()["left"], parts[1].tensors()["left"][2:])
    grown = History(change=change, model=gpt2.fingerprint, parts=parts[1:], steps=(1,)).alone(2)
    assert grown.steps == (1,)
    assert grown.parts[0].digest == both.parts[1].digest


def test_a_kind_without_changes_of_single_facts_says_so(gpt2: ModelHandle) -> None:
    none = Unchanged(change=Change("fact", True, None), model=gpt2.fingerprint)
    with pytest.raises(TypeError, match="unchanged holds no change of one fact"):
        none.alone(0)


# -- nothing is left behind ------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@torch.no_grad()
def test_after_an_error_in_a_call_the_model_is_as_before(
    error: type[BaseException], model: ModelHandle
) -> None:
    def fail(_: torch.Tensor) -> None:
        raise error

    before, plain = weights(model), model.model(IDS).logits
    with erasure(model).applied(model):
        changed = model.model(IDS).logits
        with pytest.raises(error), model.hooked([(model.blocks[-1], fail)]):
            model.model(IDS)
        assert torch.equal(model.model(IDS[:1]).logits, changed[:1])
    with pytest.raises(error), erasure(model).applied(model):
        raise error
    assert_untouched(model, before)
    assert torch.equal(model.model(IDS).logits, plain)
    assert not torch.allclose(changed, plain)
