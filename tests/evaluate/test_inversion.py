"""Inversion: what W' − W writes is named, and what it does not write is not."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.evaluate.attacks import inversion as module
from palimpsest.evaluate.attacks.candidates import SAME_TOKEN
from palimpsest.evaluate.attacks.inversion import ALL_WRITTEN, NO_WEIGHT, Inversion
from palimpsest.evaluate.scene import Scene
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.model.difference import Difference, merged
from palimpsest.model.forward import logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change
from palimpsest.record.row import Row
from tests.evaluate.toy import RELATION, make_splits

LAYER = 3
INDEPENDENT = Change("fact", True, LAYER)
JOINT = Change("fact", False, LAYER)
PROTOCOLS = ("weights_lens", "weights_forward")


def first(model: ModelHandle, fact: Fact, name: str) -> int:
    row = model.encode(fact.prompt, name)
    return row.ids[row.prompt]


def toward(model: ModelHandle, token: int) -> Tensor:
    """The direction of the stream that raises a token most, by the final norm and the head."""
    gain = next(model.final_norm.parameters())
    return (model.model.get_output_embeddings().weight[token] * gain).detach()


def rank_one(model: ModelHandle, right: Tensor, seed: int = 0, layer: int = LAYER) -> Difference:
    """A change for each of some directions `[F, d_model]`, read by random keys."""
    width = model.w_out(layer).shape[1]
    left = torch.randn(len(right), 1, width, generator=torch.Generator().manual_seed(seed))
    return Difference(layer, left, right[:, None])


def measure(
    model: ModelHandle,
    facts: Splits,
    differences: Sequence[Difference],
    change: Change = INDEPENDENT,
    **options: object,
) -> list[Row]:
    method = Inversion(**options)  # type: ignore[arg-type]
    return list(method.measure(Scene(model, facts, change, differences=differences), None))


def mean(rows: Sequence[Row], metric: str, protocol: str, budget: int | None = None) -> float:
    return fmean(
        row.value
        for row in rows
        if (row.metric, row.protocol, row.budget) == (metric, protocol, budget)
        and row.value is not None
    )


# -- what was planted ------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["old", "new"])
def test_an_object_that_is_written_or_driven_away_is_named(
    model: ModelHandle, facts: Splits, name: str, sign: int
) -> None:
    wanted = [f.true if name == "old" else str(f.new) for f in facts.target]
    tokens = [first(model, f, w) for f, w in zip(facts.target, wanted, strict=True)]
    right = torch.stack([sign * toward(model, token) for token in tokens])
    rows = measure(model, facts, [rank_one(model, right)], scale=20.0)
    other = "new" if name == "old" else "old"
    for protocol in PROTOCOLS:
        assert mean(rows, "inversion_success", f"{protocol}_{name}", 5) > 0.8
        assert mean(rows, "inversion_rank", f"{protocol}_{name}") > 0.9
        assert mean(rows, "inversion_success", f"{protocol}_{other}", 1) < 0.5
        assert mean(rows, "inversion_baseline", f"{protocol}_{name}", 1) < 0.2


def test_the_lens_is_the_largest_logit_of_the_span(model: ModelHandle) -> None:
    """Against directions tried one by one, and whatever basis the span is told in."""
    basis = torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(0)).double())
    span = basis.Q.T
    found = module._lens(model, span)
    weights = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1)).double()
    tried = torch.nn.functional.normalize(weights, dim=1) @ span * 32**0.5
    with torch.no_grad():
        best = logits(model, model.final_norm(tried.float())).amax(0)
    assert (found >= best - 1e-4).all()
    assert (found <= best * 1.05).all()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).double()).Q
    torch.testing.assert_close(module._lens(model, turn @ span), found, rtol=1e-4, atol=1e-4)


def test_a_push_is_that_of_a_plain_forward_pass(model: ModelHandle, facts: Splits) -> None:
    vectors = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    text = model.encode(facts.others[0].prompt)
    model.batch_size = 2
    found = module._rises(model, text, 1, [vectors[:3], vectors[3:]])
    ids = torch.tensor([text.ids])
    plain = model.model(ids).logits[0, -1].log_softmax(-1)

    def pushed(vector: Tensor) -> Tensor:
        def hook(block: object, args: object, output: Tensor) -> Tensor:
            return torch.cat([output[:, :-1], output[:, -1:] + vector], 1)

        handle = model.blocks[1].register_forward_hook(hook)
        try:
            return model.model(ids).logits[0, -1].log_softmax(-1) - plain  # type: ignore[no-any-return]
        finally:
            handle.remove()

    for some, group in zip(found, (vectors[:3], vectors[3:]), strict=True):
        wanted = torch.stack([pushed(vector) for vector in group]).amax(0)
        torch.testing.assert_close(some, wanted, rtol=1e-4, atol=1e-4)


def test_the_layer_with_the_largest_relative_change_is_read(
    model: ModelHandle, facts: Splits
) -> None:
    true = torch.stack([toward(model, first(model, f, f.true)) for f in facts.target])
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(0))
    said = {}
    for size in (0.01, 100.0):
        layers = [rank_one(model, noise, layer=1), rank_one(model, size * true, layer=2)]
        said[size] = mean(measure(model, facts, layers), "inversion_rank", "weights_lens_old")
    assert said[100.0] > 0.9 > said[0.01]


def test_one_change_of_all_facts_is_read_as_a_span(model: ModelHandle) -> None:
    """Two classes are written and the other two are not; no fact is told from another."""
    facts = make_splits()
    pair = facts.classes[RELATION][:2]
    some = tuple(
        replace(f, new=pair[1 - pair.index(f.true)]) for f in facts.target if f.true in pair
    )
    facts = replace(facts, target=some)
    right = torch.stack([toward(model, first(model, some[0], name)) for name in pair])
    one = rank_one(model, right)
    joint = Difference(LAYER, one.left[:, 0][None], right[None])
    rows = measure(model, facts, [joint], JOINT)
    for name in ("old", "new"):
        assert mean(rows, "inversion_success", f"weights_lens_{name}", 5) == 1
        assert mean(rows, "inversion_rank", f"weights_lens_{name}") == 1
    assert mean(rows, "inversion_baseline", "weights_lens_old", 1) == 0


# -- what was not ----------------------------------------------------------------------------------


def test_a_random_direction_tells_nothing(model: ModelHandle, facts: Splits) -> None:
    """Over seeds success is that of unrelated objects, and the rank is a coin's."""
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(12):
        noise = torch.randn(len(facts.target), 32, generator=torch.Generator().manual_seed(seed))
        rows = measure(model, facts, [rank_one(model, noise)], budgets=[20])
        for protocol in PROTOCOLS:
            for metric, budget in (
                ("inversion_success", 20),
                ("inversion_baseline", 20),
                ("inversion_rank", None),
            ):
                value = mean(rows, metric, f"{protocol}_old", budget)
                found.setdefault((metric, protocol), []).append(value)
    for protocol in PROTOCOLS:
        success, chance = (
            fmean(found[metric, protocol]) for metric in ("inversion_success", "inversion_baseline")
        )
        assert success == pytest.approx(chance, abs=0.08)
        assert chance < 0.25
        assert fmean(found["inversion_rank", protocol]) == pytest.approx(0.5, abs=0.12)


