from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from palimpsest.model import forward as module
from palimpsest.model.forward import (
    Score,
    capturing,
    features,
    forward,
    greedy,
    keys,
    logit_lens,
    logits,
    next_token_logprobs,
    run_to,
    score,
    token_ranks,
)
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import EMBEDDING, Position, Site
from palimpsest.model.tokens import NOBODY, Tokens, collate
from tests.model.tiny import make_handle, ragged, relative

BOTH: tuple[Position, ...] = ("last_subject", "last_prompt")


def alone(row: Tokens) -> Tensor:
    """One row as transformers takes it, no padding."""
    return torch.tensor([row.ids])


# -- states ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_residual_features_are_transformers_own_hidden_states(handle: ModelHandle) -> None:
    rows = ragged()
    sites = [Site(layer) for layer in (EMBEDDING, 0, 1, 2, 3)]
    found = features(handle, rows, sites, BOTH)
    assert found.shape == (5, 2, len(rows), 32)
    assert found.dtype == torch.float32
    for n, row in enumerate(rows):
        hidden = handle.model(alone(row), output_hidden_states=True).hidden_states
        for p, position in enumerate(BOTH):
            wanted = [state[0, row.at(position)] for state in hidden]
            mine = [*found[:4, p, n], handle.final_norm(found[4, p, n])]  # theirs is normed
            assert max(relative(a, b) for a, b in zip(mine, wanted, strict=True)) < 1e-5


@pytest.mark.parametrize("part", ["mlp", "attention"])
@torch.no_grad()
def test_inner_features_are_what_plain_hooks_see(handle: ModelHandle, part: str) -> None:
    rows = ragged()
    names = {("gpt2", "mlp"): "mlp", ("gpt2", "attention"): "attn"}
    name = names.get((handle.model.config.model_type, part))
    name = name or {"mlp": "mlp", "attention": "self_attn"}[part]
    found = features(handle, rows, [Site(2, part), Site(1, part)], ("last_subject",))  # type: ignore[arg-type]
    seen: dict[int, Tensor] = {}
    for layer in (1, 2):
        whole = handle.blocks[layer].get_submodule(name)  # the MLP ends with W_out (and dropout)
        whole.register_forward_hook(
            lambda _, args, output, at=layer: seen.__setitem__(
                at, output if isinstance(output, Tensor) else output[0]
            )
        )
    for n, row in enumerate(rows):
        handle.model(alone(row))
        for s, layer in enumerate((2, 1)):
            assert relative(found[s, 0, n], seen[layer][0, row.at("last_subject")]) < 1e-5


@torch.no_grad()
def test_the_embedding_is_what_enters_the_first_block(handle: ModelHandle) -> None:
    rows = ragged()
    found = features(handle, rows, [Site(EMBEDDING)], ("last_prompt",))[0, 0]
    for n, row in enumerate(rows):
        at = row.at("last_prompt")
        wanted = handle.model.get_input_embeddings()(torch.tensor(row.ids[at]))
        if handle.model.config.model_type == "gpt2":
            wanted = wanted + handle.model.transformer.wpe.weight[at]
        torch.testing.assert_close(found[n], wanted)


def test_features_of_a_row_without_a_subject_are_refused(llama: ModelHandle) -> None:
    with pytest.raises(ValueError, match="no subject"):
        features(llama, [Tokens((1, 2), 2)], [Site(0)], ("last_subject",))


