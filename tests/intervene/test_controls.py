"""Controls: the same push in another direction, and no push at all."""

import pytest
import torch

from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.controls import NoChange, RandomDelta
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.model.forward import next_token_logprobs
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene.conftest import TARGETS, splits

SITE = Site(1, "mlp")


def base(protocol: str = "independent") -> Rome:
    """What is imitated."""
    return Rome(
        variant="plain", protocol=protocol, search=ValueSearch(6), prefixes=GivenPrefixes([])
    )


def fit(model: ModelHandle, method: Rome | RandomDelta) -> WeightDeltas:
    """Deltas of all targets."""
    return method.fit(model, splits(TARGETS), SITE)


@pytest.mark.parametrize("protocol", ["independent", "batch"])
def test_a_random_delta_has_its_bases_keys_and_norms(model: ModelHandle, protocol: str) -> None:
    real, random = fit(model, base(protocol)), fit(model, RandomDelta(base(protocol)))
    assert torch.equal(random.left, real.left)
    assert random.right.shape == real.right.shape
    torch.testing.assert_close(random.right.norm(dim=-1), real.right.norm(dim=-1))
    assert real.right.norm(dim=-1).min() > 0
    assert random.change == real.change
    assert random.model == real.model
    cosine = torch.cosine_similarity(random.right, real.right, dim=-1)
    assert cosine.abs().max() < 0.9
    assert cosine.abs().mean() < 0.4


def test_the_facts_directions_differ(gpt2: ModelHandle) -> None:
    right = fit(gpt2, RandomDelta(base())).right[:, 0]
    cosine = torch.cosine_similarity(right[None], right[:, None], dim=-1) - torch.eye(len(right))
    assert cosine.abs().max() < 0.9


def test_a_random_delta_is_the_seeds(gpt2: ModelHandle) -> None:
    first, again, other = (fit(gpt2, RandomDelta(base(), seed)).right for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_random_directions_have_no_favourite(gpt2: ModelHandle) -> None:
    rights = torch.cat([fit(gpt2, RandomDelta(base(), seed)).right[:, 0] for seed in range(40)])
    units = rights / rights.norm(dim=1, keepdim=True)
    assert units.mean(0).norm() < 0.15  # 200 directions: about 200 ** -0.5


def test_a_random_delta_names_what_it_imitates() -> None:
    assert RandomDelta(base()).imitates == base()
    assert RandomDelta(base()).part == base().part == "mlp"


def test_no_change_changes_nothing(model: ModelHandle) -> None:
    unchanged = NoChange().fit(model, splits(TARGETS), SITE)
    rows = [model.encode(fact.prompt, owner=i) for i, fact in enumerate(TARGETS)]
    before = next_token_logprobs(model, rows)
    with unchanged.applied(model):
        assert torch.equal(next_token_logprobs(model, rows), before)
    assert unchanged.change.layer is None
    assert not unchanged.change.reaches(3, "last_prompt")
    assert unchanged.tensors() == {}
    assert NoChange().part == "residual"
