"""LoRA against plain adapters by hooks; PEFT leaves the model as it was."""

import sys
from collections.abc import Sequence
from itertools import count

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Fact
from palimpsest.intervene.changes.composition import Composition, History
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.editors import lora
from palimpsest.intervene.editors.lora import ADAPTER, LoraFineTune, adapted
from palimpsest.model.forward import next_token_logprobs
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.architectures.tiny import TINY, make_handle, make_model
from tests.intervene.conftest import TARGETS, assert_untouched, copy_of, fact, splits, weights

NAMES = ("gpt2", "llama", "opt", "bloom")
"""Conv1D; Linear; W_out without an MLP around it; W_out with a name and bias of its own."""

FACTS = TARGETS[:3]
SITE = Site(2, "mlp")
SHORT = LoraFineTune(steps=6, rank=3, alpha=6.0, lr=1e-2, stop_below=0.0)


@pytest.fixture(scope="module")
def make(tokenizer):
    """Makes the handle of a tiny model by its name."""

    def handle(name: str) -> ModelHandle:
        model = make_model(name, vocab_size=len(tokenizer))
        return ModelHandle(model, tokenizer, name, batch_size=2)

    return handle


@pytest.fixture(params=NAMES)
def handle(request, make) -> ModelHandle:
    return make(request.param)


def asked(model: ModelHandle, facts: Sequence[Fact] = FACTS) -> Tensor:
    """Next-token log-probabilities after each fact's prompt, each with its own owner."""
    rows = [model.encode(fact.prompt, owner=owner) for owner, fact in enumerate(facts)]
    return next_token_logprobs(model, rows)


def settings(method: LoraFineTune, **changed) -> LoraFineTune:
    return LoraFineTune(**{**vars(method), **changed})


# -- a plain version -------------------------------------------------------------------------------


def initial(model: ModelHandle, layers: Sequence[int], method: LoraFineTune) -> dict[int, Tensor]:
    """A of each layer before the first step."""
    with adapted(model, layers, method) as adapters:
        return {
            layer: adapters[f"layer_{layer}"].lora_A[ADAPTER].weight.detach().clone()
            for layer in layers
        }


def loss_of(model: ModelHandle, facts: Sequence[Fact]) -> Tensor:
    """Mean over facts of the mean −log p of the new object's tokens; a whole pass a fact."""
    losses = []
    for each in facts:
        row = model.encode(each.prompt, each.new)
        scores = model.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        places = range(row.prompt, len(row.ids))
        losses.append(-torch.stack([scores[at - 1, row.ids[at]] for at in places]).mean())
    return torch.stack(losses).mean()


def literal(
    model: ModelHandle, facts: Sequence[Fact], layers: Sequence[int], method: LoraFineTune
) -> dict[int, Tensor]:
    """ΔW of each layer by adapters of one's own in hooks on the unchanged model."""
    a = {n: w.requires_grad_() for n, w in initial(model, layers, method).items()}
    b = {n: torch.zeros(model.width, method.rank, requires_grad=True) for n in layers}
    scaling = method.alpha / method.rank

    def hook(layer):
        return lambda _, args, output: output + scaling * (args[0] @ a[layer].T) @ b[layer].T

    modules = {layer: model.module(Site(layer, "mlp")) for layer in layers}
    handles = [m.register_forward_hook(hook(n)) for n, m in modules.items()]
    adam = torch.optim.Adam([*a.values(), *b.values()], lr=method.lr)
    for _ in range(method.steps):
        adam.zero_grad()
        loss_of(model, facts).backward()
        adam.step()
    for each in handles:
        each.remove()
    return {n: (scaling * b[n] @ a[n]).detach() for n in layers}


def deltas(found: Composition, fact: int = 0) -> dict[int, Tensor]:
    return {part.layer: part.matrix(fact) for part in found.parts}


