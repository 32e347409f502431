"""Second moments that one question can wait for: over less text than a run takes."""

from dataclasses import dataclass, replace
from typing import Any

from palimpsest.intervene.moments import Moments
from palimpsest.model.handle import ModelHandle
from palimpsest.model.sample import start_ids
from palimpsest.model.site import Site

WIDTHS, USUAL = 1.5, 10
"""Tokens of text in multiples of d_mlp, here and in a run; C needs more than one for its rank."""

ROW = 36
"""Sampled tokens in a row, about as many as prompts have: many short rows take less than few."""


@dataclass(frozen=True)
class Sampled:
    """Second moments over text sampled from the model, which a method is to be fitted with.

    Attributes:
        name: the method's.
        key: of the configuration, that sets how many tokens there are.
        tokens: how many there are.
        usual: how many a run takes.
        cached: there is nothing to wait for.
    """

    name: str
    key: str
    tokens: int
    usual: int
    cached: bool


def shortened(method: Any, model: ModelHandle) -> Any:
    """The method with second moments over little text, itself if it takes none."""
    if hasattr(method, "base"):
        return replace(method, base=shortened(method.base, model))
    if not isinstance(getattr(method, "moments", None), Moments):
        return method
    tokens = round(WIDTHS * model.w_out(0).shape[1])
    length = len(start_ids(model)) + ROW
    return replace(method, moments=replace(method.moments, tokens=tokens, length=length))


def sampled(name: str, method: Any, model: ModelHandle, site: Site) -> Sampled | None:
    """What a method's second moments are; None if it takes none, or others than sampled ones."""
    editor = getattr(method, "base", method)
    moments = getattr(editor, "moments", None)
    if not isinstance(moments, Moments) or moments.text is not None:
        return None
    layers = editor.moment_layers(site)
    if not layers:
        return None
    usual = USUAL * model.w_out(0).shape[1]
    key = f"intervene.{'' if editor is method else 'base.'}moments.tokens"
    tokens = usual if moments.tokens is None else moments.tokens
    return Sampled(name, key, tokens, usual, moments.cached(model, layers))
