"""`make bench`: what the engine saves against plain versions of the same algorithms.

Every line is a ratio of CPU-seconds taken in one process, after the results were found equal.
Nothing is asserted about time. docs/performance.md holds the figures of one machine.
"""

import argparse
import ctypes
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from palimpsest.evaluate.probing.measuring import POSITIONS
from palimpsest.evaluate.probing.probes import Probe, Reduced, fit, indices, solve
from palimpsest.facts.counterfact import CounterFact
from palimpsest.facts.fact import Fact, Prompt
from palimpsest.facts.splits import split
from palimpsest.facts.world import World
from palimpsest.intervene.changes.deltas import WeightDeltas
from palimpsest.intervene.editors.prefixes import GivenPrefixes, in_contexts
from palimpsest.intervene.editors.rome import Rome
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.intervene.erasers.leace import Leace
from palimpsest.intervene.moments import Second, second_moments
from palimpsest.locate.corruption import noise
from palimpsest.locate.tracing import Tracing
from palimpsest.model.forward import features, keys, score
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.model.site import Change, Part, Site
from palimpsest.model.tokens import Tokens

LAYER = 5
CONTEXTS = 20
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
KINDS: tuple[Part, ...] = ("residual", "mlp", "attention")


def main() -> None:
    """Run every comparison and print its line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counterfact", type=Path, help="its prompts, not the built-in ones")
    parser.add_argument("--threads", type=int, default=2, help="1 where other work is going on")
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{torch.get_num_threads()} threads; CPU-seconds")
    print(f"{'work':<58}{'plain':>9}{'engine':>9}{'ratio':>8}{'error':>11}", flush=True)
    for name, part in PARTS.items():
        if options.only in (None, name):
            part(options.counterfact)


def engine(_: Path | None) -> None:
    """One edit, second moments and a trace of a random model of GPT-2-small's size."""
    handle = gpt2_small()
    print("random GPT-2-small, float32")
    with kept_moments(spd(handle)) as given:
        memory(handle, "with C and C over half of the text", rome(given))
    memory(handle, "without C", rome())
    found = value_search(handle)
    line("v* of one ROME edit, layer 5, 22 prompts, 20 evaluations", *found)
    share(found[1], {torch.float32: value_flops(handle)})
    found = moments(handle, False)
    line("second moments of 12 layers, 4,096 tokens, whole passes", *found)
    share(found[1], moment_flops(handle))
    line("the same, each pass stopped at its layer", *moments(handle, True))
    line("tracing a fact, 10 tokens, 12 layers, 3 kinds, 3 samples", *tracing(handle))


def smollm2(counterfact: Path | None) -> None:
    """Erasers, probes and independent edits of SmolLM2."""
    handle = Pretrained(prefix="\n").load()
    probed = all_layers(handle)
    line("linear probes, 60 places of 1,000 states, 8 classes, C 0.01", *probed.against([0.01]))
    line("the same, C 0.0001, 0.001, 0.01 and 0.1", *probed.against(STRENGTHS))
    rows = fact_rows(handle, counterfact)
    source = "the built-in facts'" if counterfact is None else "CounterFact's"
    print(f"SmolLM2, 64 independent edits, {len(rows)} rows of {source} prompts")
    for size in (1, 8, 64):
        line(f"64 independent edits, {size} a batch", *independent_edits(handle, rows, size))


def probes(_: Path | None) -> None:
    """Linear probes of states drawn at random, as a run and a large relation have them."""
    for n in (320, 1000):
        probed = drawn(places=60, n=n, width=576, classes=8)
        line(f"linear probes, 60 places, {n} states, 8 classes, 4 C", *probed.against(STRENGTHS))
        for c in STRENGTHS:
            line(f"  their solver alone, C {c:g}", *probed.solver(c))


PARTS = {"engine": engine, "smollm2": smollm2, "probes": probes}


def line(work: str, plain: float, engine: float, error: float) -> None:
    """Print one comparison."""
    print(f"{work:<58}{plain:>9.2f}{engine:>9.2f}{plain / engine:>7.1f}x{error:>11.1e}", flush=True)


