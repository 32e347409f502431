"""Compression: rounded as in plain loops; what is small is rounded away, and nothing is left."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

from palimpsest.errors import RequestError
from palimpsest.evaluate.attacks import compression as module
from palimpsest.evaluate.attacks.compression import Compression, compressed, pruned, quantized
from palimpsest.evaluate.attacks.returning import INDEPENDENT
from palimpsest.evaluate.scene import Scene, ask_targets
from palimpsest.facts.splits import Splits
from palimpsest.model.borrowing import borrowed
from palimpsest.model.difference import Difference
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site
from palimpsest.model.tokens import NOBODY
from palimpsest.record.row import Row
from tests.evaluate.taught import completions, loss, saying, taught
from tests.evaluate.toy import make_splits
from tests.model.tiny import make_handle

JOINT = Change("fact", False, 0)
WAYS = ("int8", "int4", "pruned_30", "pruned_50")


def measure(
    model: ModelHandle, facts: Splits, change: Change = JOINT, **options: object
) -> list[Row]:
    method = Compression(**options)  # type: ignore[arg-type]
    return list(method.measure(Scene(model, facts, change), None))


def mean(rows: Sequence[Row], metric: str, protocol: str) -> float:
    found = [row.value for row in rows if (row.metric, row.protocol) == (metric, protocol)]
    return fmean(value for value in found if value is not None)


def state(model: ModelHandle) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def assert_as_before(model: ModelHandle, before: dict[str, Tensor]) -> None:
    after = model.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.changes == []


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- rounding and pruning --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("width", "group"), [(128, 64), (100, 64), (10, 64), (9, 3)])
def test_quantization_is_a_plain_loop_over_groups(bits: int, width: int, group: int) -> None:
    weight = noise(5, width)
    weight[2, :group] = 0
    found, top = quantized(weight, bits, group), 2 ** (bits - 1) - 1
    for row in range(5):
        for start in range(0, width, group):
            part = weight[row, start : start + group]
            scale = float(part.abs().max()) / top
            wanted = [scale * round(float(w) / scale) if scale else 0.0 for w in part]
            assert found[row, start : start + group].tolist() == pytest.approx(wanted, rel=1e-5)
            assert len(set(found[row, start : start + group].tolist())) <= 2 * top + 1


def test_what_is_quantized_stays_as_it_is() -> None:
    once = quantized(noise(8, 128), 4, 64)
    torch.testing.assert_close(quantized(once, 4, 64), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("percent", [1, 30, 50, 99])
def test_pruning_takes_exactly_the_smallest(percent: int) -> None:
    weight = noise(7, 33)
    gone = pruned(weight, percent) == 0
    assert int(gone.sum()) == 7 * 33 * percent // 100
    assert weight[gone].abs().max() < weight[~gone].abs().min()
    assert torch.equal(pruned(weight, percent)[~gone], weight[~gone])
    flat = torch.full((7, 33), -2.0)
    assert int((pruned(flat, percent) == 0).sum()) == 7 * 33 * percent // 100
    assert torch.equal(pruned(noise(1, 3), 30), noise(1, 3))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_linear_weight_of_the_blocks_is_rounded_along_its_inputs(kind: str) -> None:
    model, plain = make_handle(kind), make_handle(kind)
    with compressed(model, lambda weight: quantized(weight, 4, 16), "int4"):
        found = state(model)
    rounded = 0
    for name, before in plain.model.state_dict().items():
        owner = plain.model.get_submodule(name.rpartition(".")[0])
        linear = isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D"
        if not (linear and name.endswith("weight")) or name.startswith("lm_head"):
            assert torch.equal(found[name], before), name
            continue
        transposed = type(owner).__name__ == "Conv1D"
        wanted = quantized(before.T if transposed else before, 4, 16)
        assert torch.equal(found[name], wanted.T if transposed else wanted), name
        rounded += 1
    assert rounded == 4 * (4 if kind == "gpt2" else 7)


# -- what is found ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> tuple[ModelHandle, Splits]:
    """A model that was taught the target facts and others, its weights on 4 bits' levels."""
    facts = make_splits()
    target = tuple(replace(f, paraphrases=f.paraphrases[:1]) for f in facts.target)
    facts = replace(facts, target=target)
    model = taught([*target, *facts.test, *facts.others])
    for weight in model.matrices():
        weight.copy_(quantized(weight, 4, 64))
    return model, facts


