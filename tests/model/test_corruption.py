"""Noise on subjects: where it lands, whose it is, and that it goes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from palimpsest.facts.fact import Prompt
from palimpsest.model.corruption import corrupted, draw, spread
from palimpsest.model.forward import features, forward, greedy, next_token_logprobs
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import EMBEDDING, Site
from palimpsest.model.tokens import NOBODY, Tokens, collate

SUBJECTS = ("New Zealand", "Osaka", "Kathmandu")
TEMPLATES = ("{} is in", "The city of {} is in the country", "Anna said that {}")


def rows(handle: ModelHandle, template: str = TEMPLATES[1]) -> list[Tokens]:
    """A prompt about each subject, its owner the subject's number."""
    prompts = (Prompt.fill("fit", template, subject) for subject in SUBJECTS)
    return [handle.encode(prompt, owner=owner) for owner, prompt in enumerate(prompts)]


@contextmanager
def embedded(handle: ModelHandle) -> Iterator[list[Tensor]]:
    """What the embeddings give, noise included, in the passes run inside."""
    seen: list[Tensor] = []
    with handle.hooked([(handle.model.get_input_embeddings(), lambda e: seen.append(e.clone()))]):
        yield seen


def shift(handle: ModelHandle, some: list[Tokens], noise: Tensor) -> Tensor:
    """What noise adds to the embeddings of a batch, `[n, t, d]`."""
    batch = collate(some, handle.device)
    with torch.no_grad():
        with embedded(handle) as plain:
            forward(handle, batch)
        with corrupted(handle, noise), embedded(handle) as noisy:
            forward(handle, batch)
    return noisy[0] - plain[0]


def inside(row: Tokens) -> tuple[int, int]:
    """The subject's first token, and one past its last."""
    assert row.subject is not None
    return row.subject[0], row.subject[1] + 1


@pytest.mark.parametrize("template", TEMPLATES)
def test_noise_lands_on_the_subjects_tokens_alone(handle: ModelHandle, template: str) -> None:
    some = rows(handle, template)
    noise = draw(handle, some, 5.0, 0)
    added = shift(handle, some, noise)
    for owner, row in enumerate(some):
        first, end = inside(row)
        expected = torch.zeros_like(added[owner])
        expected[first:end] = noise[owner, -(end - first) :]
        torch.testing.assert_close(added[owner], expected, rtol=1e-4, atol=1e-4)
        assert added[owner, first:end].abs().amax(1).min() > 1
    assert len({end - first for first, end in map(inside, some)}) > 1