def share(seconds: float, counted: Mapping[torch.dtype, float]) -> None:
    """Print what share of the engine's time the arithmetic of docs/performance.md explains.

    The rest is what is not counted: attention's scores, norms, memory, Python. Each precision's
    FLOPs are taken at the rate of a large matrix product in this process.
    """
    explained = sum(flops / product_rate(dtype) for dtype, flops in counted.items())
    total = sum(counted.values())
    print(
        f"    by the cost model {total / 1e9:.0f} GFLOP, as matrix products {explained:.1f} s: "
        f"{explained / seconds:.0%} of the engine's time",
        flush=True,
    )


def product_rate(dtype: torch.dtype) -> float:
    """FLOPs in a CPU-second of a matrix product of 1,024 × 1,024 × 4,096."""
    one, other = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 4096, dtype=dtype)
    one @ other
    _, seconds = cpu_seconds(lambda: torch.stack([one @ other for _ in range(10)]))
    return 10 * 2 * 1024 * 1024 * 4096 / seconds


def block_weights(handle: ModelHandle) -> int:
    """p of docs/performance.md: a block's weights."""
    width, inner = handle.w_out(0).shape
    return 4 * width**2 + 2 * width * inner


def cpu_seconds(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """A function's result, and the CPU time of all threads that it took."""
    started = time.process_time()
    result = function()
    return result, time.process_time() - started


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, refused above 1e-5."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not error < 1e-5:
        raise SystemExit(f"results differ by {error:.1e}: no ratio is worth reporting")
    return error


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Let nothing be found that an earlier run has kept."""
    before = os.environ.get("PALIMPSEST_CACHE")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["PALIMPSEST_CACHE"] = directory
        try:
            yield
        finally:
            del os.environ["PALIMPSEST_CACHE"]
            if before is not None:
                os.environ["PALIMPSEST_CACHE"] = before


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = [f"w{i}" for i in range(50_257)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def gpt2_small() -> ModelHandle:
    """A random model of GPT-2-small's size."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(initializer_range=0.05))
    return ModelHandle(model, tokenizer(), "gpt2-small", "w1 ")


def text(rng: random.Random, words: int) -> str:
    """Random words."""
    return " ".join(f"w{rng.randrange(2, 50_000)}" for _ in range(words))


def some_fact(rng: random.Random, number: int) -> Fact:
    """A made-up fact: 3 tokens, a subject of 3, 4 more, an object of one."""
    template = f"{text(rng, 3)} {{}} {text(rng, 4)}"
    subject = text(rng, 3)
    prompt = Prompt.fill("fit", template, subject)
    return Fact(str(number), "r", subject, prompt, text(rng, 1), text(rng, 1))


# -- v* --------------------------------------------------------------------------------------------


def value_search(handle: ModelHandle) -> tuple[float, float, float]:
    """One fact's v*: the whole model with logits everywhere, against the engine."""
    fact, contexts, search = searched()
    plain, slow = cpu_seconds(lambda: plain_search(handle, fact, contexts, search))
    site = Site(LAYER, "mlp")
    engine, fast = cpu_seconds(lambda: search.optimise(handle, [fact], site, contexts)["delta"][0])
    return slow, fast, relative(engine, plain)


def searched() -> tuple[Fact, tuple[str, ...], ValueSearch]:
    """The fact, its contexts and the search."""
    rng = random.Random(0)
    fact = some_fact(rng, 0)
    contexts = tuple(text(rng, 5 if i % 2 else 10) for i in range(CONTEXTS))
    return fact, contexts, ValueSearch(stop_below=0.0)


def value_flops(handle: ModelHandle) -> float:
    """FLOPs of the search by the cost model: prefixes once, E evaluations forward and backward."""
    fact, contexts, search = searched()
    rows = [handle.encode(prompt) for prompt in in_contexts(fact, contexts)]
    above = [len(row.ids) - row.at("last_subject") for row in rows]
    weights, size = block_weights(handle), handle.model.config.vocab_size
    before = 2 * sum(len(row.ids) for row in rows) * handle.n_layers * weights
    blocks = 4 * (handle.n_layers - LAYER) * weights * (sum(above) + 1)
    heads = 4 * handle.width * size * (len(rows) + 1)
    return float(before + search.steps * (blocks + heads))


def plain_search(
    handle: ModelHandle, fact: Fact, contexts: Sequence[str], search: ValueSearch
) -> Tensor:
    """δ by Adam over full padded forward passes of all 22 prompts, logits at every token."""
    rows = [handle.encode(p, fact.new or "") for p in in_contexts(fact, tuple(contexts))]
    essence = handle.encode(Prompt.fill("essence", "{} is a", fact.subject))
    everything = [*rows, essence]
    width = max(len(row.ids) for row in everything)
    ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in everything])
    places = torch.tensor([row.at("last_subject") for row in everything])
    last = torch.tensor([row.prompt - 1 for row in rows])
    token = torch.tensor([row.ids[row.prompt] for row in rows])
    w_out = handle.module(Site(LAYER, "mlp"))
    start = keys(handle, rows[:1], LAYER)[1][0]
    delta = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=search.lr)

    def add(module: nn.Module, args: object, output: Tensor) -> Tensor:
        here = torch.zeros(output.shape[:2])
        here[torch.arange(len(ids)), places] = 1.0
        return output + here[:, :, None] * delta

    reference: Tensor | None = None
    hook = w_out.register_forward_hook(add)
    try:
        for step in range(search.steps):
            adam.zero_grad()
            logprobs = handle.model(ids, use_cache=False).logits.log_softmax(-1)
            now = logprobs[-1, places[-1]]
            reference = now.detach() if reference is None else reference
            nll = -logprobs[torch.arange(len(rows)), last, token].mean()
            kl = (now.exp() * (now - reference)).sum()
            decay = delta.norm() / start.norm() ** 2
            loss = nll + search.kl * kl + search.weight_decay * decay
            if step == search.steps - 1:
                break
            loss.backward()
            adam.step()
            with torch.no_grad():
                delta.mul_((search.clamp * start.norm() / delta.norm()).clamp(max=1.0))
    finally:
        hook.remove()
    return delta.detach()


