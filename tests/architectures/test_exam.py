"""One exam, every row of the architecture table."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from palimpsest.errors import RequestError
from palimpsest.model.architecture import TABLE
from palimpsest.model.borrowing import borrowed
from palimpsest.model.forward import (
    capturing,
    features,
    forward,
    greedy,
    keys,
    logits,
    next_token_logprobs,
)
from palimpsest.model.handle import ModelHandle
from palimpsest.model.partial import Resume
from palimpsest.model.sample import sample
from palimpsest.model.site import EMBEDDING, NORMS, Part, Policy, Site
from palimpsest.model.tokens import NOBODY, Batch, Tokens, collate
from tests.architectures.changes import LAYER, make_deltas, make_eraser, make_folded
from tests.architectures.tiny import (
    D_MLP,
    LAYERS,
    TINY,
    WIDTH,
    close,
    make_handle,
    padded,
    ragged,
    unpadded,
)

PARTS: tuple[Part, ...] = ("residual", "mlp", "attention")
SQUARE = [name for name, tiny in TINY.items() if tiny.d_mlp is not None]
NORMED = [(name, part) for name, tiny in TINY.items() if tiny.norms for part in NORMS]
SITES = [(name, part) for name in TINY for part in PARTS] + NORMED
ADDING = [name for name, tiny in TINY.items() if tiny.adds]


def test_every_row_of_the_table_is_examined() -> None:
    assert {tiny.model_type for tiny in TINY.values()} == set(TABLE)


# -- parts -----------------------------------------------------------------------------------------


def test_its_parts_are_found(name: str, handle: ModelHandle) -> None:
    assert handle.n_layers == LAYERS
    assert handle.width == WIDTH
    wide = 4 * WIDTH if name == "bloom" else D_MLP
    assert [handle.w_out(layer).shape for layer in range(LAYERS)] == [(WIDTH, wide)] * LAYERS


def test_what_writes_to_the_stream_is_found(handle: ModelHandle) -> None:
    """Without both of a block's output matrices it adds nothing, but for biases."""
    every = {weight.data_ptr() for weight in handle.matrices()}
    found, sites = handle.writers(LAYER), [Site(LAYER, "mlp"), Site(LAYER, "attention")]
    with torch.no_grad(), borrowed(handle, found, "exam"), capturing(handle, sites) as states:
        for weight in found:
            assert weight.dim() == 2
            assert weight.data_ptr() in every
            weight.zero_()
        forward(handle, collate(ragged(), handle.device))
    for state in states.values():
        assert torch.allclose(state[0], state[0, :1].expand_as(state[0]), atol=1e-5)


def test_w_out_takes_keys_to_values(handle: ModelHandle) -> None:
    check_keys_and_values(handle)


@pytest.mark.parametrize("name", SQUARE)
def test_a_square_w_out_takes_keys_to_values(name: str) -> None:
    handle = make_handle(name, **{str(TINY[name].d_mlp): WIDTH})
    assert handle.w_out(LAYER).shape == (WIDTH, WIDTH)
    check_keys_and_values(handle)


def check_keys_and_values(handle: ModelHandle) -> None:
    found, values = keys(handle, ragged(), LAYER)
    bias = getattr(handle.module(Site(LAYER, "mlp")), "bias", None)
    wanted = found @ handle.w_out(LAYER).T + (0 if bias is None else bias)
    assert close(values, wanted)
    assert not close(values, values.mean(0))


@pytest.mark.parametrize("name", ADDING)
@torch.no_grad()
def test_a_block_adds_what_attention_and_mlp_give(name: str, batch: Batch) -> None:
    handle = make_handle(name)
    after = TINY[name].after_w_out
    sites = [Site(LAYER - 1), *(Site(LAYER, part) for part in PARTS)]
    with capturing(handle, sites) as states:
        forward(handle, batch)
    before, block, mlp, attention = (states[site] for site in sites)
    if after is not None:
        mlp = handle.blocks[LAYER].get_submodule(after)(mlp)
    assert close(block, before + attention + mlp)
    assert not close(block, before + mlp, 0.1)
    assert not close(block, before + attention, 0.1)


@torch.no_grad()
def test_states_and_logits_are_those_of_transformers(handle: ModelHandle) -> None:
    rows = ragged()
    sites = [Site(layer) for layer in range(EMBEDDING, LAYERS)]
    found = features(handle, rows, sites, ("last_subject", "last_prompt"))
    for n, row in enumerate(rows):
        output = handle.model(torch.tensor([row.ids]), output_hidden_states=True)
        for p, place in enumerate((row.at("last_subject"), row.at("last_prompt"))):
            for layer in range(LAYERS):
                assert close(found[layer, p, n], output.hidden_states[layer][0, place])
            last = handle.final_norm(found[LAYERS, p, n])
            assert close(logits(handle, last), output.logits[0, place])


