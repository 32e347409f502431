"""Fine-tuning of W_out by low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), with PEFT."""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from palimpsest.errors import RequestError, check_at_least, check_number
from palimpsest.facts.fact import Fact
from palimpsest.intervene.changes.composition import Composition, joined
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.editors.editor import Editing, diverged, tuning_rows
from palimpsest.intervene.editors.finetune import Completions, Tuner
from palimpsest.model.architecture import part
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import within_memory
from palimpsest.model.site import Change, Site

ADAPTER = "fact"
"""PEFT's name of the adapter that is trained."""

Found = dict[int, tuple[Tensor, Tensor]]
"""By layer, A `[rank, d_mlp]` and `scaling · Bᵀ` `[rank, d_model]`, float32 on the CPU."""


@dataclass(frozen=True)
class LoraFineTune(Tuner):
    """Gradient descent in `ΔW = (α / r) B A`.

    A `[r, d_mlp]` is drawn as PEFT draws it (uniform within ±1/√d_mlp), B `[d_model, r]` is zero at
    first. PEFT is the trainer only: what comes back is weight deltas, and the model has its own
    modules again. There is no dropout: with it, a fact's change would depend on numbers drawn at
    every step, and two fits of the same fact would differ.

    Attributes:
        rank: r.
        alpha: α.
        layers: whose W_out; None for the located one.
        all_layers: every layer's W_out.
    """

    steps: int = 70
    lr: float = 5e-3
    rank: int = 8
    alpha: float = 32.0
    layers: list[int] | None = None
    all_layers: bool = False

    def __post_init__(self) -> None:
        """Check the numbers, and that PEFT is there.

        Raises:
            RequestError: no rank, a number out of its range, no layer, layers named twice over, no
                PEFT, or as of `Tuner`.
        """
        super().__post_init__()
        check_at_least("intervene.rank", self.rank, 1)
        check_number("intervene.alpha", self.alpha, above=0)
        if self.layers is not None and (self.all_layers or not self.layers):
            raise RequestError(
                f"expected layers in intervene.layers or intervene.all_layers=true, found "
                f"{self.layers} and {str(self.all_layers).lower()}; set intervene.layers=null for "
                "the located layer"
            )
        if importlib.util.find_spec("peft") is None:
            raise RequestError(
                "expected the package peft, which trains the adapters, found none; "
                "pip install 'peft>=0.15'"
            )

    def begin(self, model: ModelHandle, site: Site) -> "_Tuning":
        """Nothing is needed but the layers.

        Raises:
            RequestError: the model lacks one, or keeps its weights elsewhere.
        """
        named = range(model.n_layers) if self.all_layers else self.layers or [site.layer]
        layers = sorted({model.check_layer(layer, "intervene.layers") for layer in named})
        for layer in layers:
            if model.module(Site(layer, "mlp")).weight.is_meta:
                raise RequestError(
                    f"expected W_out of layer {layer} in memory, found it offloaded, where PEFT "
                    "cannot train it; set model.device_map=null, or intervene=ft"
                )
        return _Tuning(self, tuple(layers))


@dataclass(frozen=True)
class _Tuning(Editing):
    """LoRA at work on some layers."""

    method: LoraFineTune
    layers: tuple[int, ...]

    def edit(self, model: ModelHandle, facts: tuple[Fact, ...], independent: bool) -> Composition:
        """One adapter for each fact, or one for all."""
        groups = [(fact,) for fact in facts] if independent else [facts]
        tuned = [within_memory(self._tune)(model, group) for group in groups]
        losses = [loss for _, loss in tuned]
        failed = diverged(groups, losses)
        parts = tuple(
            WeightDeltas(
                change=Change("fact", independent, layer, "mlp", failed=failed),
                model=model.fingerprint,
                left=torch.stack([found[layer][0] for found, _ in tuned]),
                right=torch.stack([found[layer][1] for found, _ in tuned]),
            )
            for layer in self.layers
        )
        return Composition(
            change=joined(parts),
            model=model.fingerprint,
            parts=parts,
            diagnostics=tuple(tuning_rows(groups, self.layers[0], losses)),
        )

    def _tune(self, model: ModelHandle, facts: Sequence[Fact]) -> tuple[Found, float]:
        """What the adapters have learned and the last loss; zeros if that is not finite."""
        parts = Completions.of(model, facts, self.layers[0], self.method.aim)
        with adapted(model, self.layers, self.method) as adapters:
            weights = [w for w in adapters.parameters() if w.requires_grad]
            adam = torch.optim.Adam(weights, lr=self.method.lr)
            for step in range(self.method.steps + 1):
                adam.zero_grad()
                loss = sum(part.backward(model) for part in parts)
                if step == self.method.steps or not loss >= self.method.enough:
                    break
                adam.step()
            found = read_out(adapters)
        if not math.isfinite(loss):
            found = {layer: (a.zero_(), b.zero_()) for layer, (a, b) in found.items()}
        return found, loss


@contextmanager
def adapted(
    model: ModelHandle, layers: Sequence[int], method: LoraFineTune
) -> Iterator[nn.ModuleDict]:
    """Put PEFT's adapters around W_out of some layers while the context lasts.

    PEFT sees a dictionary of these modules, never the model: the model's own modules are put back
    afterwards, whatever happens inside. The global random state stays as it is.

    Args:
        model: the model.
        layers: whose W_out.
        method: rank, α and seed.

    Yields:
        the adapted modules, by `layer_<number>`.
    """
    own = {layer: model.module(Site(layer, "mlp")) for layer in layers}
    adapters = _injected(own, method)
    try:
        for layer in layers:
            _put(model, layer, adapters[f"layer_{layer}"])
        yield adapters
    finally:
        for layer, module in own.items():
            _put(model, layer, module)


def _injected(own: Mapping[int, nn.Module], method: LoraFineTune) -> nn.ModuleDict:
    """PEFT's layers around the model's modules, their A drawn by the seed."""
    import peft

    modules = nn.ModuleDict({f"layer_{layer}": module for layer, module in own.items()})
    config = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=list(modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in own.values()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(method.seed)
        peft.inject_adapter_in_model(config, modules, ADAPTER)
    return modules


def _put(model: ModelHandle, layer: int, module: nn.Module) -> None:
    """Let a module stand where W_out of a layer stands."""
    parent, _, name = model.architecture.w_out.rpartition(".")
    setattr(part(model.blocks[layer], parent), name, module)


def read_out(adapters: nn.ModuleDict) -> Found:
    """What adapters hold now."""
    found = {}
    for name, adapter in adapters.items():
        layer: Any = adapter
        left, right = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        scaled = right.detach().T.float() * layer.scaling[ADAPTER]
        number = int(name.removeprefix("layer_"))
        found[number] = left.detach().float().cpu().clone(), scaled.cpu().contiguous()
    return found
