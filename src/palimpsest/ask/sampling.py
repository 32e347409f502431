"""Second moments that one question can wait for: over less text than a run takes."""

from palimpsest.intervene.intervention import Method
from palimpsest.model.handle import ModelHandle
from palimpsest.model.sample import start_ids

WIDTHS = 1.5
"""Tokens of text in multiples of d_mlp; C needs more than one for its rank, and a run takes ten."""

ROW = 36
"""Sampled tokens in a row, about as many as prompts have: many short rows take less than few."""


def shortened(method: Method, model: ModelHandle) -> Method:
    """The method with second moments over little text, itself if it takes none."""
    tokens = round(WIDTHS * model.w_out(0).shape[1])
    return method.with_moments(tokens, len(start_ids(model)) + ROW)
