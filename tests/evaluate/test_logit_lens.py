"""The logit lens: ranks as plain transformers gives them, at every layer."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.evaluate.logit_lens import LogitLens
from palimpsest.evaluate.scene import Scene
from palimpsest.facts.splits import Splits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.record.row import Row
from tests.evaluate.planting import BATCH, INDEPENDENT, NONE, REACHES, assert_labelled
from tests.model.tiny import make_handle

LENS = LogitLens(stride=1)


def keyed(rows: Iterable[Row]) -> dict[tuple[str, str | None, int | None], Row]:
    found = list(rows)
    assert {row.protocol for row in found} == {"logit_lens"}
    by_key = {(row.metric, row.fact_id, row.layer): row for row in found}
    assert len(by_key) == len(found)
    return by_key


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lens_ranks_by_hand(kind: str, facts: Splits) -> None:
    model = make_handle(kind)
    found = keyed(LENS.measure(Scene(model, facts, NONE), None))
    for fact in facts.target:
        row = model.encode(fact.prompt)
        output = model.model(torch.tensor([row.ids]), output_hidden_states=True)
        for name, thing in (("lens_rank_old", fact.true), ("lens_rank_new", fact.new)):
            whole = model.encode(fact.prompt, thing or "")
            token = whole.ids[whole.prompt]
            for layer in range(3):
                state = output.hidden_states[layer + 1][0, -1]
                scores = model.model.get_output_embeddings()(model.final_norm(state))
                rank = 1 + sum(float(s) > float(scores[token]) for s in scores)
                one = found[name, fact.id, layer]
                assert (one.value, one.position, one.split) == (rank, "last_prompt", "target")
            # At the last layer it is the rank in what the model really says.
            order = output.logits[0, -1].argsort(descending=True).tolist()
            assert found[name, fact.id, 3].value == 1 + order.index(token)
    assert len({row.value for row in found.values()}) > 10


def test_the_lens_reads_the_changed_model(model: ModelHandle, facts: Splits) -> None:
    def push(states: Tensor) -> Tensor:
        assert model.running is not None
        return states + 30 * (model.running.owner == 1).float()[:, None, None]

    before = keyed(LENS.measure(Scene(model, facts, INDEPENDENT), None))
    with model.hooked([(model.blocks[2], push)]):
        after = keyed(LENS.measure(Scene(model, facts, INDEPENDENT), None))
    moved = {key[1:] for key in before if before[key].value != after[key].value}
    assert moved == {(facts.target[1].id, 2), (facts.target[1].id, 3)}


def test_objects_that_begin_alike_have_no_rank(model: ModelHandle, facts: Splits) -> None:
    old, new = "New Zealand", "New Delhi"
    first, *rest = facts.target
    clash = replace(facts, target=(replace(first, true=old, new=new), *rest))
    tokens = [model.encode(first.prompt, name) for name in (old, new)]
    assert tokens[0].ids[tokens[0].prompt] == tokens[1].ids[tokens[1].prompt]
    for (_, fact_id, _), row in keyed(LENS.measure(Scene(model, clash, BATCH), None)).items():
        if fact_id == first.id:
            assert row.value is None
            assert row.note == "old and new object share their first token"
            assert row.n == 0
        else:
            assert row.value is not None


@pytest.mark.parametrize(("stride", "layers"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (9, [0, 3])])
def test_every_so_many_layers_are_read_and_the_last(
    model: ModelHandle, facts: Splits, stride: int, layers: list[int]
) -> None:
    every, some = (
        list(LogitLens(stride=n).measure(Scene(model, facts, NONE), None)) for n in (1, stride)
    )
    assert some == [row for row in every if row.layer in layers]
    assert len(some) == 2 * len(layers) * len(facts.target)


@pytest.mark.parametrize("change", REACHES)
def test_states_that_the_change_cannot_reach_are_labelled(
    model: ModelHandle, facts: Splits, change: Change
) -> None:
    seen = assert_labelled(LENS.measure(Scene(model, facts, change), None), change)
    assert seen == {("lens_rank_old", "logit_lens"), ("lens_rank_new", "logit_lens")}


def test_too_small_a_stride_is_refused() -> None:
    with pytest.raises(
        RequestError, match=r"evaluate\.logit_lens\.stride to be at least 1, found 0"
    ):
        LogitLens(stride=0)