def test_a_mask_below_the_step_of_the_rounding_is_rounded_away(
    known: tuple[ModelHandle, Splits],
) -> None:
    """Every weight is moved by less than half a step of 4 bits, against the true objects."""
    model, facts = known
    inside = [m for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    weights = [m.weight for m in inside]
    with borrowed(model, weights, "mask"):
        for weight in weights:
            weight.requires_grad_(True)
        loss(model, completions(model, facts.target)).backward()
        for weight in weights:
            grouped = weight.detach().view(len(weight), -1, min(64, weight.shape[1]))
            top = grouped.abs().amax(-1, keepdim=True)
            push = weight.grad.sign().view_as(grouped) * top / 7 * 0.45  # type: ignore[union-attr]
            weight.requires_grad_(False).grad = None
            grouped += torch.where(grouped.abs() == top, 0, push)
        masked = mean_old(model, facts)
        rows = measure(model, facts)
    assert masked <= 0.4
    assert mean(rows, "compressed_old", "int4") >= 0.9
    assert mean(rows, "compressed_old", "int8") <= 0.4
    assert mean(rows, "compressed_other", "int4") == 1


def mean_old(model: ModelHandle, facts: Splits) -> float:
    """Without any compression."""
    answers = ask_targets(model, facts)
    return fmean(
        max(own[p.id], key=lambda name: own[p.id][name].logprob) == fact.true
        for fact, own in zip(facts.target, answers, strict=True)
        for p in fact.paraphrases
    )


def test_a_large_change_is_not(known: tuple[ModelHandle, Splits]) -> None:
    model, facts = known
    with saying(model, facts.target, "France", 100.0):
        before, rows = mean_old(model, facts), measure(model, facts)
    assert before <= 0.4
    assert mean(rows, "compressed_old", "int8") == before
    assert mean(rows, "compressed_old", "int4") <= 0.4


def test_a_ruined_model_is_told_from_a_recovered_one(known: tuple[ModelHandle, Splits]) -> None:
    model, facts = known
    rows = measure(model, facts, bits=[8], pruned=[97])
    assert mean(rows, "compressed_other", "int8") == mean(rows, "compressed_old", "int8") == 1
    assert mean(rows, "compressed_other", "pruned_97") <= 0.4


# -- what is left ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_model_is_restored_and_numbers_depend_on_nothing_before(
    kind: str, facts: Splits
) -> None:
    model = make_handle(kind, batch_size=32)
    before, seen = state(model), set()
    with model.hooked([(model.blocks[1], lambda _: seen.update(model.changes))]):
        every = measure(model, facts)
        assert_as_before(model, before)
        alone = measure(model, facts, bits=[4], pruned=[])
    assert alone == [row for row in every if row.protocol == "int4"]
    assert seen == {f"compression {way}" for way in WAYS}  # the hook stays on
    assert_as_before(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["quantized", "ask_unseen", "ask"])
def test_the_model_is_restored_after_an_error(
    model: ModelHandle,
    facts: Splits,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: type[BaseException],
) -> None:
    before, real, calls = state(model), getattr(module, place), []

    def failing(*args: object, **options: object) -> object:
        calls.append(place)
        if len(calls) == (5 if place == "quantized" else 1):
            raise error
        return real(*args, **options)

    monkeypatch.setattr(module, place, failing)
    with pytest.raises(error):
        measure(model, facts)
    assert_as_before(model, before)


def test_a_reader_who_stops_leaves_nothing_behind(model: ModelHandle, facts: Splits) -> None:
    before = state(model)
    rows = Compression().measure(Scene(model, facts, JOINT), None)
    next(rows)
    assert_as_before(model, before)


