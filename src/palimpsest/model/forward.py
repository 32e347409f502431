"""Forward passes: hidden states where they are asked for, logits only where they are read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import within_memory
from palimpsest.model.site import EMBEDDING, Position, Site
from palimpsest.model.tokens import Batch, Tokens, batches, collate


class _Enough(Exception):
    """Raised by a hook when nothing above it is needed."""


def forward(handle: ModelHandle, batch: Batch, cache: DynamicCache | None = None) -> Tensor:
    """Final hidden states, after the last norm, `[n, t, d_model]`.

    Hooks find the batch in `handle.running` while the pass lasts.
    """
    outer, handle.running = handle.running, batch
    try:
        output = handle.decoder(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
    finally:
        handle.running = outer
    return output.last_hidden_state  # type: ignore[no-any-return]


def logits(handle: ModelHandle, states: Tensor) -> Tensor:
    """Logits `[..., vocabulary]` in float32 of final hidden states `[..., d_model]`."""
    scores: Tensor = handle.model.get_output_embeddings()(states).float()
    cap = getattr(handle.model.config.get_text_config(), "final_logit_softcapping", None)
    return scores if cap is None else cap * torch.tanh(scores / cap)


def logit_lens(handle: ModelHandle, states: Tensor) -> Tensor:
    """The logit lens (nostalgebraist 2020): what the model's own norm and head read off states.

    Args:
        handle: the model.
        states: `[..., d_model]` of the residual stream after any block, of any dtype and device.

    Returns:
        logits `[..., vocabulary]` in float32 on the model's device.
    """
    return logits(handle, handle.final_norm(states.to(handle.device, handle.model.dtype)))


def token_ranks(scores: Tensor, tokens: Tensor) -> Tensor:
    """Ranks `[n, k]` of tokens `[n, k]` among scores `[n, vocabulary]`; 1 is the largest score."""
    return 1 + (scores[:, None, :] > scores.gather(1, tokens)[:, :, None]).sum(-1)


@torch.no_grad()
def run_to(handle: ModelHandle, batch: Batch, layer: int) -> None:
    """Run the blocks up to and including `layer` for what hooks take from them, and no further."""

    def stop(_: Tensor) -> None:
        raise _Enough

    with handle.hooked([(handle.blocks[layer], stop)]):
        try:
            forward(handle, batch)
        except _Enough:
            return


def features(
    handle: ModelHandle,
    rows: Sequence[Tokens],
    sites: Sequence[Site],
    positions: Sequence[Position],
) -> Tensor:
    """States at sites and named positions.

    Returns:
        float32 `[len(sites), len(positions), len(rows), d_model]` on the CPU (float64 of a model in
        double precision). The layer `EMBEDDING` stands for the input of the first block. Only the
        layers up to the highest site are run.
    """
    return states_at(handle, rows, sites, [[row.at(p) for row in rows] for p in positions])


@within_memory
@torch.no_grad()
def states_at(
    handle: ModelHandle,
    rows: Sequence[Tokens],
    sites: Sequence[Site],
    places: Sequence[Sequence[int]],
) -> Tensor:
    """States at sites and at tokens counted in each row.

    Args:
        handle: the model.
        rows: prompts.
        sites: where in the model.
        places: lists of one token a row.

    Returns:
        `[len(sites), len(places), len(rows), d_model]`, as of `features`.
    """
    dtype = torch.promote_types(handle.model.dtype, torch.float32)
    out = torch.empty(len(sites), len(places), len(rows), handle.width, dtype=dtype)
    top = max(site.layer for site in sites)
    for group in batches(rows, handle.batch_size):
        batch = collate([rows[i] for i in group], handle.device)
        index = torch.tensor([[at[i] for i in group] for at in places])
        with capturing(handle, sites) as states:
            run_to(handle, batch, max(top, 0))
        for s, site in enumerate(sites):
            picked = states[site][torch.arange(len(group)), index]
            out[s][:, torch.tensor(group)] = picked.to(out)
    return out


@contextmanager
def capturing(handle: ModelHandle, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Collect the outputs `[n, t, d_model]` of sites from the forward pass run inside."""
    states: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], None]:
        return lambda state: states.__setitem__(site, state)

    inner = [site for site in sites if site.layer != EMBEDDING]
    outer = [site for site in sites if site.layer == EMBEDDING]
    with (
        handle.hooked([(handle.module(site), keep(site)) for site in inner]),
        handle.hooked_input([(handle.blocks[0], keep(site)) for site in outer]),
    ):
        yield states


@within_memory
@torch.no_grad()
def keys(handle: ModelHandle, rows: Sequence[Tokens], layer: int) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of W_out at each row's last subject token.

    Returns:
        keys `[len(rows), d_mlp]` and values `[len(rows), d_model]`, in the model's dtype.
    """
    w_out = handle.module(Site(layer, "mlp"))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for group in batches(rows, handle.batch_size):
        batch = collate([rows[i] for i in group], handle.device)
        taken: dict[str, Tensor] = {}
        with (
            handle.hooked_input([(w_out, _keep(taken, "key"))]),
            handle.hooked([(w_out, _keep(taken, "value"))]),
        ):
            run_to(handle, batch, layer)
        for n, i in enumerate(group):
            at = rows[i].at("last_subject")
            found[i] = taken["key"][n, at].clone(), taken["value"][n, at].clone()
    ordered = [found[i] for i in range(len(rows))]
    return torch.stack([key for key, _ in ordered]), torch.stack([value for _, value in ordered])


def _keep(into: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    return lambda state: into.__setitem__(name, state)


# -- scoring completions ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Score:
    """How a model takes a completion, teacher-forced.

    Attributes:
        logprob: sum of the tokens' log-probabilities (nats).
        tokens: number of the completion's tokens.
        argmax: every token is the argmax in turn.
    """

    logprob: float
    tokens: int
    argmax: bool

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token."""
        return self.logprob / self.tokens