def test_another_facts_secret_is_not_this_ones(model: ModelHandle, facts: Splits) -> None:
    """Each fact's ΔW writes an unrelated object: that one is found, and stands in the baseline."""
    classes = facts.classes[RELATION]
    third = [next(c for c in classes if c not in (f.true, f.new)) for f in facts.target]
    tokens = [first(model, f, name) for f, name in zip(facts.target, third, strict=True)]
    right = torch.stack([toward(model, token) for token in tokens])
    rows = measure(model, facts, [rank_one(model, right)])
    assert mean(rows, "inversion_baseline", "weights_lens_old", 5) >= 0.5
    assert mean(rows, "inversion_rank", "weights_lens_old") < 0.6


@pytest.mark.parametrize("change", [INDEPENDENT, JOINT])
def test_without_a_changed_weight_all_is_null(
    model: ModelHandle, facts: Splits, change: Change
) -> None:
    rows = measure(model, facts, [], change)
    assert {(row.value, row.n, row.note) for row in rows} == {(None, 0, NO_WEIGHT)}
    nothing = rank_one(model, torch.zeros(len(facts.target), 32))
    keys = [(r.metric, r.protocol, r.fact_id, r.budget) for r in rows]
    for each in ([nothing], [rank_one(model, torch.randn(len(facts.target), 32))]):
        others = measure(model, facts, each)
        assert [(r.metric, r.protocol, r.fact_id, r.budget) for r in others] == keys
        assert each[0] is not nothing or {row.note for row in others} == {NO_WEIGHT}


def test_where_all_objects_are_written_there_is_no_baseline(
    model: ModelHandle, facts: Splits
) -> None:
    rows = measure(model, facts, [rank_one(model, torch.randn(1, 32))], JOINT)
    for row in rows:
        alone = row.metric != "inversion_success"
        assert (row.value is None) is alone
        assert row.note == (ALL_WRITTEN if alone else None)


def test_shared_first_tokens_say_nothing(model: ModelHandle, facts: Splits) -> None:
    same = replace(facts, target=tuple(replace(f, new=f.true) for f in facts.target))
    rows = measure(model, same, [rank_one(model, torch.randn(len(facts.target), 32))])
    assert {row.note for row in rows} == {SAME_TOKEN}


# -- the difference --------------------------------------------------------------------------------


def test_directions_are_those_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    one = Difference(0, *(torch.randn(2, 3, n, generator=generator) for n in (20, 12)))
    two = Difference(0, *(torch.randn(1, 1, n, generator=generator) for n in (20, 12)))
    [both] = merged([one, two])
    for fact in range(2):
        delta = one.right[fact].T @ one.left[fact] + two.right[0].T @ two.left[0]
        wanted = torch.linalg.svd(delta.double())
        found = both.directions(fact, 99)
        assert len(found) == 4
        torch.testing.assert_close(
            (found @ wanted.U[:, :4]).abs(), torch.eye(4).double(), atol=1e-5, rtol=0
        )
        assert torch.equal(both.directions(fact, 2), found[:2])
        assert float(both.norms()[fact]) == pytest.approx(float(delta.norm()), rel=1e-5)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"budgets": []}, r"evaluate\.inversion\.budgets to be at least 1, found 0"),
        ({"budgets": [0]}, r"evaluate\.inversion\.budgets to be at least 1, found 0"),
        ({"budgets": [5, 5]}, r"evaluate\.inversion\.budgets to name each value once, found \[5"),
        ({"scale": 0.0}, r"evaluate\.inversion\.scale to be a finite number above 0, found 0"),
    ],
)
def test_bad_settings_are_refused(mistake: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Inversion(**mistake)
