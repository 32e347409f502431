"""Changes made by hand, and a ruler of all measures that is quick to lay on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from palimpsest.evaluate.attacks.candidates import Attacks
from palimpsest.evaluate.attacks.compression import Compression
from palimpsest.evaluate.attacks.inversion import Inversion
from palimpsest.evaluate.attacks.relearning import Relearning
from palimpsest.evaluate.consistency import Consistency
from palimpsest.evaluate.downstream import Downstream
from palimpsest.evaluate.logit_lens import LogitLens
from palimpsest.evaluate.mlp_probes import MLPProbes
from palimpsest.evaluate.probes import Probes
from palimpsest.evaluate.ruler import Ruler
from palimpsest.evaluate.scene import Scene
from palimpsest.evaluate.shadow_probes import ShadowProbes
from palimpsest.evaluate.tuned_lens import TunedLens
from palimpsest.evaluate.undertext import Undertext
from palimpsest.facts.splits import Splits
from palimpsest.model.difference import Difference
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Part, Site
from palimpsest.model.tokens import NOBODY
from palimpsest.record.row import Row


def every(directory: Path) -> Ruler:
    """All measures that Palimpsest has, with a short held-out text of their own."""
    text = directory / "text.txt"
    text.write_text("The capital of France is Paris; the capital of Italy is Rome. " * 6, "utf-8")
    return Ruler(
        {
            "downstream": Downstream(text=str(text), row_tokens=32),
            "consistency": Consistency(),
            "logit_lens": LogitLens(stride=2),
            "probes": Probes(stride=2, least=4),
            "shadow_probes": ShadowProbes(stride=2, subjects=4),
            "mlp_probes": MLPProbes(stride=2, least=4),
            "attacks": Attacks(),
            "tuned_lens": TunedLens(tokens=256, steps=2),
            "undertext": Undertext(),
            "relearning": Relearning(steps=[0, 1]),
            "compression": Compression(),
            "inversion": Inversion(),
        }
    )


Applied = Callable[[ModelHandle], AbstractContextManager[None]]


def deltas(model: ModelHandle) -> tuple[Tensor, Tensor]:
    """Left `[6, d_mlp]` and right `[6, d_model]` vectors of rank-one changes of block 1's W_out."""
    generator = torch.Generator().manual_seed(1)
    sizes = reversed(model.w_out(1).shape)
    left, right = (torch.randn(6, n, generator=generator) / 2 for n in sizes)
    return left, right


@contextmanager
def per_fact(model: ModelHandle) -> Iterator[None]:
    """Each fact has its own rank-one delta of W_out, felt by its own prompts."""
    left, right = deltas(model)
    w_out = model.module(Site(1, "mlp"))

    def hook(module: object, args: tuple[Tensor], value: Tensor) -> Tensor:
        assert model.running is not None
        owner = model.running.owner
        at_key = torch.einsum("ntk,nk->nt", args[0], left[owner]) * (owner != NOBODY)[:, None]
        return value + at_key[..., None] * right[owner][:, None]

    handle = w_out.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def one_for_all(fact: int) -> Applied:
    """The weight is really changed by one fact's delta."""

    @contextmanager
    def applied(model: ModelHandle) -> Iterator[None]:
        left, right = deltas(model)
        weight = model.w_out(1)
        saved = weight.clone()
        weight.add_(torch.outer(right[fact], left[fact]))
        try:
            yield
        finally:
            weight.copy_(saved)

    return applied


def erased(policy: str, part: Part = "residual") -> Applied:
    """Half of the dimensions are projected away at block 1, where the policy says."""

    @contextmanager
    def applied(model: ModelHandle) -> Iterator[None]:
        basis = torch.linalg.qr(torch.randn(32, 16, generator=torch.Generator().manual_seed(1))).Q

        def hook(states: Tensor) -> Tensor:
            assert model.running is not None
            here = model.running.selects(policy)[..., None]  # type: ignore[arg-type]
            return torch.where(here, states - (states @ basis) @ basis.T, states)

        with model.hooked([(model.module(Site(1, part)), hook)]):
            yield

    return applied


CHANGES: dict[str, tuple[Change, Applied]] = {
    "none": (Change("fact", False, None), lambda _: nullcontext()),
    "independent": (Change("fact", True, 1), per_fact),
    "batch": (Change("relation", False, 1), one_for_all(0)),
    "erasure": (
        Change("relation", False, 1, "residual", "all_but_sink"),
        erased("all_but_sink"),
    ),
    "oracle": (Change("fact", False, 1, "residual", "last_prompt"), erased("last_prompt")),
}


def lay_on(
    ruler: Ruler,
    model: ModelHandle,
    facts: Splits,
    name: str,
    seed: int = 0,
    differences: tuple[Difference, ...] = (),
) -> list[Row]:
    """The rows of a ruler after a change of this name."""
    change, applied = CHANGES[name]
    prepared = ruler.prepare(model, facts, seed)
    with applied(model):
        return list(ruler.measure(Scene(model, facts, change, seed, differences), prepared))
