"""Second moments: one pass equals a plain loop; texts are the seed's; the cache is keyed by all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from palimpsest.errors import RequestError
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.moments import (
    GivenMoments,
    Moments,
    add_gram,
    mirrored,
    second_moments,
)
from palimpsest.model.handle import ModelHandle
from palimpsest.model.sample import start_ids
from palimpsest.model.site import Site
from tests.intervene.conftest import CORPUS, TARGETS, copy_of, splits

SMALL = Moments(tokens=150, length=16)
"""Quick to compute; of full rank on the tiny models."""


@contextmanager
def counting(handle: ModelHandle) -> Iterator[list[int]]:
    """Collects the number of rows of each forward pass."""
    passes: list[int] = []
    with handle.hooked([(handle.blocks[0], lambda state: passes.append(len(state)))]):
        yield passes


def w_out(handle: ModelHandle, layer: int) -> nn.Module:
    """The module, by its name."""
    if handle.model.config.model_type == "gpt2":
        return handle.model.transformer.h[layer].mlp.c_proj
    return handle.model.model.layers[layer].mlp.down_proj


def plain_loop(handle: ModelHandle, layer: int, ids: Tensor, first: int) -> Tensor:
    """One row and one token at a time, in float64."""
    total, count = torch.zeros(()), 0
    for row in ids:
        seen: list[Tensor] = []
        hook = w_out(handle, layer).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0][0])
        )
        with torch.no_grad():
            handle.model(row[None], use_cache=False)
        hook.remove()
        for key in seen[0][first:]:
            total = total + torch.outer(key.double(), key.double())
            count += 1
    return total / count


def files(cache: Path, kind: str = "moments") -> list[Path]:
    """What the cache holds."""
    return sorted((cache / kind).glob("*.safetensors"))


# -- the matrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", [False, True])
def test_all_layers_in_one_pass_equal_a_plain_loop(model: ModelHandle, sink: bool) -> None:
    ids = torch.randint(0, 300, (5, 11), generator=torch.Generator().manual_seed(1))
    layers = [0, 1, 3]
    with counting(model) as passes:
        found = second_moments(model, layers, ids, sink)
    assert passes == [2, 2, 1]  # a quarter of the handle's batch of 8
    assert found.keys() == set(layers)
    for layer in layers:
        assert found[layer].dtype == torch.float64
        expected = plain_loop(model, layer, ids, first=0 if sink else 1)
        torch.testing.assert_close(found[layer], expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(found[layer], found[layer].T)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64, 100])
def test_a_symmetric_product_equals_the_whole_one(width: int) -> None:
    rows = torch.randn(50, width, generator=torch.Generator().manual_seed(width)).double()
    total = torch.zeros(width, width, dtype=torch.float64)
    for some in rows.split(20):
        add_gram(total, some)
    torch.testing.assert_close(mirrored(total), rows.T @ rows)


def test_position_0_counts_only_if_it_is_asked_for(gpt2: ModelHandle) -> None:
    ids = torch.randint(0, 300, (4, 6), generator=torch.Generator().manual_seed(1))
    without, with_sink = (second_moments(gpt2, [1], ids, sink)[1] for sink in (False, True))
    only = plain_loop(gpt2, 1, ids[:, :1], first=0)
    torch.testing.assert_close(with_sink * 6, without * 5 + only, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(with_sink, without, rtol=0.01)


def test_the_matrix_is_the_texts(model: ModelHandle, empty_cache: Path) -> None:
    rows = SMALL.rows(model)
    expected = plain_loop(model, 2, rows, first=1)
    torch.testing.assert_close(
        SMALL.several(model, [2])[2].matrix(), expected, rtol=1e-4, atol=1e-6
    )


def test_given_moments_are_taken_as_they_are(gpt2: ModelHandle) -> None:
    given = torch.eye(3)
    assert torch.equal(GivenMoments({2: given}).several(gpt2, [2])[2].matrix(), given.double())


# -- sampled text ----------------------------------------------------------------------------------


def sampled(model: ModelHandle, monkeypatch: pytest.MonkeyPatch, path: Path, **how: int) -> Tensor:
    """The text from a cache of its own."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(path))
    return Moments(**{"tokens": 60, "length": 16, **how}).rows(model)