# -- second moments --------------------------------------------------------------------------------


def moments(handle: ModelHandle, stopped: bool) -> tuple[float, float, float]:
    """C of all layers: a pass a layer, whole or stopped at the layer, against one pass."""
    ids = torch.randint(2, 50_000, (32, 128), generator=torch.Generator().manual_seed(0))
    layers = list(range(handle.n_layers))

    def plain() -> Tensor:
        each = [second_moments_of_one(handle, layer, ids, stopped) for layer in layers]
        return torch.stack(each)

    def engine() -> Tensor:
        found = second_moments(handle, layers, ids, sink=False)
        return torch.stack([found[layer] for layer in layers])

    expected, slow = cpu_seconds(plain)
    found, fast = cpu_seconds(engine)
    return slow, fast, relative(found, expected)


def moment_flops(handle: ModelHandle) -> dict[torch.dtype, float]:
    """FLOPs of one pass over the text, and of the products in double precision."""
    tokens, inner = 32 * 128, handle.w_out(0).shape[1]
    layers = handle.n_layers
    return {
        torch.float32: 2.0 * tokens * layers * block_weights(handle),
        torch.float64: 2.0 * tokens * layers * inner**2 * 9 / 16,
    }


@torch.no_grad()
def second_moments_of_one(handle: ModelHandle, layer: int, ids: Tensor, stopped: bool) -> Tensor:
    """C of one layer from its own passes; ROME's public code stops them at the layer."""
    total = torch.zeros(handle.w_out(layer).shape[1], handle.w_out(layer).shape[1]).double()

    def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        flat = args[0][:, 1:].flatten(0, 1).double()
        total.add_(flat.T @ flat)
        if stopped:
            raise StopIteration

    hook = handle.module(Site(layer, "mlp")).register_forward_hook(add)
    try:
        for rows in ids.split(16):
            with suppress(StopIteration):
                handle.model.transformer(rows, use_cache=False)
    finally:
        hook.remove()
    return total / (ids.shape[0] * (ids.shape[1] - 1))


