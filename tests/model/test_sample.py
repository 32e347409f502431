import pytest
import torch
from torch import Tensor, nn

from palimpsest.model import sample as module
from palimpsest.model.handle import ModelHandle
from palimpsest.model.sample import sample, start_ids
from tests.model.tiny import make_handle, relative


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_seed_decides(handle: ModelHandle) -> None:
    one, again, other = (sample(handle, 6, 8, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) > 1


def test_no_global_randomness_is_used(llama: ModelHandle) -> None:
    before = torch.get_rng_state()
    sample(llama, 3, 5, seeded(0), top_k=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_goes_on_from_call_to_call(llama: ModelHandle) -> None:
    generator = seeded(0)
    assert not torch.equal(sample(llama, 3, 5, generator), sample(llama, 3, 5, generator))


def test_texts_open_with_the_prefix_and_have_the_length_asked_for() -> None:
    handle = make_handle(prefix="The city\n")
    ids = sample(handle, 3, 7, seeded(0))
    start = handle.tokenizer("The city\n")["input_ids"]
    assert ids.shape == (3, len(start) + 7)
    assert ids[:, : len(start)].tolist() == [start] * 3


@torch.no_grad()
def test_top_k_draws_among_the_k_likeliest(handle: ModelHandle) -> None:
    ids = sample(handle, 16, 10, seeded(0), top_k=3)
    places = handle.model(ids).logits[:, :-1].argsort(-1, descending=True)
    ranks = (places == ids[:, 1:, None]).int().argmax(-1)
    assert sorted(set(ranks.flatten().tolist())) == [0, 1, 2]
    free = sample(handle, 16, 10, seeded(0))
    places = handle.model(free).logits[:, :-1].argsort(-1, descending=True)
    assert int((places == free[:, 1:, None]).int().argmax(-1).max()) > 10


def flat(probabilities: dict[int, float]) -> ModelHandle:
    """A model that says the same after every text: these tokens with these probabilities."""
    handle = make_handle("llama")
    head = nn.Linear(32, handle.model.config.vocab_size).requires_grad_(False)
    head.weight.zero_()
    head.bias.fill_(-1e9)
    for token, probability in probabilities.items():
        head.bias[token] = torch.tensor(probability).log()
    handle.model.set_output_embeddings(head)
    return handle


def test_tokens_come_as_often_as_they_are_likely() -> None:
    probabilities = {7: 0.5, 8: 0.3, 200: 0.15, 0: 0.05}
    ids = sample(flat(probabilities), 1000, 4, seeded(0))[:, 1:]
    assert set(ids.flatten().tolist()) == set(probabilities)
    for token, probability in probabilities.items():
        spread = (probability * (1 - probability) / ids.numel()) ** 0.5
        assert abs(float((ids == token).float().mean()) - probability) < 4 * spread


def test_top_k_keeps_the_proportions() -> None:
    ids = sample(flat({7: 0.5, 8: 0.25, 200: 0.15, 0: 0.1}), 1000, 4, seeded(0), top_k=2)[:, 1:]
    assert set(ids.flatten().tolist()) == {7, 8}
    assert abs(float((ids == 7).float().mean()) - 2 / 3) < 0.03


@pytest.mark.parametrize("prefix", ["", "\n", "The city of Paris"])
@torch.no_grad()
def test_every_step_has_the_logits_of_a_full_pass(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("gpt2", "llama"):
        handle = make_handle(kind, prefix=prefix)
        read: list[Tensor] = []

        def keep(handle: ModelHandle, states: Tensor, read: list[Tensor] = read) -> Tensor:
            read.append(handle.model.get_output_embeddings()(states))
            return read[-1]

        monkeypatch.setattr(module, "logits", keep)
        ids = sample(handle, 4, 6, seeded(5))
        start = len(start_ids(handle))
        full = handle.model(ids).logits[:, start - 1 : -1]
        assert relative(torch.stack(read, 1), full) < 1e-5


def test_without_a_prefix_a_text_opens_with_the_first_special_token() -> None:
    handle = make_handle(prefix="")
    assert start_ids(handle) == [0]  # the end token, the only special one
    handle.tokenizer = type("Fake", (), {"bos_token_id": 5, "eos_token_id": 6})()
    assert start_ids(handle) == [5]
    handle.tokenizer = type("Fake", (), {"bos_token_id": None, "eos_token_id": 6})()
    assert start_ids(handle) == [6]
    handle.tokenizer = type("Fake", (), {"bos_token_id": None, "eos_token_id": None})()
    assert start_ids(handle) == [0]
