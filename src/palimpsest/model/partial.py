"""Only compute what can change.

A change at (block L, token t) alters nothing below L and nothing before t. `Resume` keeps what it
leaves untouched: the states that enter block L from token t on, and the keys and values of the
earlier tokens in the blocks from L on. Rows may have different t; their caches are padded on the
left. The model's own forward method runs the rest, with its lower blocks passed over, so that masks
and positions (rotary, learned) are the model's own.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from palimpsest.model.calls import forwards
from palimpsest.model.forward import forward
from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import Batch


@dataclass(frozen=True)
class Capture:
    """One unchanged pass over whole rows, which can be resumed at several blocks and tokens.

    Attributes:
        batch: the rows.
        states: by kept block, its input `[n, t, d_model]`.
        cached: by block, keys and values `[n, heads, t, d_head]`.
        final: final hidden states `[n, t, d_model]`.
        in_tuple: whether blocks return their output first in a tuple.
    """

    batch: Batch
    states: dict[int, Tensor]
    cached: list[tuple[Tensor, Tensor]]
    final: Tensor
    in_tuple: bool

    @classmethod
    @torch.no_grad()
    def of(cls, handle: ModelHandle, batch: Batch, layers: Iterable[int]) -> "Capture":
        """Run the batch once, and keep what passes resumed at any of the blocks `layers` need."""
        states: dict[int, Tensor] = {}
        cache = DynamicCache()
        hooks = [(handle.blocks[n], partial(states.__setitem__, n)) for n in dict.fromkeys(layers)]
        with handle.hooked_input(hooks), _returning(handle.blocks[0]) as outputs:
            final = forward(handle, batch, cache)
        entries: list[Any] = cache.layers
        cached = [(entry.keys, entry.values) for entry in entries]
        return cls(batch, states, cached, final, isinstance(outputs[0], tuple))

    @torch.no_grad()
    def resume(self, layer: int, starts: Tensor, rows: Tensor | None = None) -> "Resume":
        """What a change at block `layer`, from a token of each row on, leaves untouched.

        Args:
            layer: the first block that may change; one of those kept.
            starts: `[m]` the first token of each row that may change.
            rows: `[m]` which rows, any as often as wanted; None: all of them, in order.
        """
        batch = self.batch if rows is None else self.batch.take(rows)
        rest = batch.since(starts)
        cached = {
            number: (_before(_picked(keys, rows), starts), _before(_picked(values, rows), starts))
            for number, (keys, values) in enumerate(self.cached)
            if number == 0 or number >= layer
        }
        states = _picked(self.states[layer], rows).take_along_dim(rest.positions.unsqueeze(-1), 1)
        return Resume(layer, rest, states, cached, self.in_tuple)


def _picked(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


@dataclass(frozen=True)
class Resume:
    """What a change at block `layer`, in each row from a token of its own on, leaves untouched.

    Attributes:
        layer: the first block to run.
        batch: each row's tokens from its first changed one on.
        states: `[n, t, d_model]` the input of block `layer` at those tokens.
        cached: by block from `layer` on (and block 0, whose length the mask is made from), keys and
            values `[n, heads, cached, d_head]` of the earlier tokens, padded on the left. Never
            changed: each run concatenates into tensors of its own.
        in_tuple: whether blocks return their output first in a tuple.
    """

    layer: int
    batch: Batch
    states: Tensor
    cached: dict[int, tuple[Tensor, Tensor]]
    in_tuple: bool

    @classmethod
    def capture(cls, handle: ModelHandle, batch: Batch, layer: int, starts: Tensor) -> "Resume":
        """Run the batch once, unchanged, and keep what a change from there on cannot alter.

        Args:
            handle: the model.
            batch: whole rows.
            layer: the first block that may change.
            starts: `[n]` the first token of each row that may change.
        """
        return Capture.of(handle, batch, [layer]).resume(layer, starts)

    def run(self, handle: ModelHandle) -> Tensor:
        """Final hidden states `[n, t, d_model]` of the rows from their first changed tokens on.

        Gradients flow to whatever hooks add. Equal to a full forward pass under the same hooks.
        """
        with (
            _passed_over(handle.blocks[: self.layer], self.in_tuple),
            handle.hooked_input([(handle.blocks[self.layer], lambda _: self.states)]),
        ):
            return forward(handle, self.batch, self._cache(handle.n_layers))

    def _cache(self, n_layers: int) -> DynamicCache:
        cache = DynamicCache()
        for layer in range(n_layers):
            cache.update(*self.cached.get(layer, self.cached[0]), layer)
        return cache


def _before(entries: Tensor, starts: Tensor) -> Tensor:
    """The first `starts[n]` entries of each row of `[n, heads, t, d_head]`, padded on the left."""
    longest = int(starts.max())
    index = torch.arange(longest, device=entries.device) - (longest - starts).unsqueeze(1)
    return entries.take_along_dim(index.clamp(min=0)[:, None, :, None], 2)


@contextmanager
def _returning(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what a module returns, as it is, while the context lasts."""
    outputs: list[Any] = []
    hook = module.register_forward_hook(lambda *call: outputs.append(call[-1]))
    try:
        yield outputs
    finally:
        hook.remove()


@contextmanager
def _passed_over(blocks: list[nn.Module], in_tuple: bool) -> Iterator[None]:
    """Let blocks hand their input on, in the form of their output, while the context lasts."""

    def same(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if in_tuple else hidden_states

    with forwards(blocks, lambda _: same):
        yield
