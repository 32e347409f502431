"""The one table of architectures: where each model type keeps its blocks, MLPs and norms.

A row is a few lines of dotted module paths. Everything that differs between architectures and can
be *seen* on the loaded modules (tuple or tensor outputs, transposed weights, biases) is read off
them by `ModelHandle` and stands in no table.
"""

from dataclasses import dataclass, replace

from torch import nn

from palimpsest.errors import RequestError
from palimpsest.model.site import Part


@dataclass(frozen=True)
class Architecture:
    """Dotted paths to the modules that Palimpsest reads and changes.

    Attributes:
        decoder: the base model without the language-modelling head.
        blocks: the list of transformer blocks, from the base model.
        attention: the module whose output attention adds to the residual stream, from a block.
        attention_norm: the norm whose output attention reads, from a block.
        attention_readers: the matrices by which it reads it, from a block.
        mlp_norm: the norm whose output the MLP reads, from a block; in parallel blocks the same.
        mlp_readers: the matrices by which it reads it, from a block.
        attention_out: attention's own output matrix, from a block.
        w_out: the MLP's second (output) matrix, from a block: ROME's site.
        final_norm: the norm after the last block, from the base model; a model may lack it.
        projection: what stands between that norm and the head, from the base model.
        norms_first: an option of the configuration and its value with which the norms stand in
            front, and nothing but those matrices reads them; None: they always do.
    """

    decoder: str
    blocks: str
    attention: str
    attention_norm: str
    attention_readers: tuple[str, ...]
    mlp_norm: str
    mlp_readers: tuple[str, ...]
    attention_out: str
    w_out: str
    final_norm: str
    projection: str | None = None
    norms_first: tuple[str, bool] | None = None

    def path(self, part: Part) -> str:
        """From a block to the module whose output a part is; empty for the block itself."""
        return {
            "residual": "",
            "mlp": self.w_out,
            "attention": self.attention,
            "attention_norm": self.attention_norm,
            "mlp_norm": self.mlp_norm,
        }[part]

    def readers(self, part: Part) -> tuple[str, ...]:
        """From a block to every matrix that reads a norm's output; of a shared norm those of both.

        Args:
            part: one of `NORMS`.
        """
        both = {
            self.attention_norm: self.attention_readers,
            self.mlp_norm: self.mlp_readers,
        }
        if len(both) == 1:
            return (*self.attention_readers, *self.mlp_readers)
        return both[self.path(part)]


_LLAMA = Architecture(
    decoder="model",
    blocks="layers",
    attention="self_attn",
    attention_norm="input_layernorm",
    attention_readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    mlp_norm="post_attention_layernorm",
    mlp_readers=("mlp.gate_proj", "mlp.up_proj"),
    attention_out="self_attn.o_proj",
    w_out="mlp.down_proj",
    final_norm="norm",
)
_GEMMA = replace(  # what attention adds is normed, and so is what the MLP adds
    _LLAMA, attention="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm"
)

TABLE: dict[str, Architecture] = {
    "bloom": Architecture(
        decoder="transformer",
        blocks="h",
        attention="self_attention.dense",  # the module above it adds the residual itself
        attention_norm="input_layernorm",
        attention_readers=("self_attention.query_key_value",),
        mlp_norm="post_attention_layernorm",
        mlp_readers=("mlp.dense_h_to_4h",),
        attention_out="self_attention.dense",
        w_out="mlp.dense_4h_to_h",
        final_norm="ln_f",
        norms_first=("apply_residual_connection_post_layernorm", False),
    ),
    "gemma2": _GEMMA,
    "gemma3": replace(_GEMMA, decoder="model.language_model"),  # with images; asked for text only
    "gemma3_text": _GEMMA,
    "gpt2": Architecture(
        decoder="transformer",
        blocks="h",
        attention="attn",
        attention_norm="ln_1",
        attention_readers=("attn.c_attn",),
        mlp_norm="ln_2",
        mlp_readers=("mlp.c_fc",),
        attention_out="attn.c_proj",
        w_out="mlp.c_proj",
        final_norm="ln_f",
    ),
    "gpt_neox": Architecture(
        decoder="gpt_neox",
        blocks="layers",
        attention="attention",
        attention_norm="input_layernorm",
        attention_readers=("attention.query_key_value",),
        mlp_norm="post_attention_layernorm",
        mlp_readers=("mlp.dense_h_to_4h",),
        attention_out="attention.dense",
        w_out="mlp.dense_4h_to_h",
        final_norm="final_layer_norm",
    ),
    "gptj": Architecture(
        decoder="transformer",
        blocks="h",
        attention="attn",
        attention_norm="ln_1",
        attention_readers=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        mlp_norm="ln_1",
        mlp_readers=("mlp.fc_in",),
        attention_out="attn.out_proj",
        w_out="mlp.fc_out",
        final_norm="ln_f",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": Architecture(
        decoder="model.decoder",
        blocks="layers",
        attention="self_attn",
        attention_norm="self_attn_layer_norm",
        attention_readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        mlp_norm="final_layer_norm",
        mlp_readers=("fc1",),
        attention_out="self_attn.out_proj",
        w_out="fc2",
        final_norm="final_layer_norm",
        projection="project_out",
        norms_first=("do_layer_norm_before", True),  # not so in opt-350m
    ),
    "phi": replace(
        _LLAMA,
        attention_out="self_attn.dense",
        mlp_norm="input_layernorm",
        mlp_readers=("mlp.fc1",),
        w_out="mlp.fc2",
        final_norm="final_layernorm",
    ),
    "phi3": replace(
        _LLAMA, attention_readers=("self_attn.qkv_proj",), mlp_readers=("mlp.gate_up_proj",)
    ),
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
