"""Exactly the tokens that a policy names are erased, wherever they stand in a padded batch."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Prompt
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.model.forward import capturing, forward, greedy
from palimpsest.model.handle import ModelHandle
from palimpsest.model.sample import sample, start_ids
from palimpsest.model.site import Change, Site
from palimpsest.model.tokens import NOBODY, Tokens, collate
from tests.intervene.conftest import TARGETS, copy_of

LAYER = 1
PARTS = ("residual", "mlp", "attention", "attention_norm", "mlp_norm")

NAMED: dict[str, Callable[[Tokens, int], bool]] = {
    "last_subject": lambda row, at: row.subject is not None and at == row.subject[1],
    "last_prompt": lambda row, at: at == row.prompt - 1,
    "all_but_sink": lambda row, at: at > 0,
    "all": lambda row, at: True,
}
"""Whether a policy names a token."""


def eraser(handle: ModelHandle, policy: str, part: str = "residual") -> Erasure:
    """A random one."""
    generator = torch.Generator().manual_seed(8)
    left = torch.randn(handle.width, 2, generator=generator, dtype=torch.float64)
    return Erasure(
        change=Change("relation", False, LAYER, part, policy),
        model=handle.fingerprint,
        proj_left=left,
        proj_right=torch.linalg.pinv(left),
        bias=torch.randn(handle.width, generator=generator, dtype=torch.float64),
    )


def rows_of(handle: ModelHandle) -> list[Tokens]:
    """Subjects at different places, at the end and none; with completions and without."""
    ending = Prompt.fill("ending", "In the north is {}", "the city of Lemburg")
    return [
        *(handle.encode(fact.prompt, owner=i) for i, fact in enumerate(TARGETS)),
        *(handle.encode(fact.prompt, fact.new) for fact in TARGETS),
        handle.encode(ending, "Greek"),
        handle.encode(Prompt("none", "Therefore the language is")),
    ]


def states_at(handle: ModelHandle, rows: list[Tokens], part: str) -> Tensor:
    """The site's output `[n, t, d_model]`, from one batch."""
    site = Site(LAYER, part)
    with torch.no_grad(), capturing(handle, [site]) as found:
        forward(handle, collate(rows, handle.device))
    return found[site]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("policy", NAMED)
def test_exactly_the_named_tokens_change(model: ModelHandle, policy: str, part: str) -> None:
    rows, change = rows_of(model), eraser(model, policy, part)
    before = states_at(model, rows, part)
    with change.applied(model):
        after = states_at(model, rows, part)
    changed = (before != after).any(-1)
    for n, row in enumerate(rows):
        expected = [NAMED[policy](row, at) for at in range(len(row.ids))]
        assert changed[n, : len(row.ids)].tolist() == expected
        erased = before[n] - (before[n] - change.bias.float()) @ (
            change.proj_left @ change.proj_right
        ).T.to(before)
        here = torch.tensor(expected)
        torch.testing.assert_close(
            after[n, : len(row.ids)][here], erased[: len(row.ids)][here], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("policy", NAMED)
def test_padding_and_company_make_no_difference(model: ModelHandle, policy: str) -> None:
    rows = rows_of(model)
    with eraser(model, policy).applied(model), torch.no_grad():
        together = forward(model, collate(rows, model.device))
        for n, row in enumerate(rows):
            alone = forward(model, collate([row], model.device))[0]
            torch.testing.assert_close(together[n, : len(row.ids)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", NAMED)
def test_whose_a_row_is_makes_no_difference(gpt2: ModelHandle, policy: str) -> None:
    rows = rows_of(gpt2)
    nobodys = [Tokens(row.ids, row.prompt, row.subject, NOBODY) for row in rows]
    with eraser(gpt2, policy).applied(gpt2), torch.no_grad():
        owned, unowned = (forward(gpt2, collate(some, gpt2.device)) for some in (rows, nobodys))
    assert torch.equal(owned, unowned)


def test_a_text_grown_token_by_token_is_erased_as_in_whole_passes(model: ModelHandle) -> None:
    start = tuple(start_ids(model))

    def grown() -> Tensor:
        return sample(model, 1, 12, torch.Generator().manual_seed(1), top_k=1)

    before = grown()
    mild = eraser(model, "all_but_sink")
    with replace(mild, bias=30 * mild.bias).applied(model):
        during = grown()
        (expected,) = greedy(model, [Tokens(start, len(start))], 12)
    assert during.tolist() == [[*start, *expected]]
    assert not torch.equal(before, during)
    assert torch.equal(before, grown())


def test_an_erasure_in_a_part_called_by_itself_is_refused(model: ModelHandle) -> None:
    with (
        eraser(model, "all", "mlp").applied(model),
        pytest.raises(RequestError, match=r"expected a call of the whole model"),
    ):
        model.module(Site(LAYER, "mlp"))(torch.zeros(1, 2, model.w_out(LAYER).shape[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_states_keep_their_precision(model: ModelHandle, dtype: torch.dtype) -> None:
    other = copy_of(model, dtype)
    with eraser(other, "all").applied(other):
        assert states_at(other, rows_of(other), "residual").dtype == dtype
