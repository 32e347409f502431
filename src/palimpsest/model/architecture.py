"""The one table of architectures: where each model type keeps its blocks, MLPs and norms.

A row is a few lines of dotted module paths. Everything that differs between architectures and can
be *seen* on the loaded modules (tuple or tensor outputs, transposed weights, biases) is read off
them by `ModelHandle` and stands in no table.
"""

from dataclasses import dataclass

from torch import nn

from palimpsest.errors import RequestError


@dataclass(frozen=True)
class Architecture:
    """Dotted paths to the modules that Palimpsest reads and changes.

    Attributes:
        decoder: the base model without the language-modelling head.
        blocks: the list of transformer blocks, from the base model.
        attention: the attention module, from a block.
        w_out: the MLP's second (output) matrix, from a block: ROME's site.
        final_norm: the norm before the head, from the base model.
    """

    decoder: str
    blocks: str
    attention: str
    w_out: str
    final_norm: str


TABLE: dict[str, Architecture] = {
    "gpt2": Architecture(
        decoder="transformer", blocks="h", attention="attn", w_out="mlp.c_proj", final_norm="ln_f"
    ),
    "llama": Architecture(
        decoder="model",
        blocks="layers",
        attention="self_attn",
        w_out="mlp.down_proj",
        final_norm="norm",
    ),
}
"""By `config.model_type`."""


def architecture_of(model: nn.Module, model_type: str) -> Architecture:
    """The table's row for a loaded model.

    Raises:
        RequestError: no row for this model type; the message lists the modules found.
    """
    if model_type in TABLE:
        return TABLE[model_type]
    found = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children())
    raise RequestError(
        f"expected a model of a known architecture ({', '.join(sorted(TABLE))}), found "
        f"model_type {model_type!r} with modules {found}; add a row to model/architecture.py"
    )