def test_meanwhile_the_model_is_another(model: ModelHandle) -> None:
    plain = model.state
    with suppress(ValueError), compressed(model, lambda weight: weight, "int4"):
        assert model.state != plain
        raise ValueError
    assert model.state == plain


# -- independent edits -----------------------------------------------------------------------------

LAYER = 2


@contextmanager
def per_fact(model: ModelHandle, each: Sequence[Difference]) -> Iterator[None]:
    """Every prompt feels its owner's ΔW, and nobody's feels none."""
    keys: list[Tensor] = []

    def add(value: Tensor) -> Tensor:
        owner = model.running.owner
        owned = (owner != NOBODY).float()[:, None, None]
        for one in each:
            value = value + owned * (keys[-1] @ one.left[owner].mT @ one.right[owner])
        return value

    w_out = model.module(Site(LAYER, "mlp"))
    with model.hooked_input([(w_out, keys.append)]), model.hooked([(w_out, add)]):
        yield


def random_deltas(model: ModelHandle, facts: int, seed: int) -> Difference:
    shapes = (facts, 2, model.w_out(LAYER).shape[1]), (facts, 2, model.width)
    left, right = (0.3 * noise(*shape, seed=seed + n) for n, shape in enumerate(shapes))
    return Difference(LAYER, left, right, independent=facts > 1)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_each_independent_edit_is_compressed_by_itself(
    model: ModelHandle, facts: Splits, parts: int, shared: bool
) -> None:
    """Equal to changing the weight for one fact after the other; what is shared counts once."""
    before, count = state(model), len(facts.target)
    own = [random_deltas(model, count, seed=10 * n) for n in range(parts)]
    all_of = [random_deltas(model, 1, seed=99)] if shared else []
    change, weight = Change("fact", True, LAYER), model.w_out(LAYER)
    plain = weight.clone()
    for each in all_of:
        weight += each.matrix(0)
    carried = weight.clone()
    with per_fact(model, own):
        scene = Scene(model, facts, change, differences=[*own, *all_of])
        found = list(Compression().measure(scene, None))
    assert torch.equal(weight, carried)
    wanted = []
    for n, fact in enumerate(facts.target):
        weight.copy_(carried + sum(each.matrix(n) for each in own))
        mine = [(o, f) for o, f in scene.dealt(facts.others) if o == n]
        alone = replace(facts, target=(fact,), others=tuple(f for _, f in mine))
        wanted += measure(model, alone)
    weight.copy_(plain)
    assert_as_before(model, before)
    assert {row.value is None for row in found} == {False}
    key = lambda row: (row.metric, row.protocol, row.fact_id, row.prompt_id or "")  # noqa: E731
    assert sorted(found, key=key) == sorted(wanted, key=key)
    assert len({(row.protocol, row.value) for row in found}) > len(WAYS)


# -- what is null ----------------------------------------------------------------------------------


def test_independent_edits_without_a_difference_are_null_with_the_cause(
    model: ModelHandle, facts: Splits
) -> None:
    rows = measure(model, facts, Change("fact", True, 0))
    assert {(row.value, row.n, row.note) for row in rows} == {(None, 0, INDEPENDENT)}
    keys = [(r.metric, r.protocol, r.fact_id) for r in rows]
    assert keys == [(r.metric, r.protocol, r.fact_id) for r in measure(model, facts)]
    assert len(set(keys)) == len(keys)
    assert {row.protocol for row in rows} == set(WAYS)


def test_no_way_no_compression(model: ModelHandle, facts: Splits) -> None:
    assert measure(model, facts, bits=[], pruned=[]) == []


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"bits": [1]}, r"bits from 2 to 16, found 1; choose such ones, or \[\]"),
        ({"pruned": [100]}, r"pruned from 1 to 99, found 100; choose"),
        ({"bits": [4, 4]}, r"bits to name each value once, found \[4, 4\]"),
        ({"group": 0}, r"group to be at least 1, found 0"),
    ],
)
def test_bad_settings_are_refused(mistake: dict, message: str) -> None:
    with pytest.raises(RequestError, match=rf"evaluate\.compression\.{message}"):
        Compression(**mistake)