# -- norms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "part"), NORMED)
@torch.no_grad()
def test_readers_take_what_the_norm_gives(name: str, handle: ModelHandle, part: Part) -> None:
    site = Site(LAYER, part)
    both = [Site(LAYER, each) for each in NORMS]
    assert (handle.module(both[0]) is handle.module(both[1])) == TINY[name].shared_norm
    assert (handle.reading(both[0]) == handle.reading(both[1])) == TINY[name].shared_norm
    readings: list[Tensor] = []
    batch = padded(ragged(), "right")
    hooks = [(module, readings.append) for module in handle.reading(site)]
    with capturing(handle, [site]) as states, handle.hooked(hooks):  # type: ignore[arg-type]
        forward(handle, batch)
    assert len(readings) == len(hooks) > 0
    for found, (weight, bias) in zip(readings, handle.readers(site), strict=True):
        assert close(found, states[site] @ weight.T + (0 if bias is None else bias))


@pytest.mark.parametrize(("name", "part"), NORMED)
@torch.no_grad()
def test_its_readers_are_all_that_a_norm_gives_to(
    handle: ModelHandle, part: Part, batch: Batch
) -> None:
    """Erased in their weights is erased by a hook; undone, it is the model bit for bit."""
    eraser = make_eraser(handle, part, "all")
    if any(bias is None for _, bias in handle.readers(Site(LAYER, part))):
        eraser = replace(eraser, bias=torch.zeros_like(eraser.bias))
    before = {name: tensor.clone() for name, tensor in handle.model.state_dict().items()}
    plain = forward(handle, batch)
    with eraser.applied(handle):
        wanted = forward(handle, batch)
    with make_folded(handle, eraser).applied(handle):
        found = forward(handle, batch)
        during = {name: tensor.clone() for name, tensor in handle.model.state_dict().items()}
    assert close(found, wanted)
    assert not close(found, plain, 0.01)
    own = {module: name for name, module in handle.model.named_modules()}
    weights = {f"{own[module]}.weight" for module in handle.reading(Site(LAYER, part))}
    assert {name for name in differing(during, before) if name.endswith("weight")} == weights
    assert differing(handle.model.state_dict(), before) == set()
    assert torch.equal(forward(handle, batch), plain)


@pytest.mark.parametrize("part", NORMS)
@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("opt-350m", "do_layer_norm_before", False),
        ("bloom", "apply_residual_connection_post_layernorm", True),
    ],
)
def test_norms_that_stand_elsewhere_are_refused(
    name: str, option: str, value: bool, part: Part
) -> None:
    handle = make_handle(name, **{option: value})
    told = rf"expected norms .* for a change at {part}, found {option}={value} in {name}'s conf.*"
    for asked in (handle.module, handle.reading, handle.readers):
        with pytest.raises(RequestError, match=told + r"take intervene\.part=residual"):
            asked(Site(LAYER, part))
    handle.module(Site(LAYER, "attention"))


# -- batches ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_padding_reaches_no_token(handle: ModelHandle, batch: Batch) -> None:
    states = unpadded(forward(handle, batch), batch)
    for row, found in zip(ragged(), states, strict=True):
        assert close(found, forward(handle, padded([row], "right"))[0])


def test_generating_with_a_cache_is_generating_without(handle: ModelHandle) -> None:
    said = sample(handle, 2, 12, torch.Generator(), top_k=1)
    first = [Tokens((int(ids[0]),), 1) for ids in said]
    assert [tuple(ids[1:].tolist()) for ids in said] == greedy(handle, first, 12)


@pytest.mark.parametrize("policy", ["last_subject", "last_prompt", "all_but_sink"])
def test_a_continuation_with_a_cache_is_one_without(handle: ModelHandle, policy: Policy) -> None:
    rows = [Tokens(row.ids, row.prompt, row.subject, n) for n, row in enumerate(ragged())]
    deltas = make_deltas(handle, len(rows), independent=True)
    eraser = make_eraser(handle, "residual", policy)
    plain = greedy(handle, rows, 6)
    with deltas.applied(handle), eraser.applied(handle):
        said = greedy(handle, rows, 6)
        for _ in range(6):
            best = next_token_logprobs(handle, rows).argmax(-1).tolist()
            rows = [replace(r, ids=(*r.ids, token)) for r, token in zip(rows, best, strict=True)]
    assert said == [row.ids[-6:] for row in rows]
    assert said != plain


# -- changes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "part"), SITES)
@torch.no_grad()
def test_a_hook_changes_its_site_and_only_what_follows_from_it(
    name: str, handle: ModelHandle, batch: Batch, part: Part
) -> None:
    row, place = 0, 5
    attended = part == "attention_norm" or (part == "mlp_norm" and TINY[name].shared_norm)
    column = place + int(batch.mask[row].argmax())
    shapes: list[tuple[int, ...]] = []

    def change(states: Tensor) -> Tensor:
        shapes.append(tuple(states.shape))
        states = states.clone()
        states[row, column] += torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
        return states

    sites = [Site(layer) for layer in range(EMBEDDING, LAYERS)]
    with capturing(handle, sites) as plain:
        forward(handle, batch)
    changing = handle.hooked([(handle.module(Site(LAYER, part)), change)])
    with changing, capturing(handle, sites) as changed:
        forward(handle, batch)
    assert shapes == [(*batch.ids.shape, WIDTH)]
    for site in sites:
        moved = unpadded((changed[site] - plain[site]).abs().amax(-1) > 1e-5, batch)
        places = moved.pop(row).nonzero()[:, 0].tolist()
        assert not torch.cat(moved).any()
        if site.layer < LAYER:
            assert places == []
        elif site.layer == LAYER and not attended:
            assert places == [place]
        else:
            assert places == list(range(place, 9))


