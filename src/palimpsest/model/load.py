"""Loading: a named model, a local directory or a hub id becomes a ModelHandle."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from palimpsest.errors import RequestError, check_at_least
from palimpsest.model.fetch import fetch
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import default_rows
from palimpsest.model.site import check_choice

Precision = Literal["float32", "bfloat16", "float16"]
"""The data types of weights, by torch's names."""


_HOW = {"identity": False}
"""Of settings that change no result, or that do so by way of another part that takes them."""


@dataclass(frozen=True)
class Pretrained:
    """Where a model comes from and how it is run. One yaml a model.

    Attributes:
        name: a model that `palimpsest fetch` knows; used where `path` is None.
        path: a local directory or a hub id; its last part names the model in the rows.
        prefix: text put before every prompt.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ...
        device_map: in place of `device`, a plan of accelerate's such as `auto`: weights that do not
            fit the GPU lie in CPU memory or on disk and are fetched when they are needed.
        batch_size: rows in one forward pass; None: 64 on a CPU, 512 on a GPU. Halved where memory
            runs out.
        compile: compile the blocks with torch.compile; of use on GPUs.
        revision: the hub's branch, tag or commit.
        trust_remote_code: run code that the model's repository brings; never unless asked for.
        depths: by part of a block, the layers that `early` and `late` stand for.
        editors: hyper-parameters of editors that depend on the model, for the methods' yamls.
    """

    name: str = "smollm2"
    path: str | None = None
    prefix: str = ""
    dtype: str = "float32"
    device: str = field(default="auto", metadata=_HOW)
    device_map: str | None = field(default=None, metadata=_HOW)
    batch_size: int | None = field(default=None, metadata=_HOW)
    compile: bool = field(default=False, metadata=_HOW)
    revision: str | None = None
    trust_remote_code: bool = False
    depths: dict[str, dict[str, int]] = field(default_factory=dict, metadata=_HOW)
    editors: dict[str, Any] = field(default_factory=dict, metadata=_HOW)

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            RequestError: unknown dtype, an empty batch, or a device beside a device map.
        """
        check_choice("model.dtype", self.dtype, Precision)
        if self.batch_size is not None:
            check_at_least("model.batch_size", self.batch_size, 1)
        if self.device_map is not None and self.device != "auto":
            raise RequestError(
                f"expected model.device or model.device_map, found both ({self.device!r} and "
                f"{self.device_map!r}); leave model.device at auto"
            )

    def load(self) -> ModelHandle:
        """Load model and tokenizer.

        Raises:
            RequestError: nothing at `path`, not a model, adapters of one, unknown or absent device.
        """
        device = self._device()
        source = self.path if self.path is not None else str(fetch(self.name))
        self._refuse_adapters(source)
        transformers_logging.disable_progress_bar()
        options = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                output_loading_info=True,
                device_map=self.device_map,
                **options,
            )
            model: PreTrainedModel = loaded[0]
            if self.device_map is None:
                model.to(device)  # type: ignore[arg-type]
        except Exception as error:  # the libraries raise of any kind where files are damaged
            raise RequestError(self._cannot_load(source, _told(error))) from error
        if missing := sorted(loaded[1]["missing_keys"]):  # transformers would draw them at random
            raise RequestError(self._cannot_load(source, f"no weights for {', '.join(missing)}"))
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise RequestError(self._cannot_load(source, "a tokenizer without a vocabulary"))
        name = self.name if self.path is None else Path(self.path).name
        rows = self.batch_size or default_rows(model.device)
        handle = ModelHandle(model, tokenizer, name, self.prefix, rows)
        if self.compile:
            compile_blocks(handle)
        return handle

    def _refuse_adapters(self, source: str) -> None:
        """Refuse adapters of PEFT, which transformers loads beside the weights that they belong to.

        What is measured of weights would be measured of the parts.
        """
        try:
            found = find_adapter_config_file(source, revision=self.revision)
        except (OSError, ValueError):  # what is wrong with the place is told where it is loaded
            return
        if found is not None:
            raise RequestError(
                f"expected a whole model at model.path, found adapters of PEFT in {source!r}; "
                "merge them first (AutoPeftModelForCausalLM.from_pretrained, merge_and_unload, "
                "save_pretrained), save the tokenizer beside them and set model.path to that place"
            )

    def _device(self) -> torch.device:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.device == "auto":
            return torch.device("cuda" if gpus else "cpu")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise RequestError(
                f"expected model.device to be auto, cpu, cuda or cuda:N, found {self.device!r}; "
                "name one of these"
            )
        device = torch.device(self.device)
        if device.type == "cuda" and (device.index or 0) >= gpus:
            raise RequestError(
                f"expected a GPU for model.device={self.device}, found {gpus} that torch can use; "
                "set model.device=auto"
            )
        return device

    def _cannot_load(self, source: str, error: str) -> str:
        kind = "a model directory" if Path(source).exists() else "a local directory or a hub id"
        cause = " ".join(error.split())[:200]
        placed = "" if self.device_map is None else "check model.device_map, "
        return (
            f"expected {kind} with safetensors weights and a tokenizer, found {source!r} "
            f"({cause}); {placed}set model.path to a directory written by save_pretrained, or "
            "check the id and the network"
        )


def _told(error: Exception) -> str:
    """What a library says; of an error whose text alone says little, the type too."""
    plain = isinstance(error, OSError | ValueError | RuntimeError)
    return str(error) if plain else f"{type(error).__name__}: {error}"


def compile_blocks(handle: ModelHandle) -> None:
    """Compile every block's forward method.

    Compiled code does not see hooks that come later, so a block that carries one inside runs as it
    is; hooks on the block itself are outside of what is compiled. The blocks share their code, each
    is compiled with and without gradients, and torch's limit on that is raised to fit.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * handle.n_layers)
    for block in handle.blocks:
        block.forward = _unless_hooked(block)


def _unless_hooked(block: nn.Module) -> Callable[..., Any]:
    plain, inner = block.forward, [m for m in block.modules() if m is not block]
    compiled = torch.compile(plain, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in inner)
        return (plain if hooked else compiled)(*args, **kwargs)

    return forward
