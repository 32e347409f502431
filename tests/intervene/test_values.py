"""The search for v* and z: every objective's loss and way against whole forward passes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.facts.fact import Prompt
from palimpsest.intervene.editors.values import Values, ValueSearch
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene import literal
from tests.intervene.conftest import CONTEXTS, ENDING, TARGETS, relative

OBJECTIVES = ("inject", "erase", "amplify", "force", "trace_reversal")
NOISY = ("force", "trace_reversal")

FACTS = (*TARGETS[1:3], ENDING[0])
"""Subjects of few tokens and of many; one prompt ends with its subject."""


def search(objective: str, **options: float) -> ValueSearch:
    """A short search that nothing stops early."""
    return ValueSearch(**{"steps": 4, "stop_below": -1e9, **options}, objective=objective)


def module(model: ModelHandle, site: Site) -> torch.nn.Module:
    """Where the plain version adds δ."""
    return (literal.w_out if site.part == "mlp" else literal.block)(model, site.layer)


def plain(model: ModelHandle, method: ValueSearch, site: Site) -> list[literal.Search]:
    """The plain version of a search for each chosen fact."""
    noise = literal.noises(model, FACTS, method)
    return [
        literal.Search.of(
            model,
            fact,
            CONTEXTS,
            module(model, site),
            method,
            noise[i] if method.objective in NOISY else None,
        )
        for i, fact in enumerate(literal.known(model, FACTS))
    ]


def chance(model: ModelHandle, one: literal.Search, delta: Tensor) -> float:
    """The object's probability after the prompts, as the objective reads it."""
    chances = one.chances(model, delta)
    mean = torch.mean if one.method.objective != "erase" else torch.sum
    with torch.no_grad():
        return float(torch.stack([mean(tokens) for tokens in chances]).mean())


def find(model: ModelHandle, method: ValueSearch, site: Site) -> Values:
    """What the batched search finds."""
    return method.find(model, literal.known(model, FACTS), site, CONTEXTS)


@pytest.mark.parametrize("site", [Site(0, "mlp"), Site(2, "residual")])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_searched_like_the_literal_one(
    model: ModelHandle, objective: str, site: Site
) -> None:
    method = search(objective)
    found = find(model, method, site)
    for i, one in enumerate(plain(model, method, site)):
        expected = literal.find(model, one)
        assert relative(found.start[i], expected.start) < 1e-5
        # Adam divides by the gradient's size: where p is small, rounding shows.
        assert relative(found.delta[i], expected.delta) < 1e-2
        assert float(found.loss[i]) == pytest.approx(expected.loss, rel=2e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_last_loss_is_the_loss_at_delta(model: ModelHandle, objective: str) -> None:
    """Evaluated anew, with weights of the other terms that cannot be overlooked."""
    method = search(objective, kl=2.0, weight_decay=3.0)
    site = Site(1, "mlp")
    found = find(model, method, site)
    for i, one in enumerate(plain(model, method, site)):
        with torch.no_grad():
            loss = one.loss(model, found.delta[i], found.start[i])
            others = replace(one, method=replace(method, kl=0.0, weight_decay=0.0))
            aim = others.loss(model, found.delta[i], found.start[i])
        assert float(found.loss[i]) == pytest.approx(float(loss), rel=1e-4)
        assert abs(float(loss - aim)) > 0.01


@pytest.mark.parametrize("site", [Site(1, "mlp"), Site(1, "residual")])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_moves_its_probability(
    model: ModelHandle, objective: str, site: Site
) -> None:
    method = search(objective, steps=12, kl=0.0, weight_decay=0.0, lr=0.1)
    found = find(model, method, site)
    for i, one in enumerate(plain(model, method, site)):
        before, after = (chance(model, one, d) for d in (torch.zeros(model.width), found.delta[i]))
        assert after < before if objective == "erase" else after > before, (before, after)


def test_the_objectives_differ(gpt2: ModelHandle) -> None:
    deltas = [find(gpt2, search(objective), Site(1, "mlp")).delta for objective in OBJECTIVES]
    for i, one in enumerate(deltas):
        assert all(relative(one, other) > 0.1 for other in deltas[i + 1 :])


@pytest.mark.parametrize("objective", NOISY)
def test_the_noise_is_the_seeds(gpt2: ModelHandle, objective: str) -> None:
    first, other = (
        find(gpt2, replace(search(objective), seed=seed), Site(1, "mlp")).delta for seed in (0, 1)
    )
    assert not torch.allclose(first, other)


def test_what_a_noised_model_says_is_taken_token_by_token(model: ModelHandle) -> None:
    """Also where the tokens are no text that would be cut into them again."""
    method = replace(search("trace_reversal"), noise=20.0)
    site = Site(1, "mlp")
    found = find(model, method, site)
    texts = []
    for i, one in enumerate(plain(model, method, site)):
        with torch.no_grad():
            loss = float(one.loss(model, found.delta[i], found.start[i]))
        assert float(found.loss[i]) == pytest.approx(loss, rel=1e-4)
        again = literal.token_ids(model, f" {model.decode(one.object).strip()}")
        texts.append(again == one.object)
    assert not all(texts)


def test_a_larger_share_of_facts_in_a_batch_changes_nothing(gpt2: ModelHandle) -> None:
    small = literal_copy(gpt2, 2)
    for objective in ("inject", "erase"):
        method = search(objective)
        one, other = (find(m, method, Site(1, "mlp")) for m in (gpt2, small))
        assert relative(one.delta, other.delta) < 1e-3


def literal_copy(model: ModelHandle, batch_size: int) -> ModelHandle:
    """The same model, with another batch size."""
    return ModelHandle(model.model, model.tokenizer, model.name, model.prefix, batch_size)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"objective": "ereas"}, "search.objective.*inject, erase.*'ereas'.*did you mean"),
        ({"steps": 0}, "search.steps.*at least 1.*0"),
        ({"noise": 0.0}, r"intervene.search.noise to be a finite number above 0, found 0.0"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(mistake: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ValueSearch(**mistake)


@pytest.mark.parametrize("objective", OBJECTIVES[1:])
def test_only_a_new_object_to_be_written_has_to_be_there(objective: str) -> None:
    without = replace(TARGETS[0], new=None)
    search(objective).check(without)
    with pytest.raises(RequestError, match=f"{without.id} without a new object"):
        search("inject").check(without)
    with pytest.raises(RequestError, match="without a subject in its prompt"):
        search(objective).check(replace(without, prompt=Prompt("fit", "They speak")))