@within_memory
def score(handle: ModelHandle, rows: Sequence[Tokens]) -> list[Score]:
    """Score the completions that rows carry (the tokens from `row.prompt` on).

    Rows of one prompt and owner share forward passes: a completion of one token needs no row of its
    own, and a row that begins another is read off the longer one.
    """
    carriers, home = _carriers(rows)
    reads: dict[int, list[tuple[int, int, int]]] = {}  # carrier -> (row, position, token)
    for i, row in enumerate(rows):
        for j in range(row.prompt, len(row.ids)):
            reads.setdefault(home[i], []).append((i, j - 1, row.ids[j]))
    total = [0.0] * len(rows)
    correct = [True] * len(rows)
    for group in batches(carriers, handle.batch_size):
        for i, logprob, hit in _read(
            handle, [carriers[g] for g in group], [reads[g] for g in group]
        ):
            total[i] += logprob
            correct[i] &= hit
    return [Score(total[i], len(row.ids) - row.prompt, correct[i]) for i, row in enumerate(rows)]


_Key = tuple[int, int, tuple[int, int] | None, tuple[int, ...]]


def _carriers(rows: Sequence[Tokens]) -> tuple[list[Tokens], list[int]]:
    """Rows to be run (last token dropped, prefixes merged), and which of them carries each row.

    Only rows of one owner, with subject and prompt ending at the same tokens, may share a pass:
    a change may act there.
    """
    runs = [Tokens(row.ids[:-1], row.prompt, row.subject, row.owner) for row in rows]
    home: dict[_Key, Tokens] = {}
    for run in sorted(runs, key=lambda run: -len(run.ids)):
        for end in range(1, len(run.ids) + 1):
            home.setdefault((run.owner, run.prompt, run.subject, run.ids[:end]), run)
    carrier_of = [home[run.owner, run.prompt, run.subject, run.ids] for run in runs]
    number = {carrier: index for index, carrier in enumerate(dict.fromkeys(carrier_of))}
    return list(number), [number[carrier] for carrier in carrier_of]


_READS_AT_ONCE = 256
"""Logits of this many places are held at a time: 50 MB for a vocabulary of 50,000."""


@torch.no_grad()
def _read(
    handle: ModelHandle, carriers: Sequence[Tokens], reads: Sequence[Sequence[tuple[int, int, int]]]
) -> Iterator[tuple[int, float, bool]]:
    """(row, log-probability, is argmax) of each token to be read, for one batch of carriers."""
    states = forward(handle, collate(carriers, handle.device))
    flat = sorted((c, at, i, token) for c, items in enumerate(reads) for i, at, token in items)
    for start in range(0, len(flat), _READS_AT_ONCE):
        some = flat[start : start + _READS_AT_ONCE]
        places = {(c, at): None for c, at, _, _ in some}
        row_of = {place: index for index, place in enumerate(places)}
        picked = states[[c for c, _ in places], [at for _, at in places]]
        logprobs = torch.log_softmax(logits(handle, picked), -1)
        at_row = torch.tensor([row_of[c, at] for c, at, _, _ in some], device=logprobs.device)
        token = torch.tensor([token for *_, token in some], device=logprobs.device)
        values = logprobs[at_row, token].tolist()
        hits = (logprobs.argmax(-1)[at_row] == token).tolist()
        for (_, _, i, _), value, hit in zip(some, values, hits, strict=True):
            yield i, value, hit


@within_memory
@torch.no_grad()
def next_token_logprobs(handle: ModelHandle, rows: Sequence[Tokens]) -> Tensor:
    """Log-probabilities `[len(rows), vocabulary]` (float32, CPU) of the token after each row."""
    out: dict[int, Tensor] = {}
    for group in batches(rows, handle.batch_size):
        states = forward(handle, collate([rows[i] for i in group], handle.device))
        ends = [len(rows[i].ids) - 1 for i in group]
        scores = torch.log_softmax(logits(handle, states[range(len(group)), ends]), -1).cpu()
        out.update(zip(group, scores, strict=True))
    return torch.stack([out[i] for i in range(len(rows))])


@within_memory
@torch.no_grad()
def greedy(handle: ModelHandle, rows: Sequence[Tokens], tokens: int) -> list[tuple[int, ...]]:
    """Greedy continuations by `tokens` tokens, under the hooks, with a key/value cache."""
    said: dict[int, tuple[int, ...]] = {}
    for group in batches(rows, handle.batch_size):
        found = _continued(handle, [rows[i] for i in group], tokens)
        said.update(zip(group, map(tuple, found.tolist()), strict=True))
    return [said[i] for i in range(len(rows))]


def _continued(handle: ModelHandle, rows: Sequence[Tokens], tokens: int) -> Tensor:
    """Greedy continuations `[n, tokens]` of one batch of rows."""
    batch, cache = collate(rows, handle.device).padded_left(), DynamicCache()
    found: list[Tensor] = []
    while len(found) < tokens:
        batch = batch.followed_by(found[-1]) if found else batch
        found.append(logits(handle, forward(handle, batch, cache)[:, -1]).argmax(-1))
    return torch.stack(found, 1)
