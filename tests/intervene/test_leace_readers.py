"""LEACE in the readers of a norm: the fold is the hook, and a checkpoint like any other."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.intervene.changes.composition import Composition
from palimpsest.intervene.changes.deltas import ReaderDeltas
from palimpsest.intervene.changes.kinds import KINDS
from palimpsest.intervene.erasers.eraser import cross_covariance
from palimpsest.intervene.erasers.leace import Leace
from palimpsest.intervene.erasers.leace_readers import LeaceReaders
from palimpsest.intervene.erasers.leace_weights import LeaceWeights
from palimpsest.intervene.intervention import Intervention, load
from palimpsest.model.forward import forward, logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import NORMS, Part, Site
from palimpsest.model.tokens import collate
from tests.architectures.tiny import make_handle as make_architecture
from tests.intervene.concepts import LABELS, PLACES, SAMPLE, states
from tests.intervene.conftest import ARCHITECTURES, assert_untouched, copy_of, weights

LAYER = 2
each_norm = pytest.mark.parametrize("part", NORMS)


@pytest.fixture(scope="module")
def doubles(handles: dict[str, ModelHandle]) -> dict[str, ModelHandle]:
    return {kind: copy_of(handles[kind], torch.float64) for kind in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def double(request: pytest.FixtureRequest, doubles: dict[str, ModelHandle]) -> ModelHandle:
    return doubles[request.param]


def fold(model: ModelHandle, part: Part) -> Intervention:
    return LeaceReaders(part).fit(model, SAMPLE, Site(LAYER, part))


def hook(model: ModelHandle, part: Part) -> Intervention:
    return Leace(part, policy="all").fit(model, SAMPLE, Site(LAYER, part))


@torch.no_grad()
def said(model: ModelHandle) -> Tensor:
    """Logits at every token of the first places' prompts, in the model's precision."""
    rows = [model.encode(fact.prompt) for fact in PLACES[:8]]
    return logits(model, forward(model, collate(rows, model.device)))


def read(model: ModelHandle, part: Part) -> list[Tensor]:
    """What each reader gives at the fit sample's fit position, `[n, out]`."""
    found: list[list[Tensor]] = [[] for _ in model.reading(Site(LAYER, part))]
    hooks = [
        (module, each.append)
        for module, each in zip(model.reading(Site(LAYER, part)), found, strict=True)
    ]
    rows = [model.encode(fact.prompt) for fact in SAMPLE.fit]
    for row in rows:
        with torch.no_grad(), model.hooked(hooks):  # type: ignore[arg-type]
            forward(model, collate([row], model.device))
    return [torch.stack([states[0, -1] for states in each]) for each in found]


@each_norm
def test_with_biases_the_fold_is_the_hook(doubles: dict[str, ModelHandle], part: Part) -> None:
    gpt2 = doubles["gpt2"]
    folded = fold(gpt2, part)
    assert isinstance(folded, ReaderDeltas)
    before, plain = weights(gpt2), said(gpt2)
    with folded.applied(gpt2):
        found = said(gpt2)
    with hook(gpt2, part).applied(gpt2):
        wanted = said(gpt2)
    assert (found - wanted).abs().max() < 1e-6
    assert (found - plain).abs().max() > 1e-2
    assert not [row for row in folded.diagnostics if row.metric == "shift_left_out"]
    assert_untouched(gpt2, before)


@each_norm
def test_without_biases_the_fold_is_the_hook_but_for_one_vector(
    doubles: dict[str, ModelHandle], part: Part
) -> None:
    llama = doubles["llama"]
    folded, whole = fold(llama, part), hook(llama, part)
    linear = replace(whole, bias=torch.zeros_like(whole.bias))
    plain = said(llama)
    with folded.applied(llama):
        found, readings = said(llama), read(llama, part)
    with linear.applied(llama):
        assert (found - said(llama)).abs().max() < 1e-6
    assert (found - plain).abs().max() > 1e-2
    with whole.applied(llama):
        apart = [a - b for a, b in zip(read(llama, part), readings, strict=True)]
    shift = whole.proj_left @ (whole.proj_right @ whole.bias)
    for each, (weight, bias) in zip(apart, llama.readers(Site(LAYER, part)), strict=True):
        assert bias is None
        assert (each - weight @ shift).abs().max() < 1e-9
    [row] = [row for row in folded.diagnostics if row.metric == "shift_left_out"]
    assert row.value == pytest.approx(float(shift.norm() / whole.bias.norm()))


@torch.no_grad()
def test_readers_with_and_without_a_bias_of_one_norm() -> None:
    """GPT-J's attention has no biases, its MLP has; one norm serves both."""
    model = make_architecture("gptj")
    model = copy_of(model, torch.float64)
    facts = replace(SAMPLE, target=(), fit=tuple(spelt(fact) for fact in PLACES))
    found = {part: LeaceReaders(part).fit(model, facts, Site(LAYER, part)) for part in NORMS}
    folded = found["mlp_norm"]
    assert torch.equal(folded.left, found["attention_norm"].left)
    assert folded.shift.shape == model.reading(folded.site)[-1].bias.shape
    erasure = Leace("mlp_norm", policy="all").fit(model, facts, folded.site)
    linear = replace(erasure, bias=torch.zeros_like(erasure.bias))
    wanted: list[Tensor] = []
    batch = collate([model.encode(fact.prompt) for fact in facts.fit[:4]], model.device)
    for each in (linear, linear, linear, erasure):
        module = model.reading(folded.site)[len(wanted)]
        with each.applied(model), model.hooked([(module, wanted.append)]):  # type: ignore[list-item]
            forward(model, batch)
    readings: list[Tensor] = []
    hooks = [(module, readings.append) for module in model.reading(folded.site)]
    with folded.applied(model), model.hooked(hooks):  # type: ignore[arg-type]
        forward(model, batch)
    for mine, its in zip(readings, wanted, strict=True):
        assert (mine - its).abs().max() < 1e-9
    assert [row.metric for row in folded.diagnostics].count("shift_left_out") == 1