def check_close(found: dict[int, Tensor], wanted: dict[int, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for layer, delta in wanted.items():
        assert (found[layer] - delta).norm() <= 1e-3 * delta.norm()


@pytest.mark.parametrize("layers", [[2], [0, 1, 3]], ids=str)
def test_a_plain_version_reaches_the_same_deltas(handle, layers):
    method = settings(SHORT, layers=layers, protocol="batch")
    found = method.fit(handle, splits(FACTS), SITE)
    check_close(deltas(found), literal(handle, FACTS, layers, method))


def test_independent_edits_are_those_of_each_fact_alone(handle):
    method = settings(SHORT, all_layers=True)
    found = method.fit(handle, splits(FACTS), SITE)
    assert found.change.independent
    for number, each in enumerate(FACTS):
        check_close(deltas(found, number), literal(handle, [each], range(4), method))


def test_the_deltas_say_what_the_trained_adapters_say(handle, monkeypatch):
    said = []

    def read_out(adapters):
        with torch.no_grad():
            said.append(asked(handle))
        return real(adapters)

    real = lora.read_out
    monkeypatch.setattr(lora, "read_out", read_out)
    found = settings(SHORT, protocol="batch", all_layers=True).fit(handle, splits(FACTS), SITE)
    before = asked(handle)
    with found.applied(handle):
        after = asked(handle)
    torch.testing.assert_close(after, said[0], rtol=0, atol=1e-5 * float(said[0].abs().max()))
    assert not torch.allclose(after, before, rtol=0, atol=0.1)


def test_training_lowers_the_loss(handle):
    found = settings(SHORT, protocol="batch", steps=30).fit(handle, splits(FACTS), SITE)
    with torch.no_grad():
        before = loss_of(handle, FACTS)
        with found.applied(handle):
            after = loss_of(handle, FACTS)
    assert after < before
    [row] = found.diagnostics
    assert (row.metric, row.fact_id) == ("tuning_loss", None)
    assert row.value == pytest.approx(float(after), rel=1e-3)


# -- what is returned ------------------------------------------------------------------------------


def test_the_change_is_weight_deltas_of_the_rank(gpt2):
    found = settings(SHORT, layers=[3, 1]).fit(gpt2, splits(FACTS), SITE)
    assert [part.layer for part in found.parts] == [1, 3]
    assert found.change.layer == 1
    d_mlp = gpt2.w_out(1).shape[1]
    for part in found.parts:
        assert type(part) is WeightDeltas
        assert part.left.shape == (len(FACTS), SHORT.rank, d_mlp)
        assert part.right.shape == (len(FACTS), SHORT.rank, gpt2.width)


def test_by_default_the_located_layer_is_changed(gpt2):
    found = SHORT.fit(gpt2, splits(FACTS), SITE)
    assert [part.layer for part in found.parts] == [SITE.layer]


def test_sequential_edits_begin_where_the_last_one_ended(gpt2):
    found = settings(SHORT, protocol="sequential").fit(gpt2, splits(FACTS), SITE)
    assert isinstance(found, History)
    assert found.checkpoints == (1, 2, 3)
    first = settings(SHORT, protocol="batch").fit(gpt2, splits(FACTS[:1]), SITE)
    check_close(deltas(found.at(1)), deltas(first))
    carrying = copy_of(gpt2)
    carrying.w_out(SITE.layer).add_(deltas(first)[SITE.layer])
    second = literal(carrying, FACTS[1:2], [SITE.layer], SHORT)
    summed = {SITE.layer: second[SITE.layer] + deltas(first)[SITE.layer]}
    check_close(deltas(found.at(2)), summed)


def test_the_seed_alone_decides(gpt2):
    once, again = (SHORT.fit(gpt2, splits(FACTS), SITE) for _ in range(2))
    assert once.digest == again.digest
    other = settings(SHORT, seed=1).fit(gpt2, splits(FACTS), SITE)
    assert other.digest != once.digest


def test_no_step_is_taken_below_the_loss_that_is_enough(gpt2):
    found = settings(SHORT, stop_below=1e6).fit(gpt2, splits(FACTS), SITE)
    assert not any(part.right.any() for part in found.parts)


def test_weights_in_half_precision_are_trained_in_float32(gpt2):
    half = copy_of(gpt2, torch.bfloat16)
    found = SHORT.fit(half, splits(FACTS), SITE)
    assert {tensor.dtype for tensor in found.tensors().values()} == {torch.float32}
    assert half.model.dtype == torch.bfloat16
    assert all(part.right.any() for part in found.parts)


def test_a_loss_that_is_not_finite_fails_that_fact_alone(gpt2, monkeypatch):
    fails = count()

    def backward(part, model):
        return torch.nan if next(fails) == 1 else real(part, model)

    real = lora.Completions.backward
    monkeypatch.setattr(lora.Completions, "backward", backward)
    found = settings(SHORT, steps=1, stop_below=1e6).fit(gpt2, splits(FACTS), SITE)
    assert list(found.change.failed) == [FACTS[1].id]
    assert not any(part.left[1].any() for part in found.parts)
    assert all(part.left[0].any() for part in found.parts)
    values = {row.fact_id: row.value for row in found.diagnostics}
    assert values[FACTS[1].id] is None
    assert values[FACTS[0].id] is not None


def test_divergence_is_told_and_changes_nothing(gpt2):
    found = settings(SHORT, lr=1e30).fit(gpt2, splits(FACTS), SITE)
    assert set(found.change.failed) == {fact.id for fact in FACTS}
    assert not any(tensor.any() for tensor in found.tensors().values())


# -- PEFT leaves nothing behind --------------------------------------------------------------------


def modules(model: ModelHandle) -> dict[str, tuple[type, int]]:
    return {name: (type(module), id(module)) for name, module in model.model.named_modules()}


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_is_edited_and_left_as_it_was(name):
    model = make_handle(name)
    facts = (fact("bado", "ki", "na", "so ge {} li"), fact("re", "na", "tobi", "{} me"))
    before, parts, random = weights(model), modules(model), torch.get_rng_state()
    attributes = set(vars(model.model))
    method = settings(SHORT, steps=2, all_layers=True, protocol="batch")
    found = method.fit(model, splits(facts), SITE)
    assert all(part.right.any() for part in found.parts)
    assert_untouched(model, before)
    assert modules(model) == parts
    assert set(vars(model.model)) == attributes
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    fingerprint = ModelHandle(model.model, model.tokenizer, name).fingerprint
    assert fingerprint == model.fingerprint


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_the_model_is_left_as_it_was_after_an_error(model, error, passes):
    before, parts = weights(model), modules(model)
    done = count()

    def fail(_: Tensor) -> None:
        if next(done) >= passes:
            raise error

    with pytest.raises(error), model.hooked([(model.blocks[3], fail)]):
        settings(SHORT, all_layers=True).fit(model, splits(FACTS), SITE)
    assert_untouched(model, before)
    assert modules(model) == parts


# -- wrong requests --------------------------------------------------------------------------------


def test_without_peft_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RequestError, match=r"peft.*found none; pip install 'peft>=0\.15'"):
        LoraFineTune()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "intervene.rank to be at least 1, found 0"),
        ({"steps": 0}, "intervene.steps to be at least 1, found 0"),
        ({"layers": []}, r"found \[\] and false; set intervene.layers=null"),
        ({"layers": [1], "all_layers": True}, r"found \[1\] and true"),
        ({"protocol": "both"}, "intervene.protocol"),
    ],
)
def test_wrong_numbers_are_refused(wrong, message):
    with pytest.raises(RequestError, match=message):
        LoraFineTune(**wrong)


def test_a_layer_that_the_model_lacks_is_refused(gpt2):
    with pytest.raises(RequestError, match=r"from 0 to 3 .* found 9; set intervene\.layers"):
        settings(SHORT, layers=[9]).fit(gpt2, splits(FACTS), SITE)
