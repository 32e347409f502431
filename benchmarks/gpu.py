"""`make bench-gpu`: seconds per edit of ROME and per traced fact, GPT-2 XL's and GPT-J's size.

64 facts, 22 prompts of at most 21 tokens each, 20 evaluations of the loss, bfloat16: what
docs/performance.md states for one card. `--layers` makes the models smaller, to try it anywhere.
"""

import argparse
import random
import time
from dataclasses import replace

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM, PreTrainedModel

from benchmarks.bench import fresh_cache, some_fact, text, tokenizer
from palimpsest.facts.fact import Prompt
from palimpsest.intervene.editors.prefixes import GivenPrefixes
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.locate.corruption import noise
from palimpsest.locate.tracing import Tracing
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import compile_blocks
from palimpsest.model.memory import default_rows
from palimpsest.model.site import Site

FACTS = 64
CONTEXTS = 20


def main() -> None:
    """Time both sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--facts", type=int, default=FACTS)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    for size, layer in (("gpt2-xl", 17), ("gpt-j", 5)):
        handle = random_model(size, device, options.layers)
        if options.compile:
            compile_blocks(handle)
        print(f"fingerprint {handle.fingerprint[:12]}", flush=True)  # hashed once, not in an edit
        layer = min(layer, handle.n_layers - 2)
        seconds(handle, layer, 2)  # kernels are chosen, memory is claimed
        spent, peak = seconds(handle, layer, options.facts)
        print(
            f"{name}, {size}, layer {layer}, bfloat16: {spent / options.facts:.3f} s per edit, "
            f"{options.facts} facts, peak {peak / 2**30:.1f} GiB, {handle.batch_size} rows a batch",
            flush=True,
        )
        if size == "gpt-j":
            tracing_seconds(handle, 1)
            spent = tracing_seconds(handle, options.facts // 8 or 1)
            print(f"{name}, {size}, bfloat16: {spent:.3f} s per traced fact", flush=True)
        del handle


def random_model(size: str, device: torch.device, layers: int | None) -> ModelHandle:
    """A model of that size with random weights, made where it runs."""
    torch.manual_seed(0)
    model: PreTrainedModel
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        if size == "gpt2-xl":
            shape = {"n_layer": layers or 48, "n_head": 25, "n_embd": 1600}
            model = GPT2LMHeadModel(GPT2Config(**shape))
        else:
            model = GPTJForCausalLM(GPTJConfig(n_layer=layers or 28))
        torch.set_default_dtype(torch.float32)
    return ModelHandle(model, tokenizer(), size, "w1 ", default_rows(device))


def tracing_seconds(handle: ModelHandle, facts: int) -> float:
    """Wall-clock seconds a fact of tracing 10 tokens at every block, 3 kinds, 10 samples."""
    rng = random.Random(facts)
    rows = [
        replace(
            handle.encode(Prompt.fill("fit", f"{{}} {text(rng, 9)}", "w5"), "w9"), subject=(1, 2)
        )
        for _ in range(facts)
    ]
    how = Tracing(samples=10, stride=1, level=1.0)
    shifts = [noise(handle, row, 1.0, how.samples, 0) for row in rows]
    started = time.perf_counter()
    for row, shift in zip(rows, shifts, strict=True):
        how.compute(handle, [row], [shift])  # probabilities come back to the CPU: all has run
    return (time.perf_counter() - started) / facts


def seconds(handle: ModelHandle, layer: int, facts: int) -> tuple[float, int]:
    """Wall-clock seconds of fitting so many facts with ROME, and the peak of the card's memory."""
    rng = random.Random(facts)
    some = tuple(some_fact(rng, number) for number in range(facts))
    contexts = [text(rng, 5 if i % 2 else 10) for i in range(CONTEXTS)]
    method = Rome(
        variant="plain", prefixes=GivenPrefixes(contexts), search=ValueSearch(stop_below=0.0)
    )
    editing = method.begin(handle, Site(layer, "mlp"))
    cuda = handle.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    with fresh_cache():
        editing.edit(handle, some, independent=True)
    if cuda:
        torch.cuda.synchronize()
    spent = time.perf_counter() - started
    return spent, torch.cuda.max_memory_allocated() if cuda else 0


if __name__ == "__main__":
    main()