def spelt(fact):
    """A fact in the letters that the tiny architectures' tokenizer knows."""
    subject = " ".join(letter + "a" for letter in fact.subject.lower() if letter in "bdfgklmnprst")
    return replace(fact, prompt=type(fact.prompt).fill("fit", "na {} ro la", subject))


@each_norm
def test_what_the_readers_read_has_no_covariance_with_the_concept(
    double: ModelHandle, part: Part
) -> None:
    site = Site(LAYER, part)
    plain, there = read(double, part), states(double, site)
    with fold(double, part).applied(double):
        after, still = read(double, part), states(double, site)
    for before, left in zip(plain, after, strict=True):
        there_before = cross_covariance(before, LABELS).norm()
        assert there_before > 1e-3
        assert cross_covariance(left, LABELS).norm() < 1e-9 * there_before
    assert torch.equal(still, there)  # the norm itself gives what it gave


@each_norm
@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [(torch.float64, 0, 1e-12), (torch.float32, 1e-9, 1e-5), (torch.bfloat16, 1e-4, 0.1)],
)
def test_what_rounding_leaves_is_told(
    gpt2: ModelHandle, part: Part, dtype: torch.dtype, least: float, most: float
) -> None:
    model = copy_of(gpt2, dtype)
    folded, there = fold(model, part), states(model, Site(LAYER, part))
    [row] = [row for row in folded.diagnostics if row.protocol == "as_read"]
    assert least <= row.value < most
    readings = {}
    for name, context in (("before", nullcontext()), ("after", folded.applied(model))):
        with context:
            weights_now = [weight.double().clone() for weight, _ in model.readers(folded.site)]
        readings[name] = torch.cat([there @ weight.T for weight in weights_now], 1)
    before, after = (cross_covariance(readings[n], LABELS).norm() for n in ("before", "after"))
    assert row.value == pytest.approx(float(after / before), rel=1e-3, abs=1e-13)
    assert (row.metric, row.n) == ("residual_cross_covariance", len(PLACES))


@each_norm
def test_the_residual_stream_still_carries_the_concept(
    doubles: dict[str, ModelHandle], part: Part
) -> None:
    """Not even the output of the same block is covered."""
    llama, after = doubles["llama"], Site(LAYER, "residual")
    before = cross_covariance(states(llama, after), LABELS).norm()
    with fold(llama, part).applied(llama):
        assert cross_covariance(states(llama, after), LABELS).norm() > 1e-2 * before


@each_norm
def test_each_reader_changes_by_at_most_the_rank_of_the_concept(
    model: ModelHandle, part: Part
) -> None:
    folded = fold(model, part)
    before = [weight.clone() for weight, _ in model.readers(folded.site)]
    with folded.applied(model):
        changes = [
            weight.double() - old.double()
            for (weight, _), old in zip(model.readers(folded.site), before, strict=True)
        ]
    ranks = {int(torch.linalg.matrix_rank(change, rtol=1e-4)) for change in changes}
    assert ranks == {LABELS.shape[1] - 1}


@each_norm
def test_nothing_but_its_readers_changes_and_all_is_taken_back(
    model: ModelHandle, part: Part
) -> None:
    folded, before = fold(model, part), weights(model)
    with folded.applied(model):
        during = weights(model)
    assert_untouched(model, before)
    names = {module: name for name, module in model.model.named_modules()}
    own = tuple(f"{names[module]}." for module in model.reading(folded.site))
    changed = {name for name in before if not torch.equal(before[name], during[name])}
    assert changed == {name for name in before if name.startswith(own)}


def test_several_layers_come_back_from_disk(model: ModelHandle, tmp_path: Path) -> None:
    folded = LeaceReaders(layers=[1, 2]).fit(model, SAMPLE, Site(LAYER, "mlp_norm"))
    assert isinstance(folded, Composition)
    assert [part.site.layer for part in folded.parts] == [1, 2]
    folded.save(tmp_path)
    again = load(tmp_path, KINDS)
    assert again.digest == folded.digest
    with folded.applied(model):
        wanted = weights(model)
    with again.applied(model):
        assert_untouched(model, wanted)


@pytest.mark.parametrize(
    "mistake",
    [
        {"part": "residual"},
        {"part": "mlp"},
        {"policy": "all_but_sink"},
        {"policy": "last_prompt"},
        {"gate": "subjects"},
    ],
)
def test_what_no_weight_can_hold_is_refused(mistake: dict) -> None:
    with pytest.raises(RequestError, match=r"what reads a norm, which acts on every.*=leace for"):
        LeaceReaders(**mistake)
    [(name, value)] = mistake.items()
    if value != "mlp":
        with pytest.raises(RequestError, match=rf"intervene\.{name}=.*W_out, .* found '{value}'"):
            LeaceWeights(**mistake)


@each_norm
@pytest.mark.parametrize("method", [Leace, LeaceReaders])
def test_a_model_without_norms_in_front_is_refused(method: type[Leace], part: Part) -> None:
    model = make_architecture("opt-350m")
    policy = {"policy": "all"}
    facts = replace(SAMPLE, target=(), fit=tuple(spelt(fact) for fact in PLACES))
    with pytest.raises(RequestError, match=rf"for a change at {part}, found do_layer_norm_before"):
        method(part, **policy).fit(model, facts, Site(LAYER, part))
