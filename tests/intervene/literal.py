"""What the plain versions share: one text at a time, whole forward passes, no thought of speed.

Written from the descriptions of the methods. Of `palimpsest` only the handle's model, tokenizer and
prefix are used, and a search's hyper-parameters: every prompt is a forward pass of its own over all
layers and all tokens, with logits everywhere; nothing is cached, nothing padded, nothing shared
between facts.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor, nn

from palimpsest.facts.fact import Fact
from palimpsest.intervene.editors.finetune import FineTune
from palimpsest.intervene.editors.values import ValueSearch
from palimpsest.model.corruption import draw
from palimpsest.model.handle import ModelHandle

# -- texts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A text's tokens, and the first and last of its subject's."""

    ids: list[int]
    subject_first: int
    subject_last: int


def tokenized(handle: ModelHandle, text: str, subject: str) -> Row:
    text = handle.prefix + text
    encoding = handle.tokenizer(text, add_special_tokens=False)
    first = text.rindex(subject)
    ends = (encoding.char_to_token(at) for at in (first, first + len(subject) - 1))
    return Row(list(encoding["input_ids"]), *ends)


def prompts(handle: ModelHandle, fact: Fact, contexts: Sequence[str]) -> list[Row]:
    """The bare prompt, then the prompt after each context."""
    texts = [fact.prompt.text] + [f"{context}. {fact.prompt.text}" for context in contexts]
    return [tokenized(handle, text, fact.subject) for text in texts]


def token_ids(handle: ModelHandle, text: str) -> list[int]:
    return list(handle.tokenizer(text, add_special_tokens=False)["input_ids"])


# -- the model -------------------------------------------------------------------------------------


def logprobs(handle: ModelHandle, ids: list[int]) -> Tensor:
    """`[t, vocabulary]` of one text, by the whole model."""
    return handle.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def block(handle: ModelHandle, layer: int) -> nn.Module:
    if handle.model.config.model_type == "gpt2":
        return handle.model.transformer.h[layer]
    return handle.model.model.layers[layer]


def w_out(handle: ModelHandle, layer: int) -> nn.Module:
    mlp = block(handle, layer).mlp
    return mlp.c_proj if handle.model.config.model_type == "gpt2" else mlp.down_proj


def affine(module: nn.Module) -> tuple[Tensor, Tensor]:
    """W `[out, in]` and b: GPT-2 keeps W transposed, Llama has no b."""
    if isinstance(module, nn.Linear):
        return module.weight.data, torch.zeros(module.weight.shape[0])
    return module.weight.data.T, module.bias.data


def change_weight(handle: ModelHandle, layer: int, change: Tensor) -> None:
    """Add ΔW for good."""
    weight, _ = affine(w_out(handle, layer))
    weight += change.to(weight.dtype)


