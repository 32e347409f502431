"""Second moments C = E[k kᵀ] of the inputs of W_out, for many layers in one pass over a text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from palimpsest.cache import cached_tensors, in_one_pass, is_cached
from palimpsest.errors import RequestError, check_at_least, check_seed
from palimpsest.facts.lines import LONGEST
from palimpsest.files import parse_json, read_text, reading, sha256_file
from palimpsest.model.forward import run_to
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import within_memory
from palimpsest.model.sample import sample, start_ids
from palimpsest.model.site import Site
from palimpsest.model.tokens import Tokens, collate


class MomentSource(Protocol):
    """Where second moments come from."""

    def several(self, model: ModelHandle, layers: Sequence[int]) -> dict[int, "Second"]:
        """Second moments of layers, by layer."""
        ...

    def sampled(self, model: ModelHandle, layers: Sequence[int]) -> "SampledMoments | None":
        """How much text is sampled from the model for them; None if they come otherwise."""
        ...

    def over(self, tokens: int, length: int) -> "MomentSource":
        """The same over so many tokens, in rows of `length`; itself if it takes no text."""
        ...


@dataclass(frozen=True)
class SampledMoments:
    """Second moments over text sampled from the model, as a fit would take them.

    Attributes:
        key: of the method's configuration, that sets how many tokens there are.
        tokens: how many there are.
        usual: how many there are if none are set.
        cached: they are in the cache, so that there is nothing to wait for.
    """

    key: str
    tokens: int
    usual: int
    cached: bool


@dataclass(frozen=True)
class Second:
    """The second moments of one layer, read when they are asked for: they are large.

    Attributes:
        matrix: gives C `[d_mlp, d_mlp]` float64, uncentred, each time a tensor of its own.
        half: the same over the first half of the text, to see whether there is enough of it; None
            of a text that cannot be halved.
    """

    matrix: Callable[[], Tensor]
    half: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class RunningText:
    """Text sampled from the model itself, or read from a file.

    Attributes:
        text: a text file, or JSONL of strings or of objects with the key `text`; None: sampled.
        tokens: how many tokens to use; None: ten times d_mlp.
        length: tokens in a row, the model's prefix included.
        sink: count position 0 too. It is an attention sink with activations hundreds of times
            larger.
        seed: of the sampled text.
    """

    text: str | None = None
    tokens: int | None = None
    length: int = 128
    sink: bool = False
    seed: int = 0

    where: ClassVar[str] = "intervene.text"
    """The configuration's key, for messages."""

    def __post_init__(self) -> None:
        """Check the numbers, and that the text is there.

        Raises:
            RequestError: one is too small, the seed out of range, or no such file.
        """
        check_seed(f"{self.where}.seed", self.seed)
        if self.text is not None:
            self._existing()
        check_at_least(f"{self.where}.length", self.length, 2)
        if self.tokens is not None:
            check_at_least(f"{self.where}.tokens", self.tokens, 1)

    def rows(self, model: ModelHandle) -> Tensor:
        """Token ids `[rows, length]` of the text, each row opened by the model's prefix.

        Raises:
            RequestError: the text cannot be read or is too short.
        """
        start = start_ids(model)
        fresh, count = self.length - len(start), self.count(model)
        if self.text is None:
            return self._sampled(model, count, fresh)
        return self._read(model, self._existing(), start, count, fresh)

    def count(self, model: ModelHandle) -> int:
        """How many rows the wanted number of tokens fills.

        Raises:
            RequestError: the model's prefix fills a row.
        """
        wanted = self.tokens if self.tokens is not None else usual_tokens(model)
        opening = len(start_ids(model))
        check_at_least(f"{self.where}.length", self.length, opening + 1)
        return -(-wanted // (self.length - opening))

    def key(self, model: ModelHandle) -> dict[str, Any]:
        """What the cache knows the text by."""
        return {
            "version": 3,
            "model": model.state,
            "prefix": model.prefix,
            "text": None if self.text is None else sha256_file(self._existing()),
            "tokens": self.tokens,
            "length": self.length,
            "sink": self.sink,
            "seed": self.seed if self.text is None else None,
        }

    def _existing(self) -> Path:
        path = Path(self.text or "")
        if not path.is_file():
            raise RequestError(
                f"expected a text or JSONL file, found nothing at {path}; check {self.where}.text"
            )
        return path

    def _sampled(self, model: ModelHandle, count: int, fresh: int) -> Tensor:
        def make() -> dict[str, Tensor]:
            return {"ids": sample(model, count, fresh, torch.Generator().manual_seed(self.seed))}

        key = {**self.key(model), "rows": count}
        return cached_tensors("text", key, make)["ids"]

    def _read(
        self, model: ModelHandle, path: Path, start: list[int], count: int, fresh: int
    ) -> Tensor:
        ids: list[int] = []
        for text in read_texts(path):
            ids.extend(model.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(ids) >= count * fresh:
                break
        if len(ids) < count * fresh:
            raise RequestError(
                f"expected at least {count * fresh} tokens of text, found {len(ids)} in {path}; "
                f"give a longer text or lower {self.where}.tokens"
            )
        rows = torch.tensor(ids[: count * fresh]).view(count, fresh)
        return torch.cat([torch.tensor([start] * count), rows], 1)


@dataclass(frozen=True)
class Moments(RunningText):
    """Second moments over running text.

    Attributes:
        layers: layers to be computed in the same pass, besides the one asked for; no part of a
            run's identity.
    """

    layers: list[int] = field(default_factory=list, metadata={"identity": False})

    where: ClassVar[str] = "intervene.moments"

    def several(self, model: ModelHandle, layers: Sequence[int]) -> dict[int, Second]:
        """Second moments from the cache, or computed together with `self.layers` in one pass.

        They are those of the model as it stands at this call, whenever they are loaded.

        Raises:
            RequestError: no such layer; the text cannot be read or is too short.
        """
        missing = list(dict.fromkeys([*layers, *self.layers]))
        computed: dict[int, dict[str, Tensor]] = {}
        common, state = self.key(model), model.state

        def load(layer: int, part: str) -> Tensor:
            def make() -> dict[str, Tensor]:
                if model.state != state:
                    raise RequestError(
                        "expected second moments in the cache, found them gone while they were "
                        "in use; run it again, and clear the cache when nothing runs"
                    )
                if layer not in computed:
                    computed.update(self._compute(model, missing or [layer]))
                return {part: computed[layer][part]}

            return cached_tensors("moments", _part_key(common, layer, part), make)[part]

        for each in missing:
            model.check_layer(each, "intervene.moments.layers")
        halved = self.count(model) > 1
        parts = ("matrix", "half") if halved else ("matrix",)
        with in_one_pass("moments", [_part_key(common, n, p) for n in missing for p in parts]):
            while missing:
                for part in parts:
                    load(missing[0], part)
                del missing[0]
        computed.clear()
        return {
            layer: Second(
                partial(load, layer, "matrix"), partial(load, layer, "half") if halved else None
            )
            for layer in layers
        }

    def cached(self, model: ModelHandle, layers: Sequence[int]) -> bool:
        """Whether `several` would find all of these layers in the cache."""
        common = self.key(model)
        return all(is_cached("moments", _part_key(common, n, "matrix")) for n in layers)

    def sampled(self, model: ModelHandle, layers: Sequence[int]) -> SampledMoments | None:
        """How much text is sampled; None if it is read from a file."""
        if self.text is not None:
            return None
        usual = usual_tokens(model)
        tokens = usual if self.tokens is None else self.tokens
        return SampledMoments("moments.tokens", tokens, usual, self.cached(model, layers))

    def over(self, tokens: int, length: int) -> "Moments":
        """The same over so many tokens, in rows of `length`."""
        return replace(self, tokens=tokens, length=length)

    def _compute(self, model: ModelHandle, layers: list[int]) -> dict[int, dict[str, Tensor]]:
        """`matrix` and `half` by layer."""
        rows = self.rows(model)
        some = len(rows) // 2
        whole = second_moments(model, layers, rows[some:], self.sink)
        if not some:
            return {layer: {"matrix": matrix} for layer, matrix in whole.items()}
        half = second_moments(model, layers, rows[:some], self.sink)
        for layer in layers:
            whole[layer].lerp_(half[layer], some / len(rows))
        return {layer: {"matrix": whole[layer], "half": half[layer]} for layer in layers}


def usual_tokens(model: ModelHandle) -> int:
    """Tokens of text if no number is set: ten for each of the d_mlp dimensions."""
    return 10 * model.w_out(0).shape[1]


def _part_key(common: Mapping[str, Any], layer: int, part: str) -> dict[str, Any]:
    return {**common, "layer": layer, "part": part}


@dataclass(frozen=True)
class GivenMoments:
    """Second moments given as they are, by layer.

    Attributes:
        given: `[d_mlp, d_mlp]` by layer.
    """

    given: Mapping[int, Tensor] = field(default_factory=dict)

    def several(self, model: ModelHandle, layers: Sequence[int]) -> dict[int, Second]:
        """The given matrices in float64."""
        return {layer: Second(partial(self._copy, layer)) for layer in layers}

    def sampled(self, model: ModelHandle, layers: Sequence[int]) -> None:
        """No text is sampled."""

    def over(self, tokens: int, length: int) -> "GivenMoments":
        """Itself."""
        return self

    def _copy(self, layer: int) -> Tensor:
        return self.given[layer].to(torch.float64, copy=True)


@within_memory
@torch.no_grad()
def second_moments(
    model: ModelHandle, layers: list[int], ids: Tensor, sink: bool
) -> dict[int, Tensor]:
    """C = mean of k kᵀ over tokens, for all layers in one pass, accumulated in float64.

    Args:
        model: the model.
        layers: which layers' W_out.
        ids: `[rows, t]` token ids without padding.
        sink: count position 0.

    Returns:
        by layer, `[d_mlp, d_mlp]` float64 on the CPU.
    """
    first = 0 if sink else 1
    sums: dict[int, Tensor] = {}

    def add(layer: int) -> Callable[[Tensor], None]:
        def hook(key: Tensor) -> None:
            rows = key[:, first:].flatten(0, 1).double()
            if layer not in sums:
                sums[layer] = rows.new_zeros(rows.shape[1], rows.shape[1])
            add_gram(sums[layer], rows)

        return hook

    hooks = [(model.module(Site(layer, "mlp")), add(layer)) for layer in layers]
    with model.hooked_input(hooks):
        for rows in ids.split(max(1, model.batch_size // 4)):
            batch = collate([Tokens(tuple(row), len(row)) for row in rows.tolist()], model.device)
            run_to(model, batch, max(layers))
    count = ids.shape[0] * (ids.shape[1] - first)
    return {layer: mirrored(total.div_(count)).cpu() for layer, total in sums.items()}


_BLOCKS = 8
"""A symmetric product is computed by so many columns of blocks, those below the diagonal left out:
9/16 of its arithmetic."""


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add `rowsᵀ rows` to the blocks of `total` `[d, d]` that lie on or above the diagonal."""
    for block in _blocks(total):
        total[block, block.start :].addmm_(rows[:, block].T, rows[:, block.start :])


def mirrored(total: Tensor) -> Tensor:
    """`total` itself, the blocks below its diagonal filled in from those above."""
    for block in _blocks(total):
        total[block.stop :, block] = total[block, block.stop :].T
    return total


def _blocks(total: Tensor) -> Iterator[slice]:
    width = total.shape[0]
    size = -(-width // _BLOCKS)
    return (slice(first, min(first + size, width)) for first in range(0, width, size))


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a JSONL file (strings, or objects with the key `text`) or of a plain text file.

    Raises:
        RequestError: a line is no such JSON or too long, and the message gives its number; or a
            plain text is too large; or it is not UTF-8.
    """
    if path.suffix != ".jsonl":
        yield read_text(path)
        return
    with reading(path), path.open(encoding="utf-8") as file:
        lines = iter(lambda: file.readline(LONGEST + 1), "")
        for number, line in enumerate(lines, 1):
            yield _text_of(line, path, number)


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        record = parse_json(line if len(line) <= LONGEST else "")
        text = record["text"] if isinstance(record, dict) else record
    except (ValueError, KeyError):
        text = None
    if not isinstance(text, str):
        raise RequestError(
            f"expected a JSON string or an object with the key 'text', found {line.strip()[:60]!r} "
            f"in {path} line {number}; mend that line"
        )
    return text
