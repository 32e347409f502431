"""A change gives way to the same method's change of other facts, and is put back bit for bit."""

from types import SimpleNamespace

import pytest
import torch

from palimpsest.intervene.changes.composition import Composition
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.intervention import Unchanged
from palimpsest.model.forward import features
from palimpsest.model.site import Change, Site
from palimpsest.results import shadowed
from tests.evaluate.toy import make_splits
from tests.model.tiny import make_handle

FACTS = make_splits()


def deltas(model, facts: int, independent: bool, seed: int) -> WeightDeltas:
    generator = torch.Generator().manual_seed(seed)
    width, inner = model.w_out(1).shape
    left, right = (torch.randn(facts, 1, n, generator=generator) for n in (inner, width))
    change = Change("fact", independent, 1)
    return WeightDeltas(change=change, model=model.fingerprint, left=left, right=right)


def erasure(model) -> Erasure:
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(model.width, 2, generator=generator, dtype=torch.float64)
    change = Change("relation", False, 1, "residual", "all", fitted_on=("fit",))
    bias = torch.zeros(model.width, dtype=torch.float64)
    return Erasure(
        change=change, model=model.fingerprint, proj_left=left, proj_right=left.T / 9, bias=bias
    )


def states(model, facts) -> torch.Tensor:
    rows = [model.encode(fact.prompt, owner=n) for n, fact in enumerate(facts)]
    return features(model, rows, [Site(1)], ["last_prompt"])


def together(*parts) -> Composition:
    change = parts[0].change
    return Composition(change=change, model=parts[0].model, parts=parts)


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_an_edit_gives_way_to_that_of_other_facts(independent, fails):
    model, targets, others = make_handle(), FACTS.target, FACTS.probe[:4]
    asked = []

    def again(facts):
        assert not model.changes  # fitted on the unchanged model
        asked.append(facts)
        return deltas(model, 4 if independent else 1, independent, seed=2)

    ground = SimpleNamespace(model=model, split=lambda: FACTS, seed=0)
    own = deltas(model, len(targets) if independent else 1, independent, seed=1)
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    with shadowed(own, ground, again) as shadow:
        before = states(model, targets)
        try:
            with shadow(others) as change:
                assert change.independent is independent
                theirs = states(model, others)
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert torch.equal(states(model, targets), before)
    assert all(torch.equal(v, weights[name]) for name, v in model.model.state_dict().items())
    with deltas(model, 4 if independent else 1, independent, seed=2).applied(model):
        assert torch.equal(states(model, others), theirs)
    [facts] = asked
    assert [f.subject for f in facts.target] == [f.subject for f in others]
    assert all(f.new not in (None, f.true) for f in facts.target)


def test_what_all_subjects_feel_stays_as_it_is():
    def never(_):
        raise AssertionError("it was fitted again")

    model = make_handle()
    ground = SimpleNamespace(model=model, split=lambda: FACTS, seed=0)
    nothing = Unchanged(change=Change("fact", False, None), model=model.fingerprint)
    for own in (nothing, erasure(model), together(erasure(model), nothing)):
        with shadowed(own, ground, never) as shadow:
            before = states(model, FACTS.probe)
            with shadow(FACTS.probe) as change:
                assert change == own.change
                assert torch.equal(states(model, FACTS.probe), before)


def test_a_pair_of_an_eraser_and_an_edit_is_carried_out_again():
    model = make_handle()
    ground = SimpleNamespace(model=model, split=lambda: FACTS, seed=0)
    own = together(erasure(model), deltas(model, 1, False, seed=1))
    again = together(erasure(model), deltas(model, 1, False, seed=2))
    with shadowed(own, ground, lambda _: again) as shadow:
        before = states(model, FACTS.probe)
        with shadow(FACTS.probe):
            assert not torch.equal(states(model, FACTS.probe), before)
