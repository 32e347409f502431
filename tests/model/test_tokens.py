from typing import get_args

import pytest
import torch

from palimpsest.model.site import Change, Policy
from palimpsest.model.tokens import NOBODY, Tokens, batches, collate
from tests.model.tiny import ragged

CPU = torch.device("cpu")
ROWS = [
    Tokens((4, 5, 6, 7), 3, (1, 2), 0),
    Tokens((8, 9), 2, (0, 0), 5),
    Tokens((3, 2, 1), 2, None, NOBODY),
]


def test_rows_are_padded_on_the_right() -> None:
    batch = collate(ROWS, CPU)
    assert batch.ids.tolist() == [[4, 5, 6, 7], [8, 9, 0, 0], [3, 2, 1, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3]] * 3


def test_a_batch_knows_owners_and_places() -> None:
    batch = collate(ROWS, CPU)
    assert batch.owner.tolist() == [0, 5, NOBODY]
    assert batch.subject_last.tolist() == [2, 0, -1]
    assert batch.prompt_last.tolist() == [2, 1, 1]


POLICIES: dict[Policy, list[list[int]]] = {
    "last_subject": [[0, 0, 1, 0], [1, 0], [0, 0, 0]],
    "last_prompt": [[0, 0, 1, 0], [0, 1], [0, 1, 0]],
    "all_but_sink": [[0, 1, 1, 1], [0, 1], [0, 1, 1]],
    "all": [[1, 1, 1, 1], [1, 1], [1, 1, 1]],
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_selects_its_tokens(policy: Policy) -> None:
    batch = collate(ROWS, CPU)
    chosen = (batch.selects(policy) & batch.mask.bool()).int()
    for row, wanted in zip(chosen.tolist(), POLICIES[policy], strict=True):
        assert row == wanted + [0] * (4 - len(wanted))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_selects_the_same_tokens_of_a_batch_cut_off_at_its_start(policy: Policy) -> None:
    rest = collate(ROWS, CPU).since(torch.tensor([1, 0, 2]))
    chosen = rest.selects(policy)
    for n, (start, row) in enumerate(zip([1, 0, 2], ROWS, strict=True)):
        wanted = POLICIES[policy][n][start:]
        assert chosen[n, : len(row.ids) - start].int().tolist() == wanted


@pytest.mark.parametrize("starts", [[0] * 7, [3, 0, 11, 2, 8, 1, 2], [2] * 7])
def test_since_is_slicing(starts: list[int]) -> None:
    rows = ragged()
    rest = collate(rows, CPU).since(torch.tensor(starts))
    before = max(starts)
    after = max(len(row.ids) - start for row, start in zip(rows, starts, strict=True))
    assert rest.ids.shape == rest.positions.shape == (7, after)
    assert rest.mask.shape == (7, before + after)
    for n, (row, start) in enumerate(zip(rows, starts, strict=True)):
        left = len(row.ids) - start
        assert rest.ids[n].tolist() == [*row.ids[start:], *[0] * (after - left)]
        assert rest.positions[n, :left].tolist() == list(range(start, len(row.ids)))
        padded = [0] * (before - start) + [1] * (start + left) + [0] * (after - left)
        assert rest.mask[n].tolist() == padded
    whole = collate(rows, CPU)
    assert torch.equal(rest.owner, whole.owner)
    assert torch.equal(rest.prompt_last, whole.prompt_last)


def test_no_place_lies_beyond_the_longest_row() -> None:
    rest = collate(ROWS, CPU).since(torch.tensor([0, 1, 2]))
    assert int(rest.positions.max()) == 3


def test_batches_hold_every_row_once_and_like_lengths_together() -> None:
    rows = ragged()
    groups = list(batches(rows, 3))
    assert [len(group) for group in groups] == [3, 3, 1]
    flat = [i for group in groups for i in group]
    assert sorted(flat) == list(range(7))
    assert [len(rows[i].ids) for i in flat] == sorted(len(row.ids) for row in rows)
    assert flat.index(0) < flat.index(4)  # of equal length: in the order given


def test_no_rows_make_no_batch() -> None:
    assert list(batches([], 4)) == []


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (Change("fact", True, None), {(0, 0): False, (3, 1): False}),
        (Change("fact", True, 2), {(1, 0): False, (1, 1): False, (2, 0): True, (3, 1): True}),
        (Change("fact", True, 0), {(-1, 0): False, (0, 0): True}),
        (Change("relation", False, 1, "residual", "last_prompt"), {(2, 0): False, (2, 1): True}),
        (Change("relation", False, 1, "residual", "last_subject"), {(1, 0): True, (1, 1): True}),
        (Change("relation", False, 1, "mlp", "all_but_sink"), {(1, 0): True, (0, 1): False}),
        (Change("relation", False, 1, "mlp_norm"), {(0, 1): False, (1, 0): True, (1, 1): True}),
    ],
)
def test_a_change_reaches_what_comes_at_or_after_it(
    change: Change, wanted: dict[tuple[int, int], bool]
) -> None:
    for (layer, which), reached in wanted.items():
        assert change.reaches(layer, ("last_subject", "last_prompt")[which]) is reached


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_subject_that_ends_its_prompt_is_reached_as_the_prompt_s_end_is(
    policy: Policy, layer: int
) -> None:
    change = Change("relation", False, 1, "residual", policy)
    reached = change.reaches(layer, "last_subject", coincide=True)
    assert reached is change.reaches(layer, "last_prompt") is (layer >= 1)
