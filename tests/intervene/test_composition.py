"""Several changes at once, and one that grew edit by edit: applied, undone, saved, told apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.intervene.changes.composition import Composition, History
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.changes.dense import DenseDeltas
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.intervene.intervention import Intervention, load
from palimpsest.model.forward import next_token_logprobs
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site
from tests.intervene.conftest import TARGETS, assert_untouched, copy_of, weights

KINDS = [WeightDeltas, DenseDeltas, Composition, History]


def noise(seed: int, *shape: int) -> Tensor:
    """So large that undoing it by subtraction would leave a trace."""
    return 100 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low(model: ModelHandle, layer: int, seed: int = 0, facts: int = 1) -> WeightDeltas:
    """A change of rank 2, for all or for each fact."""
    width = model.w_out(layer).shape[1]
    return WeightDeltas(
        change=Change("fact", facts > 1, layer),
        model=model.fingerprint,
        left=noise(seed, facts, 2, width),
        right=noise(seed + 1, facts, 2, model.width),
    )


def dense(model: ModelHandle, layer: int, seed: int = 0, facts: int = 1) -> DenseDeltas:
    """A change of full rank, for all or for each fact."""
    return DenseDeltas(
        change=Change("fact", facts > 1, layer),
        model=model.fingerprint,
        delta=noise(seed, facts, *model.w_out(layer).shape),
    )


def composed(*parts: Intervention) -> Composition:
    """Several at once."""
    return Composition(change=parts[0].change, model=parts[0].model, parts=parts)


def history(*parts: Intervention) -> History:
    """States after 1, 2, 5, ... edits."""
    steps = (1, 2, 5, 10)[: len(parts)]
    return History(change=parts[-1].change, model=parts[0].model, parts=parts, steps=steps)


def made(model: ModelHandle) -> dict[str, Intervention]:
    """One of every shape."""
    both = composed(low(model, 0), low(model, 2, 3))
    return {
        "composition": both,
        "one layer twice": composed(low(model, 1), dense(model, 1, 5)),
        "independent": composed(low(model, 0, 0, 5), dense(model, 2, 4, 5)),
        "history": history(low(model, 1), low(model, 1, 7)),
        "history of dense": history(dense(model, 1), dense(model, 1, 7), dense(model, 1, 9)),
        "history of compositions": history(
            both, both.plus(composed(low(model, 0, 8), low(model, 2, 9)))
        ),
        "nested": composed(both, composed(dense(model, 3))),
    }


NAMES = (
    "composition",
    "one layer twice",
    "independent",
    "history",
    "history of dense",
    "history of compositions",
    "nested",
)


def probabilities(model: ModelHandle) -> Tensor:
    """After each target's prompt."""
    return next_token_logprobs(
        model, [model.encode(f.prompt, owner=i) for i, f in enumerate(TARGETS)]
    )


# -- applied and undone ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_applied_and_undone(model: ModelHandle, name: str) -> None:
    before, expected, change = weights(model), probabilities(model), made(model)[name]
    with change.applied(model):
        inside = probabilities(model)
    assert not torch.allclose(inside, expected)
    assert_untouched(model, before)
    assert model.changes == []
    with pytest.raises(KeyboardInterrupt), change.applied(model):
        raise KeyboardInterrupt
    assert_untouched(model, before)
    assert model.changes == []


def test_parts_add_up(model: ModelHandle) -> None:
    first, second = low(model, 1), dense(model, 1, 5)
    with composed(first, second).applied(model):
        found = model.w_out(1).clone()
    expected = model.w_out(1) + first.matrix(0) + second.matrix(0)
    torch.testing.assert_close(found, expected)


def test_a_history_applied_is_its_last_state(model: ModelHandle) -> None:
    change = made(model)["history of dense"]
    with change.applied(model):
        found = model.w_out(1).clone()
    with change.at(5).applied(model):
        assert torch.equal(model.w_out(1), found)
    with change.at(1).applied(model):
        assert not torch.equal(model.w_out(1), found)
    assert change.checkpoints == (1, 2, 5)


@dataclass(frozen=True, kw_only=True)
class Noted(Intervention):
    """Writes down when it is applied and undone."""

    kind: ClassVar[str] = "noted"
    name: str
    notes: list[str]
    fails: bool = False

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @contextmanager
    def changing(self, handle: ModelHandle) -> Iterator[None]:
        if self.fails:
            raise RuntimeError(self.name)
        self.notes.append(f"+{self.name}")
        try:
            yield
        finally:
            self.notes.append(f"-{self.name}")


def noted(model: ModelHandle, notes: list[str], fails: str = "") -> Composition:
    """Three that note their names."""
    change = Change("fact", False, 0)
    return composed(
        *(
            Noted(change=change, model=model.fingerprint, name=n, notes=notes, fails=n == fails)
            for n in "abc"
        )
    )


def test_parts_are_applied_in_order_and_undone_in_reverse(gpt2: ModelHandle) -> None:
    notes: list[str] = []
    with noted(gpt2, notes).applied(gpt2):
        assert notes == ["+a", "+b", "+c"]
    assert notes == ["+a", "+b", "+c", "-c", "-b", "-a"]


def test_parts_are_undone_in_reverse_after_an_error(gpt2: ModelHandle) -> None:
    notes: list[str] = []
    with pytest.raises(ValueError, match="inside"), noted(gpt2, notes).applied(gpt2):
        raise ValueError("inside")
    assert notes == ["+a", "+b", "+c", "-c", "-b", "-a"]