def calls(handle: ModelHandle) -> list[int]:
    """Counts, from now on, how often each block is called."""
    counts = [0] * handle.n_layers

    def count(at: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            counts[at] += 1

        return hook

    for layer, block in enumerate(handle.blocks):
        block.register_forward_pre_hook(count(layer))
    return counts


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_run_to_stops_after_its_layer(handle: ModelHandle, layer: int) -> None:
    counts = calls(handle)
    run_to(handle, collate(ragged(), handle.device), layer)
    assert counts == [int(at <= layer) for at in range(4)]
    assert handle.running is None
    assert all(not block._forward_hooks for block in handle.blocks)


def test_features_run_no_layer_above_the_highest_site(handle: ModelHandle) -> None:
    counts = calls(handle)
    features(handle, ragged()[:4], [Site(1, "mlp"), Site(EMBEDDING)], ("last_prompt",))
    assert counts == [1, 1, 0, 0]


def test_an_error_in_a_hook_is_not_taken_for_the_stop(llama: ModelHandle) -> None:
    def fail(_: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), llama.hooked([(llama.blocks[1], fail)]):
        run_to(llama, collate(ragged(), llama.device), 2)
    assert llama.running is None


@torch.no_grad()
def test_capturing_sees_a_change_made_outside_it(llama: ModelHandle) -> None:
    batch = collate(ragged(), llama.device)
    block = llama.blocks[1]
    with capturing(llama, [Site(1)]) as plain:
        forward(llama, batch)
    with llama.hooked([(block, lambda x: x + 1)]), capturing(llama, [Site(1)]) as changed:
        forward(llama, batch)
    torch.testing.assert_close(changed[Site(1)], plain[Site(1)] + 1)


@torch.no_grad()
def test_keys_and_values_are_those_of_w_out(handle: ModelHandle) -> None:
    rows = ragged()
    found, values = keys(handle, rows, 2)
    w_out = handle.module(Site(2, "mlp"))
    seen: list[Tensor] = []
    w_out.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
    for n, row in enumerate(rows):
        seen.clear()
        handle.model(alone(row))
        at = row.at("last_subject")
        assert relative(found[n], seen[0][0, at]) < 1e-5
        assert relative(values[n], seen[1][0, at]) < 1e-5


@torch.no_grad()
def test_hooks_find_the_batch_and_nested_passes_give_it_back(llama: ModelHandle) -> None:
    outer, inner = (collate(rows, llama.device) for rows in (ragged()[:2], ragged()[2:]))
    seen: list[object] = []

    def nested(_: Tensor) -> None:
        if llama.running is outer:
            forward(llama, inner)
        seen.append(llama.running)

    with llama.hooked([(llama.blocks[0], nested)]):
        forward(llama, outer)
    assert [found is wanted for found, wanted in zip(seen, [inner, outer], strict=True)] == [1, 1]
    assert llama.running is None


def test_forward_is_the_state_before_the_head(handle: ModelHandle) -> None:
    row = ragged()[2]
    with torch.no_grad():
        states = forward(handle, collate([row], handle.device))
        assert relative(logits(handle, states), handle.model(alone(row)).logits) < 1e-5


def test_logits_follow_the_soft_cap(llama: ModelHandle) -> None:
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 3
    raw = logits(llama, states)
    llama.model.config.final_logit_softcapping = 5.0
    capped = logits(llama, states)
    torch.testing.assert_close(capped, 5 * torch.tanh(raw / 5))
    assert float(raw.abs().max()) > 5 > float(capped.abs().max())


# -- scores ----------------------------------------------------------------------------------------

Change = Callable[[Tokens], tuple[int, Tensor] | None]
"""For a row, where something is added to the first block's output, and what."""


@torch.no_grad()
def plain_score(handle: ModelHandle, row: Tokens, change: Change = lambda _: None) -> Score:
    """One row alone through transformers, log_softmax token by token."""
    added = change(row)

    def add(block: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        output = output.clone()
        if added is not None:
            output[0, added[0]] += added[1]
        return output

    remove = handle.blocks[0].register_forward_hook(add)
    raw = handle.model(alone(row)).logits[0]
    remove.remove()
    total, argmax = 0.0, True
    for at in range(row.prompt, len(row.ids)):
        logprobs = raw[at - 1].double().log_softmax(-1)
        total += float(logprobs[row.ids[at]])
        argmax = argmax and int(logprobs.argmax()) == row.ids[at]
    return Score(total, len(row.ids) - row.prompt, argmax)


def assert_same(found: Sequence[Score], wanted: Sequence[Score]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.logprob == pytest.approx(other.logprob, rel=1e-5)
        assert (one.tokens, one.argmax) == (other.tokens, other.argmax)


def rows_to_score(handle: ModelHandle) -> list[Tokens]:
    """Several tokens, shared prompts, prefixes of each other, twice the same, other owners."""
    prompts = [row.ids for row in ragged()]
    rows = []
    for ids in prompts:
        prompt = len(ids)
        best = greedy(handle, [Tokens(ids, prompt)], 3)[0]
        for completion in (best, best[:1], best[:2], (*best[:2], 9), (9,), (9, 8, 7, 6), (9,)):
            rows.append(Tokens((*ids, *completion), prompt, (1, 1), 0))
    rows += [Tokens(row.ids, row.prompt, row.subject, owner) for row in rows[:9] for owner in (1,)]
    rows += [Tokens(row.ids, row.prompt - 1, row.subject, 0) for row in rows[:5]]
    rows += [Tokens(row.ids, row.prompt, (0, 0), NOBODY) for row in rows[:5]]
    return rows


@pytest.mark.parametrize("reads", [5, 256])
def test_score_is_log_softmax_one_row_at_a_time(
    handle: ModelHandle, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_READS_AT_ONCE", reads)
    rows = rows_to_score(handle)
    found = score(handle, rows)
    assert_same(found, [plain_score(handle, row) for row in rows])
    assert {one.argmax for one in found} == {True, False}
    assert {one.tokens for one in found} >= {1, 2, 3, 4}


def test_argmax_wants_every_token(llama: ModelHandle) -> None:
    prompt = ragged()[0].ids
    best = greedy(llama, [Tokens(prompt, 9)], 3)[0]
    for wrong in range(3):
        ids = list(best)
        ids[wrong] = (ids[wrong] + 1) % 300
        right, other = score(llama, [Tokens((*prompt, *best), 9), Tokens((*prompt, *ids), 9)])
        assert right.argmax
        assert not other.argmax


@pytest.mark.parametrize("where", ["subject", "prompt"])
def test_rows_share_a_pass_only_if_a_change_acts_on_them_alike(
    handle: ModelHandle, where: str
) -> None:
    added = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)) * 5
    rows = rows_to_score(handle)

    def change(row: Tokens) -> tuple[int, Tensor] | None:
        at = row.at("last_subject" if where == "subject" else "last_prompt")
        return None if row.owner == NOBODY else (at, added[row.owner])

    def hook(states: Tensor) -> Tensor:
        batch = handle.running
        assert batch is not None
        at = batch.selects("last_subject" if where == "subject" else "last_prompt")
        mine = (batch.owner != NOBODY)[:, None] & at
        return states + mine[..., None] * added[batch.owner][:, None]

    with handle.hooked([(handle.blocks[0], hook)]):
        found = score(handle, rows)
    assert_same(found, [plain_score(handle, row, change) for row in rows])
    unchanged = score(handle, rows)
    moved = [abs(a.logprob - b.logprob) > 0.01 for a, b in zip(found, unchanged, strict=True)]
    assert moved.count(True) > len(rows) / 2


def test_a_completion_that_begins_another_costs_no_pass_of_its_own(llama: ModelHandle) -> None:
    prompt = ragged()[0].ids
    ends = [(5,), (6,), (5, 6), (5, 6, 7), (5, 6, 8)]
    rows = [Tokens((*prompt, *end), len(prompt), (1, 1), 0) for end in ends]
    widths: list[int] = []
    with llama.hooked([(llama.blocks[0], lambda x: widths.append(len(x)))]):  # type: ignore[list-item]
        score(llama, rows)
    assert widths == [1]


def test_mean_logprob_is_per_token() -> None:
    assert Score(-6.0, 3, False).mean_logprob == -2.0


def test_no_rows_have_no_scores(llama: ModelHandle) -> None:
    assert score(llama, []) == []


# -- batches and continuations ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_batch_size_does_not_matter(kind: str) -> None:
    rows = ragged()
    scored = rows_to_score(make_handle(kind))

    def everything(size: int) -> list[Tensor]:
        handle = make_handle(kind, batch_size=size)
        sites = [Site(EMBEDDING), Site(1, "attention"), Site(3)]
        return [
            features(handle, rows, sites, BOTH),
            *keys(handle, rows, 3),
            next_token_logprobs(handle, rows),
            torch.tensor([one.logprob for one in score(handle, scored)]),
        ]

    one, three, many = (everything(size) for size in (1, 3, 64))
    for a, b, c in zip(one, three, many, strict=True):
        assert relative(b, a) < 1e-5
        assert relative(c, a) < 1e-5


@torch.no_grad()
def test_next_token_logprobs_are_those_after_each_row(handle: ModelHandle) -> None:
    rows = ragged()
    found = next_token_logprobs(handle, rows)
    for n, row in enumerate(rows):
        wanted = handle.model(alone(row)).logits[0, -1].log_softmax(-1)
        assert relative(found[n], wanted) < 1e-5


def test_greedy_is_transformers_generate(handle: ModelHandle) -> None:
    rows = ragged()
    handle.model.generation_config.eos_token_id = None
    handle.model.generation_config.pad_token_id = 0
    for row, said in zip(rows, greedy(handle, rows, 6), strict=True):
        whole = handle.model.generate(
            alone(row),
            attention_mask=torch.ones_like(alone(row)),
            max_new_tokens=6,
            do_sample=False,
        )
        assert said == tuple(whole[0, len(row.ids) :].tolist())


def test_greedy_goes_on_under_the_hooks_and_keeps_owners(llama: ModelHandle) -> None:
    rows = [Tokens(row.ids, row.prompt, row.subject, n) for n, row in enumerate(ragged())]
    owners: list[Tensor] = []

    def silence(states: Tensor) -> Tensor:
        assert llama.running is not None
        owners.append(llama.running.owner)
        return torch.zeros_like(states)  # the state is then the same after every text

    with llama.hooked([(llama.blocks[3], silence)]):
        said = greedy(llama, rows, 3)
    assert len(set(said)) == 1
    assert sorted(torch.cat(owners).tolist()) == sorted([*range(7)] * 3)
    assert len(set(greedy(llama, rows, 3))) > 1


def test_the_lens_reads_the_last_layer_as_the_model_does(handle: ModelHandle) -> None:
    rows = ragged()
    states = features(handle, rows, [Site(handle.n_layers - 1)], ["last_prompt"])[0, 0]
    ends = [Tokens(row.ids[: row.prompt], row.prompt, row.subject) for row in rows]
    wanted = next_token_logprobs(handle, ends)
    with torch.no_grad():
        found = logit_lens(handle, states.double()).log_softmax(-1)
    assert relative(found, wanted) < 1e-5


def test_a_token_s_rank_counts_the_larger_scores() -> None:
    scores = torch.tensor([[0.5, 2.0, 2.0, -1.0], [3.0, 1.0, 0.0, 4.0]])
    tokens = torch.tensor([[0, 1], [3, 2]])
    assert token_ranks(scores, tokens).tolist() == [[3, 1], [1, 4]]
