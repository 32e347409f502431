"""ModelHandle: a language model with its tokenizer, its parts under standard names.

This is the only place that knows that a block may return a tensor or a tuple, that Conv1D stores
its weight transposed, and which module is W_out. Everything is checked when the handle is made.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from palimpsest.errors import RequestError
from palimpsest.files import fingerprint
from palimpsest.model import offload
from palimpsest.model.architecture import architecture_of, part
from palimpsest.model.site import NORMS, Part, Site
from palimpsest.model.tokens import NOBODY, Batch, Spanned, Tokens

_NOT_THE_MODEL = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "transformers_version",
    "use_cache",
}
"""Keys of a configuration that say nothing of what the model computes (weights carry the dtype)."""


class ModelHandle:
    """A causal language model in evaluation mode, without gradients on its weights.

    Attributes:
        name: the name it goes by in rows and reports.
        model: the transformers model.
        tokenizer: its fast tokenizer.
        prefix: text put before every prompt (a newline nearly doubles what SmolLM2 recalls).
        blocks: the transformer blocks, in order.
        batch_size: rows in one forward pass.
        architecture: where the parts of the model are.
        decoder: what holds the blocks.
        final_norm: from the last block's output to the head's input.
        width: d, the size of the residual stream.
        running: the batch of the forward pass under way, None outside of one; what hooks read
            owners and positions from. Calls of the model by other code have one under
            `palimpsest.model.calls.followed` alone.
        changes: digests of the changes that the model carries now, in the order of application.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        prefix: str = "",
        batch_size: int = 64,
    ) -> None:
        """Take a loaded model; check that its parts are where the architecture table says.

        Raises:
            RequestError: unknown architecture, a slow tokenizer, or parts of unexpected shape.
        """
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.prefix = prefix
        self.batch_size = batch_size
        self.running: Batch | None = None
        self.changes: list[str] = []
        self.architecture = architecture_of(model, model.config.model_type)
        self.decoder = part(model, self.architecture.decoder)
        self.blocks = list(part(self.decoder, self.architecture.blocks).children())
        self.final_norm = self._after_blocks()
        self.width = int(model.config.get_text_config().hidden_size)
        self._check()

    def _after_blocks(self) -> nn.Module:
        """From the last block's output to the head's input; a model may lack either step."""
        paths = (self.architecture.final_norm, self.architecture.projection)
        present = [p for p in paths if p is not None and getattr(self.decoder, p, p) is not None]
        return nn.Sequential(*[part(self.decoder, path) for path in present])

    def _check(self) -> None:
        if not self.tokenizer.is_fast:
            raise RequestError(
                f"expected a fast tokenizer (it gives character offsets), found "
                f"{type(self.tokenizer).__name__}; convert it with transformers' AutoTokenizer"
            )
        for layer in range(self.n_layers):
            module = self.module(Site(layer, "mlp"))
            weight = getattr(module, "weight", None)
            shape = tuple(_orient(module, weight).shape) if isinstance(weight, Tensor) else ()
            if len(shape) != 2 or shape[0] != self.width:
                raise RequestError(
                    f"expected W_out of layer {layer} to write {self.width} features, found shape "
                    f"{shape} (out, in); mend the row in palimpsest/model/architecture.py"
                )
            self.module(Site(layer, "attention"))
            if self._norms_elsewhere is None:
                for name in NORMS:
                    self._check_norm(layer, name)
            device = offload.device_of(module)
            if device != self.device:
                raise RequestError(
                    f"expected all blocks to run on {self.device}, where the embeddings run, found "
                    f"layer {layer} on {device}; name at most one GPU in model.device_map"
                )

    def _check_norm(self, layer: int, name: Part) -> None:
        """Whether a norm is as wide as the residual stream, and so is what reads it."""
        weight = getattr(self.module(Site(layer, name)), "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
        if shape != (self.width,):
            raise RequestError(
                f"expected {name} of layer {layer} to give {self.width} features, found shape "
                f"{shape}; mend the row in palimpsest/model/architecture.py"
            )
        for path in self.architecture.readers(name):
            module = part(self.blocks[layer], path)
            weight = getattr(module, "weight", None)
            shape = tuple(_orient(module, weight).shape) if isinstance(weight, Tensor) else ()
            if len(shape) != 2 or shape[1] != self.width:
                raise RequestError(
                    f"expected {path} of layer {layer} to read {self.width} features, found shape "
                    f"{shape} (out, in); mend the row in palimpsest/model/architecture.py"
                )

    @property
    def _norms_elsewhere(self) -> str | None:
        """By what option norms do not stand in front of what reads them; None if they do."""
        if self.architecture.norms_first is None:
            return None
        option, wanted = self.architecture.norms_first
        found = getattr(self.model.config.get_text_config(), option, wanted)
        return None if found == wanted else f"{option}={found}"

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the embeddings run, and so where inputs go."""
        return offload.device_of(self.model.get_input_embeddings())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every weight, the configuration and the tokenizer; no path in it.

        Of the configuration what differs from the model type's defaults counts: rope's base, norms'
        epsilons, activations and the like stand in no weight.
        """
        described = _describing(self.model.config.to_diff_dict())
        digest = hashlib.sha256(json.dumps(described, default=str, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            if tensor.is_meta:
                owner, _, own = name.rpartition(".")
                tensor = offload.stored(self.model.get_submodule(owner), own)
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        return digest.hexdigest()

    @property
    def state(self) -> str:
        """What the model computes now: its fingerprint, or a digest of that and its changes."""
        if not self.changes:
            return self.fingerprint
        return fingerprint([self.fingerprint, *self.changes])

    def check_layer(self, layer: int, setting: str = "locate.layer") -> int:
        """`layer` itself, if the model has it.

        Args:
            layer: counted from 0.
            setting: the configuration key that it comes from, for the message.

        Raises:
            RequestError: out of range.
        """
        if not 0 <= layer < self.n_layers:
            raise RequestError(
                f"expected a layer from 0 to {self.n_layers - 1} for {self.name}, found {layer}; "
                f"set {setting} within that range"
            )
        return layer

    def module(self, site: Site) -> nn.Module:
        """The module whose output is the site.

        Raises:
            RequestError: a norm's output, in a model whose norms stand elsewhere.
        """
        if site.part in NORMS and self._norms_elsewhere is not None:
            raise RequestError(
                f"expected norms that stand in front of attention and MLP, and that these alone "
                f"read, for a change at {site.part}, found {self._norms_elsewhere} in "
                f"{self.name}'s configuration; take intervene.part=residual, mlp or attention"
            )
        return part(self.blocks[site.layer], self.architecture.path(site.part))

    def w_out(self, layer: int) -> Tensor:
        """W_out of a layer as `[d_model, d_mlp]`: a view that writes through to the parameter.

        If the parameter is offloaded, its value is from now on kept in CPU memory.
        """
        module = self.module(Site(layer, "mlp"))
        return _orient(module, offload.value(module, "weight"))

    def reading(self, site: Site) -> list[nn.Module]:
        """The linear modules that read a norm's output; no others do.

        Raises:
            RequestError: as of `module`.
        """
        self.module(site)
        paths = self.architecture.readers(site.part)
        return [part(self.blocks[site.layer], path) for path in paths]

    def readers(self, site: Site) -> list[tuple[Tensor, Tensor | None]]:
        """Weight `[out, d_model]` and bias `[out]` of each, as views that write through.

        The bias is None where there is none. Offloaded ones are from now on kept in CPU memory.

        Raises:
            RequestError: as of `module`.
        """
        found: list[tuple[Tensor, Tensor | None]] = []
        for module in self.reading(site):
            bare = getattr(module, "bias", None) is None
            weight = _orient(module, offload.value(module, "weight"))
            found.append((weight, None if bare else offload.value(module, "bias")))
        return found

    def writers(self, layer: int) -> list[nn.Parameter]:
        """W_out and attention's output matrix of a layer: what writes to the residual stream."""
        block = self.blocks[layer]
        paths = (self.architecture.attention_out, self.architecture.w_out)
        return [part(block, path).get_parameter("weight") for path in paths]

    def matrices(self) -> list[Tensor]:
        """Every linear weight of the blocks as `[out, in]`: views that write through.

        Embeddings, head, norms and biases are none of them. As of `w_out`, offloaded ones are from
        now on kept in CPU memory.
        """
        modules = [m for block in self.blocks for m in block.modules()]
        linear = [m for m in modules if isinstance(m, nn.Linear | Conv1D)]
        return [
            _orient(m, offload.resident(m, "weight") if m.weight.is_meta else m.weight)
            for m in linear
        ]

    # -- the pass under way -----------------------------------------------------------------------

    @property
    def under_way(self) -> Batch:
        """`running`, for hooks that cannot do without.

        Raises:
            RequestError: a part of the model was called by itself.
        """
        if self.running is None:
            raise RequestError(
                "expected a call of the whole model, while a change reads each token's place and "
                "owner, found one of a part of it; call the model, or a forward pass of "
                "palimpsest.model.forward"
            )
        return self.running

    # -- text to tokens ---------------------------------------------------------------------------

    def encode(self, prompt: Spanned, completion: str = "", owner: int = NOBODY) -> Tokens:
        """Tokens of prefix + prompt (+ a space and the completion), tokenized as one text.

        The ends of subject and prompt are found by the tokenizer's character offsets.

        Raises:
            RequestError: the prompt ends in white space, a token straddles its end, or the text is
                empty.
        """
        head = self.prefix + prompt.text
        text = f"{head} {completion}" if completion else head
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        length = sum(start < len(head) for start, _ in offsets)
        straddled = bool(completion and length) and offsets[length - 1][1] > len(head)
        if not length or straddled or prompt.text[-1:].isspace():
            raise RequestError(
                f"expected a prompt that ends between two tokens, found {text!r}; "
                "drop the white space at the end of the prompt"
            )
        return Tokens(tuple(ids), length, self._subject(prompt, offsets), owner)

    def _subject(
        self, prompt: Spanned, offsets: Sequence[tuple[int, int]]
    ) -> tuple[int, int] | None:
        """Indices of the first and last token that overlap the subject's characters."""
        if prompt.span is None:
            return None
        first, end = (len(self.prefix) + index for index in prompt.span)
        inside = [i for i, (start, stop) in enumerate(offsets) if start < end and stop > first]
        return (inside[0], inside[-1]) if inside else None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return str(self.tokenizer.decode(list(ids)))

    # -- hooks ------------------------------------------------------------------------------------

    @contextmanager
    def hooked(
        self, hooks: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor | None]]]
    ) -> Iterator[None]:
        """Run functions on modules' outputs while the context lasts.

        Each function sees the output tensor `[n, t, ...]`, whether the module returns it bare or
        first in a tuple, and returns its replacement, or None to leave it.
        """
        handles: list[RemovableHandle] = []
        try:
            for module, function in hooks:
                handles.append(module.register_forward_hook(_on_output(self._by_row(function))))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def hooked_input(
        self, hooks: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor | None]]]
    ) -> Iterator[None]:
        """The same for modules' first inputs, before the modules run."""
        handles: list[RemovableHandle] = []
        try:
            for module, function in hooks:
                hook = _on_input(self._by_row(function))
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _by_row(
        self, function: Callable[[Tensor], Tensor | None]
    ) -> Callable[[Tensor], Tensor | None]:
        """Let a function see `[n, t, ...]` where a module (OPT's MLP) sees `[n t, ...]`."""

        def by_row(states: Tensor) -> Tensor | None:
            if self.running is None or states.dim() != 2:
                return function(states)
            changed = function(states.unflatten(0, self.running.ids.shape))
            return None if changed is None else changed.flatten(0, 1)

        return by_row


def _describing(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and those inside it, without what says nothing of the model."""
    return {
        key: _describing(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_THE_MODEL
    }


def _orient(module: nn.Module, weight: Tensor) -> Tensor:
    """A module's weight as (out, in)."""
    return weight.data.T if isinstance(module, Conv1D) else weight.data


def _on_output(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return function(output)
        changed = function(output[0])
        return None if changed is None else (changed, *output[1:])

    return hook


def _on_input(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            changed = function(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        changed = function(kwargs["hidden_states"])
        return None if changed is None else (args, {**kwargs, "hidden_states": changed})

    return hook
