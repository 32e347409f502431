"""The one table of architectures: where each model type keeps its blocks, MLPs and norms.

A row is a few lines of dotted module paths. Everything that differs between architectures and can
be *seen* on the loaded modules (tuple or tensor outputs, transposed weights, biases) is read off
them by `ModelHandle` and stands in no table.
"""

from dataclasses import dataclass, replace

from torch import nn

from palimpsest.errors import RequestError


@dataclass(frozen=True)
class Architecture:
    """Dotted paths to the modules that Palimpsest reads and changes.

    Attributes:
        decoder: the base model without the language-modelling head.
        blocks: the list of transformer blocks, from the base model.
        attention: the module whose output attention adds to the residual stream, from a block.
        w_out: the MLP's second (output) matrix, from a block: ROME's site.
        final_norm: the norm after the last block, from the base model; a model may lack it.
        projection: what stands between that norm and the head, from the base model.
    """

    decoder: str
    blocks: str
    attention: str
    w_out: str
    final_norm: str
    projection: str | None = None


_LLAMA = Architecture(
    decoder="model",
    blocks="layers",
    attention="self_attn",
    w_out="mlp.down_proj",
    final_norm="norm",
)
_GEMMA = replace(_LLAMA, attention="post_attention_layernorm")  # what attention adds is normed

TABLE: dict[str, Architecture] = {
    "bloom": Architecture(
        decoder="transformer",
        blocks="h",
        attention="self_attention.dense",  # the module above it adds the residual itself
        w_out="mlp.dense_4h_to_h",
        final_norm="ln_f",
    ),
    "gemma2": _GEMMA,
    "gemma3": replace(_GEMMA, decoder="model.language_model"),  # with images; asked for text only
    "gemma3_text": _GEMMA,
    "gpt2": Architecture(
        decoder="transformer", blocks="h", attention="attn", w_out="mlp.c_proj", final_norm="ln_f"
    ),
    "gpt_neox": Architecture(
        decoder="gpt_neox",
        blocks="layers",
        attention="attention",
        w_out="mlp.dense_4h_to_h",
        final_norm="final_layer_norm",
    ),
    "gptj": Architecture(
        decoder="transformer", blocks="h", attention="attn", w_out="mlp.fc_out", final_norm="ln_f"
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": Architecture(
        decoder="model.decoder",
        blocks="layers",
        attention="self_attn",
        w_out="fc2",
        final_norm="final_layer_norm",
        projection="project_out",
    ),
    "phi": replace(_LLAMA, w_out="mlp.fc2", final_norm="final_layernorm"),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""By `config.model_type`."""


def architecture_of(model: nn.Module, model_type: str) -> Architecture:
    """The table's row for a loaded model.

    Raises:
        RequestError: no row for this model type; the message lists the modules found.
    """
    if model_type in TABLE:
        return TABLE[model_type]
    raise RequestError(
        f"expected a model of a known architecture ({', '.join(sorted(TABLE))}), found "
        f"model_type {model_type!r} with modules {_modules(model)}; add a row of their paths to "
        "TABLE in palimpsest/model/architecture.py, as docs/extend-architecture.md shows"
    )


def part(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        RequestError: there is none; the message lists the modules found.
    """
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise RequestError(
            f"expected a module {path!r} in {type(root).__name__}, found {_modules(root)}; mend "
            "the row in palimpsest/model/architecture.py"
        ) from error


def _modules(root: nn.Module) -> str:
    """Names and classes of the modules inside, of lists only the first item's."""
    inside = [
        (name, module)
        for name, module in root.named_modules()
        if name and not any(step.isdigit() and step != "0" for step in name.split("."))
    ]
    return ", ".join(f"{name} ({type(module).__name__})" for name, module in inside)