@torch.no_grad()
def test_a_delta_of_its_own_is_a_changed_weight_for_each_row(
    handle: ModelHandle, batch: Batch
) -> None:
    batch.owner[2] = NOBODY
    deltas = make_deltas(handle, len(batch.owner), independent=True)
    with deltas.applied(handle):
        states = unpadded(forward(handle, batch), batch)
    weight = handle.w_out(LAYER)
    saved = weight.clone()
    for row, mine, found in zip(ragged(), batch.owner.tolist(), states, strict=True):
        plain = forward(handle, padded([row], "right"))[0]
        if mine != NOBODY:
            weight.add_(deltas.matrix(mine))
        wanted = forward(handle, padded([row], "right"))[0]
        weight.copy_(saved)
        assert close(found, wanted)
        assert close(found, plain) == (mine == NOBODY)


@torch.no_grad()
def test_a_common_delta_changes_one_weight_and_is_taken_back(
    handle: ModelHandle, batch: Batch
) -> None:
    before = {name: tensor.clone() for name, tensor in handle.model.state_dict().items()}
    deltas = make_deltas(handle, 1, independent=False)
    plain = forward(handle, batch)
    with deltas.applied(handle):
        changed = forward(handle, batch)
        during = {name: tensor.clone() for name, tensor in handle.model.state_dict().items()}
    module = handle.module(Site(LAYER, "mlp"))
    own = next(name for name, each in handle.model.named_modules() if each is module)
    assert differing(during, before) == {f"{own}.weight"}
    assert not close(changed, plain)
    assert differing(handle.model.state_dict(), before) == set()
    assert torch.equal(forward(handle, batch), plain)


def differing(some: dict[str, Tensor], others: dict[str, Tensor]) -> set[str]:
    return {name for name in others if not torch.equal(some[name], others[name])}


@pytest.mark.parametrize(("name", "part"), SITES)
@torch.no_grad()
def test_an_eraser_acts_at_its_site_on_the_tokens_of_its_policy(
    handle: ModelHandle, batch: Batch, part: Part
) -> None:
    site = Site(LAYER, part)
    eraser = make_eraser(handle, part, "all_but_sink")
    with capturing(handle, [site]) as plain:
        forward(handle, batch)
    with eraser.applied(handle), capturing(handle, [site]) as erased:
        forward(handle, batch)
    pairs = zip(unpadded(erased[site], batch), unpadded(plain[site], batch), strict=True)
    for found, states in pairs:
        assert torch.equal(found[:1], states[:1])
        assert close(found[1:], eraser.erase(states[1:]))
        assert not close(found[1:], states[1:], 0.01)


# -- partial passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, LAYER, LAYERS - 1])
@pytest.mark.parametrize("start", ["first", "last_subject", "last"])
def test_a_partial_pass_equals_a_full_one(handle: ModelHandle, layer: int, start: str) -> None:
    rows = ragged()
    whole = padded(rows, "right")
    lengths = whole.mask.sum(1)
    starts = {
        "last_subject": whole.subject_last,
        "first": torch.zeros_like(lengths),
        "last": lengths - 1,
    }[start]
    resume = Resume.capture(handle, whole, layer, starts)
    module = handle.module(Site(layer, "mlp"))
    found_delta, wanted_delta = (torch.ones(len(rows), WIDTH, requires_grad=True) for _ in "ab")

    def at_start(states: Tensor, delta: Tensor, where: Tensor) -> Tensor:
        mine = torch.arange(states.shape[1]) == where.unsqueeze(1)
        return states + mine.unsqueeze(-1) * delta.unsqueeze(1)

    with handle.hooked([(module, lambda s: at_start(s, found_delta, torch.zeros_like(starts)))]):
        found = unpadded(resume.run(handle), resume.batch)
    with handle.hooked([(module, lambda s: at_start(s, wanted_delta, starts))]):
        wanted = unpadded(forward(handle, whole), whole)
    wanted = [states[first:] for states, first in zip(wanted, starts, strict=True)]
    for mine, its in zip(found, wanted, strict=True):
        assert close(mine, its)
    weights = torch.linspace(-1, 1, found[0].shape[1])  # a plain sum would not change: it is normed
    sum(((states @ weights).sum() for states in found), torch.tensor(0.0)).backward()
    sum(((states @ weights).sum() for states in wanted), torch.tensor(0.0)).backward()
    assert close(found_delta.grad, wanted_delta.grad, 1e-3)  # type: ignore[arg-type]
    assert all("forward" not in vars(block) for block in handle.blocks)
