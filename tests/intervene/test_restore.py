"""Whatever happens, the model is afterwards what it was, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.intervene.changes.deltas import ReaderDeltas, WeightDeltas
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.intervene.intervention import Intervention, Unchanged
from palimpsest.model.forward import forward, next_token_logprobs
from palimpsest.model.handle import ModelHandle
from palimpsest.model.partial import Resume
from palimpsest.model.site import Change, Site
from palimpsest.model.tokens import collate
from tests.intervene.conftest import TARGETS, assert_untouched, copy_of, splits, weights

ERASED = ("residual", "mlp", "attention", "attention_norm", "mlp_norm")
KINDS = ("independent", "joint", "readers", *ERASED, "unchanged")
LAYER = 1


def intervention(kind: str, handle: ModelHandle) -> Intervention:
    """Random tensors, so large that undoing them by subtraction would leave a trace."""
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return 1000 * torch.randn(*shape, generator=generator)

    if kind == "unchanged":
        return Unchanged(change=Change("fact", False, None), model=handle.fingerprint)
    if kind in ("independent", "joint"):
        independent = kind == "independent"
        facts = len(TARGETS) if independent else 1
        width = handle.w_out(LAYER).shape[1]
        change = Change("fact", independent, LAYER)
        left, right = noise(facts, 2, width), noise(facts, 2, handle.width)
        return WeightDeltas(change=change, model=handle.fingerprint, left=left, right=right)
    if kind == "readers":
        readers = handle.readers(Site(LAYER, "mlp_norm"))
        return ReaderDeltas(
            change=Change("relation", False, LAYER, "mlp_norm"),
            model=handle.fingerprint,
            left=noise(sum(len(weight) for weight, _ in readers), 2).double(),
            right=noise(2, handle.width).double(),
            shift=noise(sum(len(bias) for _, bias in readers if bias is not None)).double(),
        )
    left, right, bias = noise(handle.width, 3), noise(3, handle.width), noise(handle.width)
    return Erasure(
        change=Change("relation", False, LAYER, kind, "all"),
        model=handle.fingerprint,
        proj_left=left.double(),
        proj_right=right.double(),
        bias=bias.double(),
    )


def probabilities(handle: ModelHandle) -> Tensor:
    """After each target's prompt, under its own delta."""
    rows = [handle.encode(fact.prompt, owner=i) for i, fact in enumerate(TARGETS)]
    return next_token_logprobs(handle, rows)


@contextmanager
def failing(
    handle: ModelHandle, layer: int, error: BaseException, after: int = 0
) -> Iterator[None]:
    """Every forward pass but the first few fails after block `layer`."""
    passes = count()

    def fail(_: Tensor) -> None:
        if next(passes) >= after:
            raise error

    with handle.hooked([(handle.blocks[layer], fail)]):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_restored_after_success(model: ModelHandle, kind: str) -> None:
    before, expected = weights(model), probabilities(model)
    with intervention(kind, model).applied(model):
        inside = probabilities(model)
    assert torch.equal(inside, expected) == (kind == "unchanged")
    assert_untouched(model, before)
    assert torch.equal(probabilities(model), expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_restored_after_an_error(
    model: ModelHandle, kind: str, error: type[BaseException]
) -> None:
    before = weights(model)

    def ask_and_fail() -> None:
        with intervention(kind, model).applied(model):
            probabilities(model)
            raise error

    with pytest.raises(error):
        ask_and_fail()
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_restored_after_an_error_in_a_forward_pass(
    model: ModelHandle, kind: str, error: type[BaseException]
) -> None:
    before = weights(model)
    with intervention(kind, model).applied(model):
        with pytest.raises(error), failing(model, 2, error()):
            probabilities(model)
        assert model.running is None
        probabilities(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("outer", ["independent", "joint", "residual"])
@pytest.mark.parametrize("inner", ["joint", "mlp", "readers"])
def test_changes_nest(model: ModelHandle, outer: str, inner: str) -> None:
    before = weights(model)
    with intervention(outer, model).applied(model):
        during = probabilities(model)
        with pytest.raises(ValueError, match="inside"), intervention(inner, model).applied(model):
            raise ValueError("inside")
        assert torch.equal(probabilities(model), during)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unchanged"])
def test_another_model_is_refused(model: ModelHandle, kind: str) -> None:
    fitted = intervention(kind, model)
    other = copy_of(model)
    other.w_out(0)[0, 0] += 1e-6
    before = weights(other)
    message = f"fingerprint {model.fingerprint[:12]}.*found {other.fingerprint[:12]}; load that"
    with pytest.raises(RequestError, match=message), fitted.applied(other):
        pass
    assert_untouched(other, before)
    with fitted.applied(copy_of(model)):
        pass


# -- passes that begin in the middle ---------------------------------------------------------------


def resumed(handle: ModelHandle) -> tuple[Resume, Tensor]:
    """A pass over the targets from block 2 and their subjects' last tokens on."""
    rows = [handle.encode(fact.prompt) for fact in TARGETS]
    starts = torch.tensor([row.at("last_subject") for row in rows])
    return Resume.capture(handle, collate(rows, handle.device), 2, starts), starts


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_blocks_passed_over_get_their_own_forward_back(
    model: ModelHandle, error: type[BaseException]
) -> None:
    before, (resume, _) = weights(model), resumed(model)
    with suppress(error), failing(model, 3, error()):
        resume.run(model)
    assert_untouched(model, before)
    assert all(block.forward.__self__ is block for block in model.blocks)


def test_a_failed_resumed_pass_can_be_run_again(model: ModelHandle) -> None:
    resume, starts = resumed(model)
    with pytest.raises(RuntimeError), failing(model, 2, RuntimeError()):
        resume.run(model)
    with torch.no_grad():
        found = resume.run(model)
        for n, fact in enumerate(TARGETS):
            row = model.encode(fact.prompt)
            whole = forward(model, collate([row], model.device))[0]
            rest = whole[starts[n] :]
            torch.testing.assert_close(found[n, : len(rest)], rest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_a_fit_that_fails_leaves_the_model_alone(
    model: ModelHandle, after: int, empty_cache: Path
) -> None:
    before = weights(model)
    method = Rome(variant="plain", search=ValueSearch(3), prefixes=GivenPrefixes([]))
    with pytest.raises(KeyboardInterrupt), failing(model, 3, KeyboardInterrupt(), after):
        method.fit(model, splits(TARGETS[:4]), Site(2, "mlp"))  # a single batch
    assert_untouched(model, before)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert not list(empty_cache.rglob("*.safetensors"))
