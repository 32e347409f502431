"""The logit lens: how high the model's own head ranks both objects when it reads a layer."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from palimpsest.errors import check_at_least
from palimpsest.evaluate.attacks.candidates import SAME_TOKEN
from palimpsest.evaluate.probing.readings import NOT_FINITE, at, labelled
from palimpsest.evaluate.scene import Scene
from palimpsest.facts.splits import Splits
from palimpsest.model.forward import logit_lens, token_ranks
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Site
from palimpsest.record.row import Row


@dataclass(frozen=True)
class LogitLens:
    """Ranks of the objects' first tokens at the prompt's last token, layer by layer.

    Attributes:
        stride: every how many layers states are read; the last layer always is.
    """

    version: ClassVar[int] = 1
    along: ClassVar[bool] = False

    stride: int = 3

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            RequestError: it is too small.
        """
        check_at_least("evaluate.logit_lens.stride", self.stride, 1)

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> None:
        """Nothing: ranks are told as they are."""

    def measure(self, scene: Scene, prepared: None) -> Iterator[Row]:
        """Rows `lens_rank_old` and `lens_rank_new`; definitions stand in docs/metrics.md."""
        rows = self._ranks(partial(scene.row("recoverability"), split="target"), scene)
        yield from labelled(rows, scene.change, scene.coinciding)

    def _ranks(self, row: partial[Row], scene: Scene) -> Iterator[Row]:
        model, facts = scene.model, scene.facts.target
        layers = sorted({*range(0, model.n_layers, self.stride), model.n_layers - 1})
        states = scene.features(scene.prompts, [Site(layer) for layer in layers], ["last_prompt"])
        first = first_tokens(scene)
        for layer, found in zip(layers, states[:, 0], strict=True):
            with torch.no_grad():
                scores = logit_lens(model, found).cpu()
            ranks = token_ranks(scores, first)
            whole = scores.isfinite().all(1).tolist()
            each = zip(facts, first.tolist(), ranks.tolist(), whole, strict=True)
            for fact, (old, new), rank, finite in each:
                place = partial(at(row, (layer, "last_prompt")), relation=fact.relation)
                place = partial(place, fact_id=fact.id, prompt_id=fact.prompt.id)
                cause = None if finite else NOT_FINITE
                cause = SAME_TOKEN if old == new else cause
                for metric, value in zip(("lens_rank_old", "lens_rank_new"), rank, strict=True):
                    shown = place(metric=metric, protocol="logit_lens", value=float(value))
                    yield replace(shown, value=None, n=0, note=cause) if cause else shown


def first_tokens(scene: Scene) -> Tensor:
    """`[targets, 2]` first tokens of the old and the new object after the fit prompt."""
    encode = scene.model.encode
    objects = [
        (encode(fact.prompt, fact.true), encode(fact.prompt, fact.new or "-"))
        for fact in scene.facts.target
    ]
    return torch.tensor([[old.ids[old.prompt], new.ids[new.prompt]] for old, new in objects])