def test_sampled_text_is_the_seeds(
    model: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sampled(model, monkeypatch, tmp_path / "a", seed=4)
    torch.manual_seed(99)
    assert torch.equal(first, sampled(model, monkeypatch, tmp_path / "b", seed=4))
    assert not torch.equal(first, sampled(model, monkeypatch, tmp_path / "b", seed=5))
    assert len({tuple(row) for row in first.tolist()}) == len(first)


def test_by_default_there_are_ten_tokens_a_dimension(model: ModelHandle) -> None:
    moments = Moments()
    rows = moments.rows(model)
    start = start_ids(model)
    assert rows.shape[1] == moments.length == 128
    assert rows[:, : len(start)].tolist() == [start] * len(rows)
    wanted = 10 * model.w_out(0).shape[1]
    drawn = rows[:, len(start) :].numel()
    assert wanted <= drawn < wanted + 128
    assert rows[:, 1:].numel() >= wanted  # what is counted without position 0


@pytest.mark.parametrize("tokens", [1, 14, 15, 16, 31])
def test_rows_are_rounded_up_to_the_tokens_asked_for(gpt2: ModelHandle, tokens: int) -> None:
    rows = Moments(tokens=tokens, length=16).rows(gpt2)
    assert len(rows) == -(-tokens // 15)


# -- the cache -------------------------------------------------------------------------------------


def test_what_is_kept_needs_no_pass(model: ModelHandle, empty_cache: Path) -> None:
    with counting(model) as passes:
        first = SMALL.several(model, [1])[1].matrix()
        assert passes
        passes.clear()
        assert torch.equal(SMALL.several(model, [1])[1].matrix(), first)
        assert passes == []


def test_further_layers_come_from_the_same_pass(model: ModelHandle, empty_cache: Path) -> None:
    several = Moments(tokens=150, length=16, layers=[0, 3])
    SMALL.rows(model)  # the text is sampled before passes are counted
    with counting(model) as passes:
        middle = several.several(model, [1])[1].matrix()
        assert sum(passes) == len(SMALL.rows(model))
        passes.clear()
        kept = {layer: SMALL.several(model, [layer])[layer].matrix() for layer in (0, 3)}
        assert passes == []
    assert torch.equal(middle, SMALL.several(model, [1])[1].matrix())
    expected = second_moments(model, [3], SMALL.rows(model), False)[3]
    torch.testing.assert_close(kept[3], expected, rtol=1e-12, atol=1e-15)


def test_moments_are_those_of_the_model_that_they_were_asked_of(
    model: ModelHandle, empty_cache: Path
) -> None:
    """However late they are loaded: an editor loads the upper layers' under the lower changes."""
    model = copy_of(model)
    edit = Rome(variant="plain", prefixes=GivenPrefixes([]), protocol="batch")
    change = edit.fit(model, splits(TARGETS), Site(0, "mlp"))
    second = SMALL.several(model, [1])[1]
    wanted = second.matrix()
    with change.applied(model), counting(model) as passes:
        assert torch.equal(second.matrix(), wanted)
        assert not passes
        assert not torch.equal(SMALL.several(model, [1])[1].matrix(), wanted)
        for file in files(empty_cache):
            file.unlink()
        with pytest.raises(RequestError, match="found them gone while they were in use"):
            second.matrix()


def test_what_is_made_of_a_matrix_leaves_the_kept_one(
    model: ModelHandle, empty_cache: Path
) -> None:
    second = SMALL.several(model, [1])[1]
    first, kept = second.matrix(), {path: path.read_bytes() for path in files(empty_cache)}
    second.matrix().zero_()
    assert torch.equal(second.matrix(), first)
    assert {path: path.read_bytes() for path in files(empty_cache)} == kept


OTHERS = [
    {"seed": 1},
    {"length": 20},
    {"sink": True},
    {"tokens": 300},
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_another_request_is_another_file(
    gpt2: ModelHandle, empty_cache: Path, other: dict[str, int]
) -> None:
    first = SMALL.several(gpt2, [1])[1].matrix()
    second = Moments(**{"tokens": 150, "length": 16, **other}).several(gpt2, [1])[1].matrix()
    assert len(files(empty_cache)) == 2 * 2  # over all tokens, over half of them
    assert not torch.equal(first, second)


def test_another_model_layer_or_prefix_is_another_file(
    gpt2: ModelHandle, empty_cache: Path
) -> None:
    other, prefixed = copy_of(gpt2), copy_of(gpt2)
    other.blocks[0].mlp.c_fc.bias.data += 0.1
    prefixed.prefix = "\n"
    found = [
        SMALL.several(gpt2, [1])[1].matrix(),
        SMALL.several(gpt2, [2])[2].matrix(),
        SMALL.several(other, [1])[1].matrix(),
        SMALL.several(prefixed, [1])[1].matrix(),
    ]
    assert len(files(empty_cache)) == 4 * 2
    assert not any(torch.equal(found[0], each) for each in found[1:])


@pytest.mark.parametrize("kind", ["moments", "text"])
@pytest.mark.parametrize("damage", [b"", b"\x00" * 7, b"nonsense" * 100, None])
def test_a_damaged_file_is_made_anew(
    gpt2: ModelHandle, empty_cache: Path, kind: str, damage: bytes | None
) -> None:
    first = SMALL.several(gpt2, [1])[1].matrix().clone()  # no longer mapped from the file
    whole = {path: path.read_bytes() for path in files(empty_cache, kind)}
    for path, kept in whole.items():
        path.write_bytes(kept[: len(kept) // 2] if damage is None else damage)
    if kind == "text":
        files(empty_cache)[0].unlink()
    assert torch.equal(SMALL.several(gpt2, [1])[1].matrix(), first)
    assert {path: path.read_bytes() for path in whole} == whole
    assert {path.suffix for path in empty_cache.rglob("*") if path.is_file()} == {".safetensors"}


# -- texts from files ------------------------------------------------------------------------------


def ids_of(handle: ModelHandle, texts: tuple[str, ...]) -> list[int]:
    """Tokens of the texts, one after the other."""
    return [
        token for t in texts for token in handle.tokenizer(t, add_special_tokens=False)["input_ids"]
    ]


def from_file(path: Path, **how: int) -> Moments:
    """Moments over 60 tokens of a file."""
    return Moments(text=str(path), **{"tokens": 60, "length": 16, **how})


def test_a_text_file_is_cut_into_rows(model: ModelHandle, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(CORPUS), encoding="utf-8")
    start = start_ids(model)
    rows = from_file(path).rows(model)
    assert rows[:, : len(start)].tolist() == [start] * len(rows)
    fresh = rows[:, len(start) :].flatten().tolist()
    assert fresh == ids_of(model, ("\n".join(CORPUS),))[: len(fresh)]
    assert 60 <= len(fresh) < 60 + 16


def test_jsonl_holds_strings_or_objects(model: ModelHandle, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    lines = [CORPUS[0], {"text": CORPUS[1], "url": "nowhere"}, *CORPUS[2:]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows = from_file(path).rows(model)
    fresh = rows[:, len(start_ids(model)) :].flatten().tolist()
    assert fresh == ids_of(model, CORPUS)[: len(fresh)]


def test_moments_follow_the_files_content_not_its_name(
    gpt2: ModelHandle, tmp_path: Path, empty_cache: Path
) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    for path in (one, two):
        path.write_text(" ".join(CORPUS), encoding="utf-8")
    first = from_file(one).several(gpt2, [1])[1].matrix()
    assert torch.equal(from_file(two, seed=3).several(gpt2, [1])[1].matrix(), first)
    assert len(files(empty_cache)) == 2
    one.write_text(" ".join(reversed(CORPUS)), encoding="utf-8")
    assert not torch.equal(from_file(one).several(gpt2, [1])[1].matrix(), first)


def test_a_missing_file_is_named(gpt2: ModelHandle, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    message = f"nothing at {path}; check intervene.moments.text"
    with pytest.raises(RequestError, match=message):
        from_file(path)
    path.write_text(" ".join(CORPUS))
    moments = from_file(path)
    path.unlink()
    for ask in (moments.rows, lambda model: moments.several(model, [0])[0].matrix()):
        with pytest.raises(RequestError, match=message):
            ask(gpt2)


def test_too_short_a_text_says_how_long_it_must_be(gpt2: ModelHandle, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(CORPUS[0], encoding="utf-8")
    found = len(ids_of(gpt2, CORPUS[:1]))
    message = f"at least 150 tokens.*found {found} in {path}.*longer text.*moments.tokens"
    with pytest.raises(RequestError, match=message):
        from_file(path, tokens=140).several(gpt2, [0])


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "half',
        '{"words": "none"}',
        '{"text": 3}',
        "17",
        "null",
        '["a"]',
        "",
        "[" * 5000,
        "[" * 200 + "]" * 200,
        '"' + "x" * 1_000_000 + '"',
    ],
    ids=lambda line: line[:20],
)
def test_a_line_that_is_no_text_is_named_by_its_number(
    gpt2: ModelHandle, tmp_path: Path, line: str
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(f'"{CORPUS[0]}"\n{{"text": "It is said."}}\n{line}\n', encoding="utf-8")
    with pytest.raises(RequestError, match=f"in {path} line 3; mend that line"):
        from_file(path, tokens=500).rows(gpt2)


def test_lines_that_are_not_needed_are_not_read(gpt2: ModelHandle, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    good = "".join(json.dumps(text) + "\n" for text in CORPUS)
    path.write_text(good + "not JSON\n", encoding="utf-8")
    assert len(from_file(path).rows(gpt2)) == 4


# -- too few tokens --------------------------------------------------------------------------------


def test_moments_of_too_few_tokens_name_the_tokens_needed(model: ModelHandle) -> None:
    width = model.w_out(0).shape[1]
    method = Rome(moments=Moments(tokens=width // 2, length=16), prefixes=GivenPrefixes([]))
    message = rf"full rank {width}.*singular.*moments\.tokens to at least {10 * width} "
    with pytest.raises(RequestError, match=message):
        method.fit(model, splits(TARGETS[:1]), Site(1, "mlp"))


def test_a_layer_that_is_not_there_is_refused(gpt2: ModelHandle) -> None:
    for moments, layer in ((SMALL, 4), (Moments(tokens=150, length=16, layers=[9]), 1)):
        with pytest.raises(RequestError, match=r"layer from 0 to 3 for tiny-gpt2, found [49]"):
            moments.several(gpt2, [layer])


@pytest.mark.parametrize("mistake", [{"length": 1}, {"tokens": 0}], ids=str)
def test_a_size_that_is_too_small_is_refused(mistake: dict[str, int]) -> None:
    (name,) = mistake
    with pytest.raises(RequestError, match=f"intervene.moments.{name}"):
        Moments(**mistake)