def test_a_part_that_cannot_be_applied_undoes_those_before_it(gpt2: ModelHandle) -> None:
    notes: list[str] = []
    with pytest.raises(RuntimeError, match="c"), noted(gpt2, notes, fails="c").applied(gpt2):
        pass
    assert notes == ["+a", "+b", "-b", "-a"]
    assert gpt2.changes == []


def test_changes_nest(model: ModelHandle) -> None:
    before = weights(model)
    changes = made(model)
    with changes["composition"].applied(model):
        during = probabilities(model)
        with changes["history of dense"].applied(model):
            assert not torch.allclose(probabilities(model), during)
        assert torch.equal(probabilities(model), during)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", NAMES)
def test_another_model_is_refused(gpt2: ModelHandle, name: str) -> None:
    other = copy_of(gpt2)
    other.w_out(0)[0, 0] += 1e-6
    change = made(gpt2)[name]
    with pytest.raises(RequestError, match="expected the model with fingerprint"):
        change.check_model(other)
    with pytest.raises(RequestError, match="load that"), change.applied(other):
        pass


# -- sums ------------------------------------------------------------------------------------------


def test_sums_are_sums(model: ModelHandle) -> None:
    pairs = (
        (low(model, 1), low(model, 1, 5)),
        (dense(model, 1), dense(model, 1, 5)),
        (composed(low(model, 0), dense(model, 1)), composed(low(model, 0, 5), dense(model, 1, 7))),
    )
    for one, other in pairs:
        with one.plus(other).applied(model):
            found = [model.w_out(layer).clone() for layer in (0, 1)]
        with one.applied(model), other.applied(model):
            for layer, weight in enumerate(found):
                torch.testing.assert_close(weight, model.w_out(layer), rtol=1e-4, atol=1e-2)


def test_what_does_not_add_up_is_an_error(gpt2: ModelHandle) -> None:
    one, two = low(gpt2, 0), low(gpt2, 1)
    pairs = (
        (one, two),
        (one, dense(gpt2, 0)),
        (dense(gpt2, 0), dense(gpt2, 1)),
        (composed(one), composed(one, two)),
        (composed(one), one),
        (history(one), history(one)),
    )
    for left, right in pairs:
        with pytest.raises(TypeError, match="cannot be added to"):
            left.plus(right)


# -- saved -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_comes_back_bit_for_bit(
    model: ModelHandle, name: str, tmp_path: Path
) -> None:
    saved = made(model)[name]
    failed = {"a fact": "why not"}
    saved = replace(saved, change=replace(saved.change, failed=failed))
    saved.save(tmp_path)
    loaded = load(tmp_path, KINDS)
    assert type(loaded) is type(saved)
    assert loaded.change == saved.change
    assert loaded.checkpoints == saved.checkpoints
    assert loaded.digest == saved.digest
    with saved.applied(model):
        expected = probabilities(model)
    with loaded.applied(model):
        assert torch.equal(probabilities(model), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_a_kind_that_may_not_stand_there_is_refused(
    gpt2: ModelHandle, name: str, tmp_path: Path
) -> None:
    made(gpt2)[name].save(tmp_path)
    with pytest.raises(RequestError, match=r"expected a saved intervention .* found KeyError"):
        load(tmp_path, [Composition, History])


# -- what the model carries ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_digest_tells_every_tensor(gpt2: ModelHandle, name: str) -> None:
    first, again, other = (made(gpt2)[name] for _ in range(3))
    assert first.digest == again.digest
    digests = {first.digest}
    for n, tensor_name in enumerate(other.tensors(), 1):
        changed = made(gpt2)[name]
        changed.tensors()[tensor_name].view(-1)[-1] += 1
        digests.add(changed.digest)
        assert len(digests) == n + 1
    assert replace(first, change=replace(first.change, layer=3)).digest not in digests


def test_a_history_has_another_digest_with_other_steps(gpt2: ModelHandle) -> None:
    first = history(low(gpt2, 1), low(gpt2, 1, 7))
    assert replace(first, steps=(1, 3)).digest != first.digest


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_another_state_while_it_is_changed(gpt2: ModelHandle, name: str) -> None:
    change, other = made(gpt2)[name], low(gpt2, 0, 99)
    plain = gpt2.state
    assert plain == gpt2.fingerprint
    with change.applied(gpt2):
        once = gpt2.state
        with other.applied(gpt2):
            twice = gpt2.state
        assert gpt2.state == once
    with other.applied(gpt2), change.applied(gpt2):
        swapped = gpt2.state
    assert gpt2.state == plain
    assert len({plain, once, twice, swapped}) == 4


def test_values_of_a_changed_model_are_not_taken_for_the_unchanged_ones(
    gpt2: ModelHandle, empty_cache: Path
) -> None:
    """Whatever was searched first, and although both are kept."""
    search, site = ValueSearch(steps=3), Site(1, "mlp")
    change = made(gpt2)["history"]

    def found() -> Tensor:
        values = search.find(gpt2, TARGETS[:2], site, ())
        fresh = search.optimise(gpt2, TARGETS[:2], site, ())
        torch.testing.assert_close(values.delta, fresh["delta"])
        torch.testing.assert_close(values.start, fresh["start"])
        return values.start

    plain = found()
    with change.applied(gpt2):
        last = found()
    with change.at(1).applied(gpt2):
        first = found()
    assert torch.equal(found(), plain)
    with change.applied(gpt2):
        assert torch.equal(found(), last)
    assert len(list(empty_cache.rglob("*.safetensors"))) == 3
    assert not torch.allclose(plain, last)
    assert not torch.allclose(first, last)
