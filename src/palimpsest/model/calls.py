"""Calls of the model by other code: `generate`, an evaluation library, a loop of one's own.

Hooks read owners and positions from the batch of the forward pass under way. Our own passes
(`palimpsest.model.forward`) bring one; for all others it is made here, of what the call itself is
given. Whose prompt a row is, and where prompt and subject end, no call tells: what needs to know
that is refused.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from palimpsest.errors import RequestError
from palimpsest.model.architecture import part
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import ORACLE_POLICIES, Policy
from palimpsest.model.tokens import NOBODY, Batch

_OTHER = "found a call by other code (generate, an evaluation library), which tells tokens alone"


@dataclass(frozen=True)
class Call(Batch):
    """The rows of a call by other code. `ids` are zeros where the call gives embeddings alone.

    Of owners, subjects and prompts it tells nothing, and refuses what asks for them.
    """

    def owners(self) -> Tensor:
        """Refused.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            f"expected an owner, as each fact has a change of its own, {_OTHER}; name a fact by "
            "its place among the target facts, such as intervention.applied(model, owner=0)"
        )

    def holds(self, subjects: Tensor) -> Tensor:
        """Refused.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            "expected to be told each prompt's subject, as the change acts in the target subjects' "
            f"prompts alone, {_OTHER}; use palimpsest.model.forward (score, greedy), or fit with "
            "intervene.gate=always"
        )

    def selects(self, policy: Policy) -> Tensor:
        """`[n, t]` boolean: the tokens that a policy names; padding among them is inert.

        Raises:
            RequestError: the policy needs to know where the prompt or its subject ends.
        """
        if policy in ORACLE_POLICIES:
            raise RequestError(
                f"expected to be told where prompt and subject end, for a change at {policy}, "
                f"{_OTHER}; use palimpsest.model.forward (score, greedy), or fit with "
                "intervene.policy=all_but_sink or all"
            )
        return super().selects(policy)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Call | None":
        """What the arguments of a forward method tell; None if they hold no tokens.

        A token's place is that among its row's real tokens, cached ones included: by the padding
        mask if there is one, else by the position ids, else by how many tokens a ready attention
        mask lets it see, else by its column.

        Args:
            given: by name.
        """
        ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
        source = ids if ids is not None else embedded
        if source is None:
            return None
        n, t = source.shape[:2]
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        device = source.device
        mask = _padding(given.get("attention_mask"), past + t, device)
        if mask is None:
            positions = _positions(given, past, t, device).expand(n, t)
            mask = torch.ones(n, past + t, dtype=torch.long, device=device)
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        nothing = torch.full((n,), NOBODY, device=device)
        if ids is None:
            ids = torch.zeros(n, t, dtype=torch.long, device=device)
        return cls(ids, mask, positions, nothing, nothing, nothing, torch.zeros_like(nothing))


def _padding(mask: Any, width: int, device: torch.device) -> Tensor | None:
    """A padding mask `[n, width]` of ones and zeros, as transformers reads it; None if it is none.

    Its columns are the cache's; one that is too long speaks of slots that are still empty.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    real = (mask.to(device) != 0).long()[:, :width]
    return nn.functional.pad(real, (0, width - real.shape[1]))


def _positions(given: Mapping[str, Any], past: int, t: int, device: torch.device) -> Tensor:
    """Places of tokens without a padding mask, `[n or 1, t]`."""
    if (positions := given.get("position_ids")) is not None:
        return positions.to(device)  # type: ignore[no-any-return]
    mask = given.get("attention_mask")
    if isinstance(mask, Mapping):  # by kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask == 0 if mask.is_floating_point() else mask != 0
        return (seen[:, 0].sum(-1) - 1).clamp(min=0).to(device)
    return torch.arange(past, past + t, device=device)


@contextmanager
def followed(handle: ModelHandle) -> Iterator[None]:
    """Let hooks find a batch in `handle.running` in every call of the model, while this lasts.

    Our own passes keep the batch that they bring.
    """
    steps = handle.architecture.decoder.split(".")
    paths = [".".join(steps[:length]) for length in range(len(steps) + 1)]

    def telling(plain: Callable[..., Any]) -> Callable[..., Any]:
        return _telling(handle, plain)

    with forwards([part(handle.model, path) for path in paths], telling):
        yield


def _telling(handle: ModelHandle, plain: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(plain)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if handle.running is not None:
            return plain(*args, **kwargs)
        handle.running = Call.of({**kwargs, **signature.bind_partial(*args).arguments})
        try:
            return plain(*args, **kwargs)
        finally:
            handle.running = None

    return forward


@contextmanager
def forwards(
    modules: Sequence[nn.Module], make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Give modules another forward method, made of their own, while the context lasts."""
    own = [vars(module).get("forward") for module in modules]  # accelerate sets it on the instance
    try:
        for module in modules:
            module.forward = make(module.forward)
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            if before is not None:
                module.forward = before
            elif "forward" in vars(module):
                del module.forward
