"""LEACE in the weights: the fold is the hook, and a checkpoint like any other."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from palimpsest.errors import RequestError
from palimpsest.intervene.changes.composition import Composition
from palimpsest.intervene.changes.deltas import BiasShift, WeightDeltas
from palimpsest.intervene.changes.kinds import KINDS
from palimpsest.intervene.erasers.eraser import cross_covariance
from palimpsest.intervene.erasers.leace import Leace
from palimpsest.intervene.erasers.leace_weights import LeaceWeights
from palimpsest.intervene.intervention import load
from palimpsest.model.forward import next_token_logprobs
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from tests.intervene.concepts import LABELS, PLACES, SAMPLE, states
from tests.intervene.conftest import assert_untouched, weights

SITE = Site(2, "mlp")


def test_with_a_bias_the_fold_is_the_hook(gpt2: ModelHandle) -> None:
    rows = [gpt2.encode(fact.prompt) for fact in PLACES]
    folded = LeaceWeights().fit(gpt2, SAMPLE, SITE)
    hook = Leace("mlp", policy="all").fit(gpt2, SAMPLE, SITE)
    assert [type(part) for part in folded.parts] == [WeightDeltas, BiasShift]
    before, plain = weights(gpt2), next_token_logprobs(gpt2, rows)
    with folded.applied(gpt2):
        found = next_token_logprobs(gpt2, rows)
    with hook.applied(gpt2):
        wanted = next_token_logprobs(gpt2, rows)
    assert (found - wanted).abs().max() < 1e-5
    assert (found - plain).abs().max() > 1e-2
    assert_untouched(gpt2, before)


def test_without_a_bias_the_fold_is_the_hook_but_for_one_vector(llama: ModelHandle) -> None:
    folded = LeaceWeights().fit(llama, SAMPLE, SITE)
    hook = Leace("mlp", policy="all").fit(llama, SAMPLE, SITE)
    assert isinstance(folded, WeightDeltas)
    linear = replace(hook, bias=torch.zeros_like(hook.bias))
    rows = [llama.encode(fact.prompt) for fact in PLACES]
    with folded.applied(llama):
        found = next_token_logprobs(llama, rows)
        after = states(llama, SITE)
    with linear.applied(llama):
        assert (found - next_token_logprobs(llama, rows)).abs().max() < 1e-5
    with hook.applied(llama):
        shift = states(llama, SITE) - after
    assert (shift - shift[0]).abs().max() < 1e-5  # the same for all
    before = cross_covariance(states(llama, SITE), LABELS).norm()
    assert cross_covariance(after, LABELS).norm() < 1e-5 * before
    [row] = [row for row in folded.diagnostics if row.metric == "shift_left_out"]
    wanted = hook.proj_left @ (hook.proj_right @ hook.bias)
    assert row.value == pytest.approx(float(wanted.norm() / hook.bias.norm()))


def test_the_change_has_at_most_the_rank_of_the_concept(model: ModelHandle) -> None:
    folded = LeaceWeights().fit(model, SAMPLE, SITE)
    deltas = folded.parts[0] if isinstance(folded, Composition) else folded
    assert torch.linalg.matrix_rank(deltas.matrix(0), rtol=1e-5) == LABELS.shape[1] - 1
    assert deltas.layer == SITE.layer


def test_it_comes_back_from_disk(gpt2: ModelHandle, tmp_path: Path) -> None:
    folded = LeaceWeights(layers=[1, 2]).fit(gpt2, SAMPLE, SITE)
    assert len(folded.parts) == 4
    folded.save(tmp_path)
    assert load(tmp_path, KINDS).digest == folded.digest


@pytest.mark.parametrize(
    "mistake", [{"part": "residual"}, {"policy": "last_prompt"}, {"gate": "subjects"}]
)
def test_what_no_weight_can_hold_is_refused(mistake: dict) -> None:
    with pytest.raises(RequestError, match=r"acts on every token.*intervene=leace"):
        LeaceWeights(**mistake)
