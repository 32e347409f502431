"""Only compute what can change.

A change at (block L, token t) alters nothing below L and nothing before t. `Resume` keeps what it
leaves untouched: the states that enter block L from token t on, and the keys and values of the
earlier tokens in the blocks from L on. Rows may have different t; their caches are padded on the
left. The model's own forward method runs the rest, with its lower blocks passed over, so that masks
and positions (rotary, learned) are the model's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from palimpsest.model.forward import forward
from palimpsest.model.handle import ModelHandle
from palimpsest.model.tokens import Batch


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
    @torch.no_grad()
    def capture(cls, handle: ModelHandle, batch: Batch, layer: int, starts: Tensor) -> "Resume":
        """Run the batch once, unchanged, and keep what a change from there on cannot alter.

        Args:
            handle: the model.
            batch: whole rows.
            layer: the first block that may change.
            starts: `[n]` the first token of each row that may change.
        """
        kept: list[Tensor] = []
        cache = DynamicCache()
        block = handle.blocks[layer]
        with handle.hooked_input([(block, kept.append)]), _returning(block) as outputs:
            forward(handle, batch, cache)
        rest = batch.since(starts)
        index = rest.positions.unsqueeze(-1)
        entries: list[Any] = cache.layers
        cached = {
            number: (_before(entry.keys, starts), _before(entry.values, starts))
            for number, entry in enumerate(entries)
            if number == 0 or number >= layer
        }
        states = kept[0].take_along_dim(index, 1)
        return cls(layer, rest, states, cached, isinstance(outputs[0], tuple))

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

    own = [vars(block).get("forward") for block in blocks]  # accelerate sets it on the instance
    try:
        for block in blocks:
            block.forward = same
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            if before is None:
                del block.forward
            else:
                block.forward = before