def test_a_subject_has_the_same_noise_in_every_prompt(handle: ModelHandle) -> None:
    found = []
    for template in TEMPLATES[1:]:
        some = rows(handle, template)
        added = shift(handle, some, draw(handle, some, 5.0, 0))
        found.append([added[i, slice(*inside(row))] for i, row in enumerate(some)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_prompts_of_one_owner_share_its_noise(handle: ModelHandle) -> None:
    """Drawn from one of its prompts, felt in all."""
    noise = draw(handle, rows(handle), 5.0, 0)
    some = rows(handle, TEMPLATES[2])
    added = shift(handle, some[::-1], noise)[torch.tensor([2, 1, 0])]
    for owner, row in enumerate(some):
        first, end = inside(row)
        expected = noise[owner, -(end - first) :]
        torch.testing.assert_close(added[owner, first:end], expected, rtol=1e-4, atol=1e-4)


def test_noise_does_not_depend_on_the_company(handle: ModelHandle) -> None:
    some = rows(handle)
    together = draw(handle, some, 5.0, 0)
    for owner, row in enumerate(some):
        first, end = inside(row)
        alone = draw(handle, [row], 5.0, 0)
        assert alone.shape[1] == end - first
        assert torch.equal(together[owner, -(end - first) :], alone[0])
        assert not together[owner, : -(end - first)].any()
    assert torch.equal(draw(handle, some[::-1], 5.0, 0), together.flip(0))


def test_predictions_do_not_depend_on_the_company(handle: ModelHandle) -> None:
    some = rows(handle)
    noise = draw(handle, some, 5.0, 0)
    with corrupted(handle, noise):
        together = next_token_logprobs(handle, some)
        for owner, row in enumerate(some):
            alone = next_token_logprobs(handle, [row])[0]
            torch.testing.assert_close(alone, together[owner], rtol=1e-4, atol=1e-4)


def test_subjects_and_seeds_differ(handle: ModelHandle) -> None:
    some = rows(handle)
    noise = draw(handle, some, 5.0, 0)
    assert torch.equal(noise, draw(handle, some, 5.0, 0))
    assert not torch.allclose(noise, draw(handle, some, 5.0, 1))
    last = torch.nn.functional.normalize(noise[:, -1], dim=1)
    assert ((last @ last.T).fill_diagonal_(0).abs() < 0.9).all()
    torch.testing.assert_close(draw(handle, some, 10.0, 0), 2 * noise)


def test_the_scale_is_the_standard_deviation(handle: ModelHandle) -> None:
    ids = torch.randint(1, 300, (200, 5), generator=torch.Generator().manual_seed(0)).tolist()
    some = [Tokens(tuple(row), 5, (0, 4)) for row in ids]
    noise = draw(handle, some, 3.0, 0)
    assert float(noise.std()) == pytest.approx(3.0, rel=0.02)  # 32,000 numbers
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.1)


def test_the_spread_is_that_of_the_input_embeddings(handle: ModelHandle) -> None:
    table = handle.model.get_input_embeddings().weight
    deviation = (table - table.mean()).square().sum() / (table.numel() - 1)
    assert spread(handle) == pytest.approx(float(deviation.sqrt()))


@pytest.mark.parametrize("kind", ["nobody's", "without a subject"])
def test_other_rows_are_left_alone(handle: ModelHandle, kind: str) -> None:
    some = rows(handle)
    noise = draw(handle, some, 5.0, 0)
    other = some[0]
    if kind == "nobody's":
        other = Tokens(other.ids, other.prompt, other.subject, NOBODY)
    else:
        other = Tokens(other.ids, other.prompt, None, 0)
    added = shift(handle, [some[1], other], noise)
    assert not added[1].any()
    assert added[0].any()
    with corrupted(handle, noise):
        found = next_token_logprobs(handle, [some[1], other])[1]
    torch.testing.assert_close(found, next_token_logprobs(handle, [some[1], other])[1])


def test_noise_holds_while_a_text_grows(handle: ModelHandle) -> None:
    """Greedy continuations read the noise at every step."""
    some = rows(handle)
    noise = draw(handle, some, 20.0, 0)
    with corrupted(handle, noise):
        said = greedy(handle, some, 3)
        for row, ids in zip(some, said, strict=True):
            for length in range(3):
                grown = Tokens((*row.ids, *ids[:length]), row.prompt, row.subject, row.owner)
                assert int(next_token_logprobs(handle, [grown])[0].argmax()) == ids[length]
    assert greedy(handle, some, 3) != said


def test_noise_reaches_the_first_block(handle: ModelHandle) -> None:
    some = rows(handle)
    noise = draw(handle, some, 5.0, 0)
    before = features(handle, some, [Site(EMBEDDING)], ["last_subject"])[0, 0]
    with corrupted(handle, noise):
        after = features(handle, some, [Site(EMBEDDING)], ["last_subject"])[0, 0]
    torch.testing.assert_close(after - before, noise[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_noise_goes(handle: ModelHandle, error: type[BaseException] | None) -> None:
    some = rows(handle)
    before = next_token_logprobs(handle, some)
    noise = draw(handle, some, 5.0, 0)

    def ask() -> None:
        with corrupted(handle, noise):
            assert not torch.allclose(next_token_logprobs(handle, some), before)
            if error is not None:
                raise error

    if error is None:
        ask()
    else:
        with pytest.raises(error):
            ask()
    assert torch.equal(next_token_logprobs(handle, some), before)
    assert not handle.model.get_input_embeddings()._forward_hooks


def test_a_prompt_without_a_subject_has_no_noise(handle: ModelHandle) -> None:
    row = handle.encode(Prompt("text", "The city"))
    with pytest.raises(ValueError, match="holds no subject"):
        draw(handle, [row], 5.0, 0)


def test_a_bare_pass_under_noise_is_an_error(handle: ModelHandle) -> None:
    some = rows(handle)
    noise = draw(handle, some, 5.0, 0)
    with corrupted(handle, noise), pytest.raises(RuntimeError, match=r"use model\.forward"):
        handle.model(torch.tensor([some[0].ids]))