# -- memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeptMoments:
    """One layer's second moments in a file, as the cache keeps them."""

    path: Path

    def several(self, model: ModelHandle, layers: Sequence[int]) -> dict[int, Second]:
        """Read anew each time."""
        return {LAYER: Second(self._read, self._read)}

    def _read(self) -> Tensor:
        return safetensors.torch.load_file(self.path)["moments"]


@contextmanager
def kept_moments(matrix: Tensor) -> Iterator[KeptMoments]:
    """The matrix in a file; in memory it is gone."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "moments.safetensors"
        safetensors.torch.save_file({"moments": matrix}, path)
        del matrix
        yield KeptMoments(path)


def rome(moments: KeptMoments | None = None) -> Rome:
    """ROME with 20 contexts, plain if there are no second moments."""
    rng = random.Random(1)
    contexts = [text(rng, 5 if i % 2 else 10) for i in range(CONTEXTS)]
    prefixes = GivenPrefixes(contexts)
    if moments is None:
        return Rome(variant="plain", prefixes=prefixes)
    return Rome(prefixes=prefixes, moments=moments)


def spd(handle: ModelHandle) -> Tensor:
    """A positive definite matrix of C's size, float64."""
    width = handle.w_out(LAYER).shape[1]
    root = torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double()
    return root @ root.T / width + torch.eye(width, dtype=torch.float64)


def memory(handle: ModelHandle, name: str, method: Rome) -> None:
    """What one ROME edit needs above the model, one row a batch; C is read from its file."""
    rng = random.Random(0)
    fact = some_fact(rng, 0)
    size = sum(p.numel() * p.element_size() for p in handle.model.parameters())
    handle.batch_size, before = 1, handle.batch_size
    held = peak_memory(restart=True)
    editing = method.begin(handle, Site(LAYER, "mlp"))
    with fresh_cache():
        editing.edit(handle, (fact,), independent=True)
    above = peak_memory() - held
    handle.batch_size = before
    print(
        f"peak memory of one ROME edit above the model's {size / 2**20:.0f} MiB, 1 a batch, "
        f"{name}: {above / 2**20:.0f} MiB, {above / size:.0%}",
        flush=True,
    )


def peak_memory(restart: bool = False) -> int:
    """Most memory resident so far (bytes), from now on if restarted; Linux alone keeps it."""
    if restart:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# -- tracing ---------------------------------------------------------------------------------------


def tracing(handle: ModelHandle) -> tuple[float, float, float]:
    """One fact's restored probabilities: a whole pass for every state, against resumed ones."""
    row = handle.encode(Prompt.fill("fit", "{} " + text(random.Random(2), 7), "w5 w6 w7"), "w9")
    row = replace(row, subject=(1, 3))
    how = Tracing(samples=3, stride=1, window=4, level=1.0)
    shifts = noise(handle, row, 1.0, how.samples, 0)

    def engine() -> Tensor:
        found = how.compute(handle, [row], [shifts])
        return (
            torch.stack([found[f"0/{kind}"] for kind in how.kinds]) + found["0/chances"][1:].mean()
        )

    expected, slow = cpu_seconds(lambda: plain_tracing(handle, row, shifts, how))
    found, fast = cpu_seconds(engine)
    return slow, fast, relative(found, expected)


