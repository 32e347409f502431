"""Weights that accelerate keeps in CPU memory or on disk between forward passes.

A model loaded with a `device_map` holds such weights as empty meta tensors; hooks on its modules
fetch the values for the length of each module's forward pass.
"""

from collections import ChainMap
from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device:
    """Where a module with weights of its own runs."""
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


def value(module: nn.Module, name: str) -> Tensor:
    """A weight's value, wherever it is kept, as a tensor that writes through; see `resident`."""
    weight = module.get_parameter(name)
    return resident(module, name) if weight.is_meta else weight.data


def stored(module: nn.Module, name: str) -> Tensor:
    """The value of an offloaded weight, wherever it is kept."""
    return _offloading(module, name).weights_map[name]  # type: ignore[no-any-return]


def resident(module: nn.Module, name: str) -> Tensor:
    """An offloaded weight as a tensor in CPU memory, which from now on is the one that is fetched.

    So what is written to it acts in every later forward pass. It stays in memory.
    """
    hook = _offloading(module, name)
    held = hook.weights_map.maps[0] if isinstance(hook.weights_map, ChainMap) else {}
    if name not in held:
        hook.weights_map = ChainMap({name: hook.weights_map[name].clone()}, hook.weights_map)
    return hook.weights_map[name]  # type: ignore[no-any-return]


def _offloading(module: nn.Module, name: str) -> Any:
    """The hook that fetches a weight of this module."""
    for hook in _hooks(module):
        if getattr(hook, "offload", False):
            return hook
    raise RuntimeError(f"{type(module).__name__}.{name} has no value and no hook that fetches it")


def _hooks(module: nn.Module) -> list[Any]:
    """Accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [] if hook is None else [hook]))
