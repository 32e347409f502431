"""Fine-tuning: against Adam on the weight itself; the bound of FT-L."""

from dataclasses import replace

import pytest
import torch

from palimpsest.errors import RequestError
from palimpsest.intervene.changes.dense import DenseDeltas
from palimpsest.intervene.editors.finetune import FineTune
from palimpsest.model.forward import next_token_logprobs
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene import literal, literal_ft
from tests.intervene.conftest import TARGETS, copy_of, relative, splits, values_of

FT = FineTune(steps=6, lr=2e-3)
FT_L = replace(FT, bound=3e-3)
STOPPING = replace(FT, steps=30, lr=2e-2, stop_below=1.0)
METHODS = {"ft": FT, "ft_l": FT_L, "stopping": STOPPING}


def fit(
    model: ModelHandle, method: FineTune, protocol: str, target: tuple = TARGETS
) -> DenseDeltas:
    """Changes of layer 1."""
    return replace(method, protocol=protocol).fit(model, splits(target), Site(1, "mlp"))


@pytest.mark.parametrize("name", METHODS)
def test_independent_facts_are_tuned_as_if_each_were_alone(model: ModelHandle, name: str) -> None:
    method = METHODS[name]
    found = fit(model, method, "independent")
    assert found.change.independent
    assert len(found.delta) == len(TARGETS)
    losses, steps = [], set()
    for i, fact in enumerate(TARGETS):
        change, loss, taken = literal_ft.edit(copy_of(model), (fact,), 1, method)
        assert relative(found.matrix(i), change) < 1e-3
        losses.append(loss)
        steps.add(taken)
    assert values_of(found, "tuning_loss") == pytest.approx(losses, rel=1e-3)
    assert (len(steps) > 1) == (name == "stopping")


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_tuned_like_the_literal_one(model: ModelHandle, name: str) -> None:
    found = fit(model, METHODS[name], "batch")
    change, loss, _ = literal_ft.edit(copy_of(model), TARGETS, 1, METHODS[name])
    assert not found.change.independent
    assert relative(found.matrix(0), change) < 1e-3
    assert values_of(found, "tuning_loss") == pytest.approx([loss], rel=1e-3)


@pytest.mark.parametrize("objective", ["erase", "amplify", "force", "trace_reversal"])
@pytest.mark.parametrize("protocol", ["independent", "batch"])
def test_every_objective_is_pursued_as_it_reads(
    model: ModelHandle, objective: str, protocol: str
) -> None:
    method = replace(FT, objective=objective)
    target = literal.known(model, TARGETS)
    found = fit(model, method, protocol, target)
    noise = literal.noises(model, target, method)
    all_of_them = range(len(target))
    groups = [[n] for n in all_of_them] if protocol == "independent" else [all_of_them]
    losses = []
    for number, group in enumerate(groups):
        facts, drawn = [target[n] for n in group], [noise[n] for n in group]
        change, loss, _ = literal_ft.edit(copy_of(model), facts, 1, method, drawn)
        assert relative(found.matrix(number), change) < 1e-3
        losses.append(loss)
    assert values_of(found, "tuning_loss") == pytest.approx(losses, rel=1e-3)


def test_to_remove_an_object_no_new_one_is_needed(gpt2: ModelHandle) -> None:
    bare = replace(TARGETS[0], new=None)
    assert fit(gpt2, replace(FT, objective="erase"), "independent", (bare,)).delta.any()


def test_noise_needs_a_subject(gpt2: ModelHandle) -> None:
    bare = replace(TARGETS[0], prompt=replace(TARGETS[0].prompt, span=None))
    with pytest.raises(RequestError, match=f"for force, found fact {bare.id} without a subject"):
        fit(gpt2, replace(FT, objective="force"), "independent", (bare,))


def test_a_batch_larger_than_the_models_is_tuned_alike(gpt2: ModelHandle) -> None:
    small = ModelHandle(gpt2.model, gpt2.tokenizer, gpt2.name, gpt2.prefix, batch_size=2)
    one, other = (fit(handle, FT, "batch").matrix(0) for handle in (gpt2, small))
    assert relative(one, other) < 1e-3


@pytest.mark.parametrize("protocol", ["independent", "batch"])
def test_the_bound_holds_entry_by_entry(model: ModelHandle, protocol: str) -> None:
    bounded = fit(model, FT_L, protocol).delta
    assert bounded.abs().max() <= torch.tensor(FT_L.bound)
    assert (bounded.abs() == torch.tensor(FT_L.bound)).any()
    assert fit(model, FT, protocol).delta.abs().max() > FT_L.bound


@pytest.mark.parametrize("name", METHODS)
def test_tuning_lowers_the_loss(model: ModelHandle, name: str) -> None:
    after = values_of(fit(model, METHODS[name], "independent"), "tuning_loss")
    before = values_of(
        fit(model, replace(METHODS[name], stop_below=1e9), "independent"), "tuning_loss"
    )
    assert all(late < early for late, early in zip(after, before, strict=True))


def test_a_fact_that_needs_no_tuning_keeps_its_weight(model: ModelHandle) -> None:
    assert not fit(model, replace(FT, stop_below=1e9), "independent").delta.any()


def test_each_prompt_feels_its_owners_change_alone(model: ModelHandle) -> None:
    """One pass under all the facts' changes equals as many weights really changed."""
    found = fit(model, STOPPING, "independent")
    rows = [model.encode(fact.prompt, owner=i) for i, fact in enumerate(TARGETS)]
    nobodys = [replace(row, owner=-1) for row in rows]
    unchanged = next_token_logprobs(model, nobodys)
    with found.applied(model):
        together = next_token_logprobs(model, rows)
        assert torch.equal(next_token_logprobs(model, nobodys), unchanged)
    for i, row in enumerate(rows):
        changed = copy_of(model)
        changed.w_out(1).add_(found.matrix(i))
        alone = next_token_logprobs(changed, [row])[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)
        assert (alone - unchanged[i]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"bound": 0.0}, "intervene.bound to be a finite number above 0, found 0.0; set"),
        ({"bound": float("nan")}, "intervene.bound to be a finite number above 0, found nan"),
        ({"objective": "ersae"}, "intervene.objective.*inject.*'ersae'.*did you mean.*erase"),
        ({"noise": 0.0}, "intervene.noise to be a finite number above 0, found 0.0"),
        ({"steps": 0}, "intervene.steps.*at least 1"),
        ({"protocol": "joint"}, "intervene.protocol.*independent, batch, sequential.*'joint'"),
    ],
)
def test_tuning_that_makes_no_sense_is_refused(mistake: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        FineTune(**mistake)


def test_a_fact_without_a_new_object_is_named(gpt2: ModelHandle) -> None:
    broken = replace(TARGETS[1], new=None)
    with pytest.raises(RequestError, match=f"found fact {broken.id} without a new object"):
        fit(gpt2, FT, "batch", (*TARGETS, broken))