@torch.no_grad()
def plain_tracing(
    handle: ModelHandle, row: Tokens, shifts: Sequence[Tensor], how: Tracing
) -> Tensor:
    """p(restored) `[kinds, tokens, layers]`: clean and noised rows run whole, one state restored.

    As in ROME's public code each pass holds a clean row from which the state is taken.
    """
    ids = torch.tensor([row.ids[: row.prompt]]).expand(1 + len(shifts), -1)
    assert row.subject is not None
    first, last = row.subject
    blocks, half = range(handle.n_layers), how.window // 2

    def corrupt(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return torch.cat(
            [
                output[:1],
                *(output[:1].index_add(1, torch.arange(first, last + 1), s[None]) for s in shifts),
            ]
        )

    def put_back(place: int) -> Callable[[Tensor], Tensor]:
        def change(output: Tensor) -> Tensor:
            changed = output.clone()
            changed[1:, place] = output[0, place]
            return changed

        return change

    def chance(place: int, kind: Part, layers: Sequence[int]) -> float:
        hooks = [(handle.module(Site(layer, kind)), put_back(place)) for layer in layers]
        with handle.hooked(hooks):
            logits = handle.model(ids, use_cache=False).logits
        return float(logits[1:, -1].softmax(-1)[:, row.ids[row.prompt]].mean())

    embedding = handle.model.get_input_embeddings().register_forward_hook(corrupt)
    try:
        return torch.tensor(
            [
                [
                    [
                        chance(place, kind, [layer] if kind == "residual" else
                               [n for n in blocks if -half <= n - layer < half])
                        for layer in blocks
                    ]
                    for place in range(first, row.prompt)
                ]
                for kind in KINDS
            ]
        )  # fmt: skip
    finally:
        embedding.remove()


# -- probes and erasers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Probed:
    """States `[places, n, width]` and their objects, and others that are only predicted."""

    states: Tensor
    labels: list[str]
    fresh: Tensor

    def against(self, strengths: Sequence[float]) -> tuple[float, float, float]:
        """scikit-learn's pipeline in a loop against all places at once.

        The error is the largest difference between probabilities of the other states; objects are
        the same but where two are about equally likely.
        """

        def plain() -> Tensor:
            return torch.stack([self.loop(c) for c in strengths])

        def engine() -> Tensor:
            reduced = Reduced.of(self.states)
            found = [fit(reduced, self.labels, c) for c in strengths]
            return torch.stack([self.chances(probes) for probes in found])

        expected, slow = cpu_seconds(plain)
        found, fast = cpu_seconds(engine)
        error = float((found - expected).abs().max())
        tied = expected.topk(2).values.diff().abs()[..., 0] < 1e-3
        same = (found.argmax(-1) == expected.argmax(-1)) | tied
        if not error < 1e-3 or not bool(same.all()):
            raise SystemExit(f"probabilities differ by {error:.1e}: no ratio is worth reporting")
        return slow, fast, error

    def loop(self, c: float) -> Tensor:
        """Each place's probabilities by scikit-learn."""
        places = []
        pairs = zip(self.states.double().numpy(), self.fresh.double().numpy(), strict=True)
        for states, fresh in pairs:
            pipeline = make_pipeline(StandardScaler(), regression(c)).fit(states, self.labels)
            places.append(torch.from_numpy(pipeline.predict_proba(fresh)))
        return torch.stack(places)

    def chances(self, probes: Sequence[Probe]) -> Tensor:
        """Each place's probabilities by its probe."""
        pairs = zip(probes, self.fresh, strict=True)
        return torch.stack([probe.scores(states).softmax(1) for probe, states in pairs])

    def solver(self, c: float) -> tuple[float, float, float]:
        """scikit-learn in a loop over states that are reduced already, against our solver.

        The error is the largest relative difference between a place's coefficients.
        """
        features = Reduced.of(self.states).features
        classes = sorted(set(self.labels))
        targets = indices(self.labels, classes)

        def plain() -> Tensor:
            fits = [regression(c).fit(x, targets.numpy()) for x in features.numpy()]
            return torch.stack([torch.from_numpy(each.coef_) for each in fits])

        expected, slow = cpu_seconds(plain)
        found, fast = cpu_seconds(lambda: solve(features, targets, len(classes), c)[0])
        errors = (found - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
        error = float(errors.max())
        if not error < 1e-4:
            raise SystemExit(f"coefficients differ by {error:.1e}: no ratio is worth reporting")
        return slow, fast, error


def regression(c: float) -> LogisticRegression:
    """scikit-learn's, of which our probes have the objective, to a like precision."""
    return LogisticRegression(C=c, max_iter=9999, tol=1e-6)


def drawn(places: int, n: int, width: int, classes: int) -> Probed:
    """States with a few strong directions, units of unequal scale, and classes that overlap.

    Noise has singular values that fall as a power of their number; the classes' means grow from
    place to place, from hardly there to plain.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    which = torch.arange(n + 400) % classes
    spectrum = torch.arange(1.0, width + 1) ** -0.7
    states = []
    for place in range(places):
        noise = (normal(len(which), width) * spectrum) @ torch.linalg.qr(normal(width, width)).Q
        means = normal(classes, width) * spectrum.mean() * (0.02 + 0.3 * place / places)
        states.append((noise + means[which]) * normal(width).exp() + normal(width))
    whole = torch.stack(states)
    return Probed(whole[:, :n], [f"object {i}" for i in which[:n].tolist()], whole[:, n:])


def all_layers(handle: ModelHandle) -> Probed:
    """Print LEACE at every layer, its own feature pass included, over the feature pass alone.

    Returns:
        the first 1,000 facts' states at all layers and both positions.
    """
    plan = replace(World(), limit=24, fit=1128, test=64, probe=0, dev=0, others=0)
    facts = split(plan.load(), plan, 0, lambda some: [True] * len(some))
    sample = [*facts.target, *facts.fit]
    rows = [handle.encode(fact.prompt) for fact in sample]
    sites = [Site(layer) for layer in range(handle.n_layers)]
    features(handle, rows[:64], sites, POSITIONS)
    states, alone = cpu_seconds(lambda: features(handle, rows, sites, POSITIONS))

    def fitted() -> Tensor:
        with fresh_cache():
            erasers = Leace(all_layers=True).fit(handle, facts, sites[-1])
        return torch.tensor(len(erasers.diagnostics))

    _, whole = cpu_seconds(fitted)
    print(
        f"LEACE at all {handle.n_layers} layers of SmolLM2, {len(rows)} prompts: feature pass "
        f"{alone:.1f} s, whole fit {whole:.1f} s, {whole / alone:.2f} times the pass",
        flush=True,
    )
    places = states.flatten(0, 1)
    labels = [fact.true for fact in sample[:1000]]
    return Probed(places[:, :1000], labels, places[:, 1000:])


# -- independent edits -----------------------------------------------------------------------------


def fact_rows(handle: ModelHandle, counterfact: Path | None) -> list[Tokens]:
    """Prompts of 64 facts with both objects: the fit prompt, paraphrases, at most 10 neighbors."""
    data = World() if counterfact is None else CounterFact(path=str(counterfact))
    plan = replace(data, limit=64, test=64, fit=0, probe=0, dev=0, others=0)
    facts = split(plan.load(), plan, 0, lambda some: [True] * len(some))
    return [
        handle.encode(prompt, completion, owner)
        for owner, fact in enumerate(facts.target)
        for prompt in (fact.prompt, *fact.paraphrases, *fact.neighbors)
        for completion in (fact.true, fact.new or "")
    ]


def independent_edits(
    handle: ModelHandle, rows: Sequence[Tokens], size: int
) -> tuple[float, float, float]:
    """Probabilities under 64 edits: weight changed and restored 64 times, against one pass."""
    generator = torch.Generator().manual_seed(2)
    weight = handle.w_out(LAYER)
    left = torch.randn(64, 1, weight.shape[1], generator=generator) / weight.shape[1]
    right = torch.randn(64, 1, weight.shape[0], generator=generator)
    model = handle.fingerprint
    handle.batch_size = size

    def edits(independent: bool, which: slice) -> WeightDeltas:
        change = Change("fact", independent, LAYER)
        return WeightDeltas(change=change, model=model, left=left[which], right=right[which])

    def chances(some: Sequence[Tokens]) -> list[float]:
        return [math.exp(found.logprob) for found in score(handle, some)]

    def plain() -> Tensor:
        found: list[float] = []
        for owner in range(64):
            with edits(False, slice(owner, owner + 1)).applied(handle):
                found += chances([row for row in rows if row.owner == owner])
        return torch.tensor(found)

    def engine() -> Tensor:
        with edits(True, slice(None)).applied(handle):
            return torch.tensor(chances(rows))

    expected, slow = cpu_seconds(plain)
    found, fast = cpu_seconds(engine)
    error = float((found - expected).abs().max())
    if not error < 1e-5:
        raise SystemExit(f"probabilities differ by {error:.1e}: no ratio is worth reporting")
    return slow, fast, error


if __name__ == "__main__":
    main()