@torch.no_grad()
def taken(handle: ModelHandle, row: Row, module: nn.Module) -> tuple[Tensor, Tensor]:
    """What a module takes and gives at the subject's last token."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(
        lambda module, args, output: seen.append((args[0][0], _first(output)[0]))
    )
    try:
        logprobs(handle, row.ids)
    finally:
        hook.remove()
    inputs, outputs = seen[0]
    return inputs[row.subject_last], outputs[row.subject_last]


@contextmanager
def added(module: nn.Module, addend: Tensor, first: int) -> Iterator[None]:
    """Add the rows of `[n, width]` to a module's output at n tokens from `first` on."""

    def add(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        states = _first(output)
        before, here, after = states.split(
            [first, len(addend), states.shape[1] - first - len(addend)], 1
        )
        changed = torch.cat([before, here + addend, after], 1)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    hook = module.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def _first(output: Tensor | tuple) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def noised(handle: ModelHandle, row: Row, noise: Tensor | None) -> Iterator[None]:
    """Add `[subject tokens, d_model]` to the embeddings of the subject."""
    with ExitStack() as stack:
        if noise is not None:
            table = handle.model.get_input_embeddings()
            stack.enter_context(added(table, noise, row.subject_first))
        yield


def noises(
    handle: ModelHandle, facts: Sequence[Fact], method: ValueSearch | FineTune
) -> list[Tensor]:
    """Each fact's noise `[subject tokens, d_model]`, its scale by the input embeddings."""
    rows = [handle.encode(fact.prompt, owner=i) for i, fact in enumerate(facts)]
    table = handle.model.get_input_embeddings().weight
    drawn = draw(handle, rows, method.noise * float(table.std()), method.seed)
    return [drawn[i, -(row.subject[1] - row.subject[0] + 1) :] for i, row in enumerate(rows)]


@torch.no_grad()
def said(handle: ModelHandle, row: Row, tokens: int, noise: Tensor | None) -> list[int]:
    """The likeliest continuation, token by token."""
    ids = list(row.ids)
    for _ in range(tokens):
        with noised(handle, row, noise):
            ids.append(int(logprobs(handle, ids)[-1].argmax()))
    return ids[len(row.ids) :]


def words(handle: ModelHandle, text: str, count: int) -> str:
    """The likeliest words after a text, each of one token."""
    said = ""
    for _ in range(count):
        ids = token_ids(handle, handle.prefix + text + said)
        with torch.no_grad():
            order = logprobs(handle, ids)[-1].argsort(descending=True).tolist()
        likely = (handle.decode([token]) for token in order)
        said += next(word for word in likely if word[:1] == " " and word[1:].isalpha())
    return said.strip()


def known(handle: ModelHandle, facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts with true objects that the model finds likely, of one word, two, one and so on."""
    lengths = zip(facts, cycle((1, 2)), strict=False)
    return tuple(replace(f, true=words(handle, f.prompt.text, count)) for f, count in lengths)


# -- the search for a value ------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """What is sought for one fact at the output of one module.

    Attributes:
        rows: the prompts, the bare one first.
        essence: "{subject} is a".
        object: the tokens whose probability is to change.
        module: where δ is added.
        method: hyper-parameters.
        noise: `[subject tokens, d_model]` while the prompts are read; None without.
        old: what the unchanged model says after the essence.
    """

    rows: list[Row]
    essence: Row
    object: list[int]
    module: nn.Module
    method: ValueSearch
    noise: Tensor | None
    old: Tensor

    @classmethod
    def of(
        cls,
        handle: ModelHandle,
        fact: Fact,
        contexts: Sequence[str],
        module: nn.Module,
        method: ValueSearch,
        noise: Tensor | None = None,
    ) -> "Search":
        rows = prompts(handle, fact, contexts)
        wanted = token_ids(handle, f" {fact.new if method.objective == 'inject' else fact.true}")
        if method.objective == "trace_reversal":
            wanted = said(handle, rows[0], len(wanted), noise)
        essence = tokenized(handle, f"{fact.subject} is a", fact.subject)
        during = noise if method.objective == "force" else None
        with torch.no_grad():
            old = logprobs(handle, essence.ids)[essence.subject_last]
        return cls(rows, essence, wanted, module, method, during, old)

    def chances(self, handle: ModelHandle, delta: Tensor) -> list[Tensor]:
        """Log-probabilities of the object's tokens after each prompt."""
        found = []
        for row in self.rows:
            at = len(row.ids) - 1
            with (
                noised(handle, row, self.noise),
                added(self.module, delta[None], row.subject_last),
            ):
                scores = logprobs(handle, row.ids + self.object[:-1])
            found.append(torch.stack([scores[at + i, t] for i, t in enumerate(self.object)]))
        return found

    def loss(self, handle: ModelHandle, delta: Tensor, start: Tensor) -> Tensor:
        chances = self.chances(handle, delta)
        if self.method.objective == "erase":
            aim = torch.stack([tokens.sum().exp() for tokens in chances]).mean()
        else:
            aim = -torch.stack([tokens.mean() for tokens in chances]).mean()
        at = self.essence.subject_last
        with added(self.module, delta[None], at):
            now = logprobs(handle, self.essence.ids)[at]
        kl = (now.exp() * (now - self.old)).sum()
        decay = delta.norm() / start.norm() ** 2
        return aim + self.method.kl * kl + self.method.weight_decay * decay


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    start: Tensor
    delta: Tensor
    evaluations: int
    stopped_early: bool
    clamped: bool
    loss: float


def find(handle: ModelHandle, search: Search) -> Found:
    """Adam on δ, as ROME's description has it."""
    method = search.method
    start = taken(handle, search.rows[0], search.module)[1]
    delta = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=method.lr)
    limit = method.clamp * start.norm()
    evaluations, stopped, clamped = 0, False, False
    while True:
        adam.zero_grad()
        loss = search.loss(handle, delta, start)
        evaluations += 1
        if loss < method.stop_below:
            stopped = True
            break
        if evaluations == method.steps:
            break
        loss.backward()
        adam.step()
        if delta.norm() > limit:
            clamped = True
            with torch.no_grad():
                delta.mul_(limit / delta.norm())
    return Found(start, delta.detach(), evaluations, stopped, clamped, loss.item())
