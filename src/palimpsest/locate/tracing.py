"""Causal tracing: what restoring one state of a corrupted run brings back.

Meng et al. 2022 (arXiv 2202.05262, section 2). A prompt is run clean, and with its subject's
embeddings corrupted; then corrupted with a single state restored to its clean value. The total
effect is p(clean) − p(corrupted), the indirect effect of a state p(restored) − p(corrupted), p
being the probability of the true object's first token after the prompt.

A restored state at (block L, token t) leaves everything below L and before t as in the corrupted
run, so one pass over clean and corrupted rows is resumed at every block: all states whose
restoration begins at one block share batches, and only the tokens from t on are run. What comes
before the subject is the same in both runs: its effect is zero, and it is skipped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from palimpsest.cache import cached_tensors
from palimpsest.errors import RequestError, check_at_least
from palimpsest.facts.fact import Fact
from palimpsest.locate.corruption import NO_OTHER, noise, other_subjects, subject_spread
from palimpsest.model.corruption import corrupted
from palimpsest.model.forward import capturing, logits
from palimpsest.model.handle import ModelHandle
from palimpsest.model.memory import within_memory
from palimpsest.model.partial import Capture
from palimpsest.model.positions import Group, group_of, places
from palimpsest.model.site import Part, Site, check_choice
from palimpsest.model.tokens import NOBODY, Tokens, collate
from palimpsest.record.row import Row

Corruption = Literal["noise", "other_subject"]
Kind = Literal["residual", "mlp", "attention", "residual_mlp_severed", "residual_attention_severed"]
Extent = Literal["all", "named"]


@dataclass(frozen=True)
class Trace:
    """What tracing found of one fact.

    Attributes:
        fact: the fact.
        row: its prompt's tokens.
        places: indices of the traced tokens in `row`.
        layers: the traced blocks.
        clean: p of the true object's first token after the prompt.
        corrupted: the same under each sample of the corruption, `[samples]`.
        effects: by protocol's name (`mlp_window_10`), p(restored) − p(corrupted), a mean over
            samples, `[places, layers]`.
        cause: why there are no samples; None if there are.
    """

    fact: Fact
    row: Tokens
    places: tuple[int, ...]
    layers: tuple[int, ...]
    clean: float
    corrupted: Tensor
    effects: Mapping[str, Tensor]
    cause: str | None = None

    @property
    def total(self) -> float:
        """The total effect: p(clean) − p(corrupted)."""
        return self.clean - float(self.corrupted.mean())

    def group(self, place: int) -> Group:
        """The position group of a token."""
        return group_of(self.row, place)


@dataclass(frozen=True)
class Tracing:
    """Hyper-parameters of causal tracing.

    Attributes:
        corruption: `noise`, or `other_subject`: another subject's embeddings in place.
        noise: standard deviation of the noise, in those of the traced subjects' embeddings.
        level: its standard deviation itself, in place of `noise`.
        samples: corruptions of each fact; the public code has 10.
        kinds: what is restored. `residual`: a block's output; `mlp`, `attention`: what they add, in
            a window of blocks; `residual_mlp_severed`, `residual_attention_severed`: a block's
            output while at that token the MLPs (attention) above are kept as they were corrupted.
        window: blocks restored together for `mlp` and `attention`, from window // 2 below the
            centre on, cut off at the model's ends.
        tokens: `all` from the subject on, or `named`: one of each position group.
        layers: blocks to trace, or centres of windows; None: every `stride`-th.
        stride: distance of traced blocks.
        seed: of the noise and of the pick of other subjects.
    """

    corruption: str = "noise"
    noise: float = 3.0
    level: float | None = None
    samples: int = 2
    kinds: list[str] = field(default_factory=lambda: ["residual", "mlp", "attention"])
    window: int = 10
    tokens: str = "all"
    layers: list[int] | None = None
    stride: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the choices and sizes.

        Raises:
            RequestError: an unknown choice, no kind, or a size or noise that is too small.
        """
        check_choice("tracing.corruption", self.corruption, Corruption)
        check_choice("tracing.tokens", self.tokens, Extent)
        for kind in self.kinds:
            check_choice("tracing.kinds", kind, Kind)
        for name in ("samples", "window", "stride"):
            check_at_least(f"tracing.{name}", getattr(self, name), 1)
        check_at_least("the number of tracing.kinds", len(self.kinds), 1)
        scale, key = (self.noise, "noise") if self.level is None else (self.level, "level")
        if not scale > 0:
            raise RequestError(
                f"expected noise above 0, found tracing.{key}={scale:g}; without it nothing is "
                "corrupted, and 3 standard deviations of the subjects' embeddings are usual"
            )

    def check(self, model: ModelHandle, facts: Sequence[Fact]) -> None:
        """Refuse what cannot be traced.

        Raises:
            RequestError: a prompt without its subject, a window wider than the model, a layer that
                it lacks.
        """
        for fact in facts:
            if fact.prompt.span is None:
                raise RequestError(
                    f"expected the subject in the prompt of every traced fact, found fact "
                    f"{fact.id} with {fact.prompt.text[:80]!r} and the subject {fact.subject!r}; "
                    "mend the facts file"
                )
        if self.window > model.n_layers:
            raise RequestError(
                f"expected a window of at most {model.n_layers} blocks for {model.name}, found "
                f"tracing.window={self.window}; a wider one restores every block at every centre"
            )
        for layer in self.layers or ():
            model.check_layer(layer, "tracing.layers")

    def traced(self, model: ModelHandle) -> tuple[int, ...]:
        """The blocks, or centres of windows, that are traced."""
        if self.layers is not None:
            return tuple(sorted(set(self.layers)))
        return tuple(range(0, model.n_layers, self.stride))

    def protocol(self, kind: str) -> str:
        """The kind's name in rows: it says how many blocks were restored together."""
        return f"{kind}_window_{self.window}" if kind in ("mlp", "attention") else kind

    def trace(self, model: ModelHandle, facts: Sequence[Fact]) -> Iterator[Trace]:
        """Trace facts in order, as many at a time as fill a batch; what is done is cached.

        Raises:
            RequestError: as `check`.
        """
        self.check(model, facts)
        rows = [_row(model, fact) for fact in facts]
        shifts = self._shifts(model, facts, rows)
        widest = max((len(self._places(row)) for row in rows), default=1)
        some = max(1, model.batch_size // (widest * self.samples * len(self.kinds)))
        for first in range(0, len(facts), some):
            chunk = slice(first, first + some)
            found = self._found(model, rows[chunk], shifts[chunk])
            for i, fact in enumerate(facts[chunk]):
                yield self._told(model, fact, rows[first + i], found, i)

    def rows(self, trace: Trace, split: str) -> Iterator[Row]:
        """A trace as rows: every token's effects, and the means over position groups."""
        row = partial(
            Row, axis="localization", scope="fact", split=split, fact_id=trace.fact.id,
            relation=trace.fact.relation,
        )  # fmt: skip
        low = [
            row(metric=metric, protocol=self.corruption, value=value, n=len(trace.corrupted))
            for metric, value in (
                ("corrupted_probability", float(trace.corrupted.mean())),
                ("total_effect", trace.total),
            )
        ]
        yield row(metric="clean_probability", protocol=self.corruption, value=trace.clean)
        yield from (replace(r, value=None, note=trace.cause) if trace.cause else r for r in low)
        for kind, effects in trace.effects.items():
            state = partial(row, metric="indirect_effect", protocol=f"{self.corruption}/{kind}")
            for position, mean in _by_position(trace, effects).items():
                for layer, value in zip(trace.layers, mean.tolist(), strict=True):
                    yield state(layer=layer, position=position, value=value, n=len(trace.corrupted))

    def _told(
        self, model: ModelHandle, fact: Fact, row: Tokens, found: Mapping[str, Tensor], i: int
    ) -> Trace:
        chances = found[f"{i}/chances"]
        return Trace(
            fact=fact,
            row=row,
            places=self._places(row),
            layers=self.traced(model),
            clean=float(chances[0]),
            corrupted=chances[1:],
            effects={
                self.protocol(kind): found[f"{i}/{kind}"] for kind in self.kinds if len(chances) > 1
            },
            cause=None if len(chances) > 1 else NO_OTHER,
        )

    def _shifts(
        self, model: ModelHandle, facts: Sequence[Fact], rows: Sequence[Tokens]
    ) -> list[list[Tensor]]:
        """What is added to each subject's embeddings, for each sample."""
        if self.corruption == "other_subject":
            pick = partial(other_subjects, model, facts, rows, samples=self.samples, seed=self.seed)
            return [pick(which) for which in range(len(facts))]
        deviation = self.deviation(model, rows)
        return [noise(model, row, deviation, self.samples, self.seed) for row in rows]

    def deviation(self, model: ModelHandle, rows: Sequence[Tokens]) -> float:
        """Standard deviation of the noise for the subjects of some rows."""
        return self.noise * subject_spread(model, rows) if self.level is None else self.level

    def _places(self, row: Tokens) -> tuple[int, ...]:
        """The traced tokens: from the subject on, or the middle one of each position group."""
        assert row.subject is not None
        whole = tuple(range(row.subject[0], row.prompt))
        if self.tokens == "all":
            return whole
        return tuple(sorted(places(row).values()))

    def _found(
        self, model: ModelHandle, rows: Sequence[Tokens], shifts: Sequence[Sequence[Tensor]]
    ) -> dict[str, Tensor]:
        key = {
            "version": 1,
            "tracing": asdict(self),
            "model": model.state,
            "batch_size": model.batch_size,
            "device": model.device.type,
            "torch": torch.__version__,
            "rows": [[row.ids, row.subject, row.prompt] for row in rows],
            "shifts": [[float(shift.double().sum()) for shift in each] for each in shifts],
        }
        work = within_memory(lambda model: self.compute(model, rows, shifts))
        return cached_tensors("traces", key, lambda: work(model))

    @torch.no_grad()
    def compute(
        self, model: ModelHandle, rows: Sequence[Tokens], shifts: Sequence[Sequence[Tensor]]
    ) -> dict[str, Tensor]:
        """`trace` without the cache.

        Args:
            model: the model.
            rows: prompts, each with the first token of its object after it.
            shifts: for each row and sample, what is added to the subject's embeddings.

        Returns:
            `{row}/chances`, p clean and in each corrupted run `[1 + samples]`, and for each kind
            `{row}/{kind}`, the indirect effects `[places, layers]`; float32 on the CPU.
        """
        runs = _Runs.of(model, rows, shifts, self._starts(model))
        sums = {
            (i, kind): torch.zeros(len(self._places(row)), len(self.traced(model)))
            for i, row in enumerate(rows)
            for kind in self.kinds
        }
        for start, jobs in self._jobs(model, rows, runs).items():
            for first in range(0, len(jobs), model.batch_size):
                some = jobs[first : first + model.batch_size]
                for job, chance in zip(some, runs.restored(model, start, some), strict=True):
                    gain = chance - runs.chances[job.run]
                    sums[job.fact, job.kind][job.column] += gain / runs.samples(job.fact)
        found = {f"{i}/{kind}": effects for (i, kind), effects in sums.items()}
        chances = {f"{i}/chances": runs.of_fact(i) for i in range(len(rows))}
        return found | chances

    def _blocks(self, model: ModelHandle, kind: str, layer: int) -> range:
        """The blocks whose states are restored for a traced one."""
        if kind not in ("mlp", "attention"):
            return range(layer, layer + 1)
        lowest = layer - self.window // 2
        return range(max(0, lowest), min(model.n_layers, lowest + self.window))

    def _starts(self, model: ModelHandle) -> list[int]:
        return sorted(
            {self._blocks(model, k, layer)[0] for k in self.kinds for layer in self.traced(model)}
        )

    def _jobs(
        self, model: ModelHandle, rows: Sequence[Tokens], runs: "_Runs"
    ) -> dict[int, list["_Job"]]:
        """All restorations by the block that they begin at; those of like tokens together."""
        jobs: dict[int, list[_Job]] = {start: [] for start in self._starts(model)}
        for kind in self.kinds:
            for number, layer in enumerate(self.traced(model)):
                blocks = self._blocks(model, kind, layer)
                jobs[blocks[0]] += [
                    _Job(i, kind, (p, number), run, place, blocks)
                    for i, row in enumerate(rows)
                    for p, place in enumerate(self._places(row))
                    for run in runs.numbers[i][1:]
                ]
        return {start: sorted(some, key=lambda job: -job.place) for start, some in jobs.items()}


def _by_position(trace: Trace, effects: Tensor) -> dict[str, Tensor]:
    """Effects `[layers]` of every token, and their mean in every position group."""
    found = {f"token/{place}": effects[n] for n, place in enumerate(trace.places)}
    groups: dict[str, list[int]] = {}
    for number, place in enumerate(trace.places):
        groups.setdefault(trace.group(place), []).append(number)
    return found | {group: effects[numbers].mean(0) for group, numbers in groups.items()}


@dataclass(frozen=True, slots=True)
class _Job:
    """One restoration in one corrupted run.

    Attributes:
        fact: index of the fact.
        kind: what is restored.
        column: its place and its layer among those traced.
        run: the corrupted run.
        place: the token.
        blocks: where.
    """

    fact: int
    kind: str
    column: tuple[int, int]
    run: int
    place: int
    blocks: range


_RESTORED: dict[str, Part] = {
    "residual": "residual",
    "mlp": "mlp",
    "attention": "attention",
    "residual_mlp_severed": "residual",
    "residual_attention_severed": "residual",
}
_SEVERED: dict[str, Part] = {
    "residual_mlp_severed": "mlp",
    "residual_attention_severed": "attention",
}


@dataclass(frozen=True)
class _Runs:
    """A clean and several corrupted runs of each fact, in one pass.

    Attributes:
        capture: of that pass.
        outputs: by site, what it gave, `[runs, t, d_model]`.
        rows: each run's tokens.
        numbers: for each fact, its runs, the clean one first.
        answer: `[runs]` the first token of the true object.
        chances: `[runs]` its probability after the prompt.
    """

    capture: Capture
    outputs: Mapping[Site, Tensor]
    rows: Sequence[Tokens]
    numbers: Sequence[range]
    answer: Tensor
    chances: Tensor

    @classmethod
    def of(
        cls,
        model: ModelHandle,
        rows: Sequence[Tokens],
        shifts: Sequence[Sequence[Tensor]],
        starts: Sequence[int],
    ) -> "_Runs":
        every: list[Tokens] = []
        numbers: list[range] = []
        owners = 0
        for row, some in zip(rows, shifts, strict=True):
            bare = row.ids[: row.prompt]
            numbers.append(range(len(every), len(every) + 1 + len(some)))
            every.append(Tokens(bare, row.prompt, row.subject, NOBODY))
            every += [Tokens(bare, row.prompt, row.subject, owners + n) for n in range(len(some))]
            owners += len(some)
        sites = [
            Site(layer, part)
            for layer in range(model.n_layers)
            for part in ("residual", "mlp", "attention")
        ]
        with (
            corrupted(model, _padded(model, [shift for some in shifts for shift in some])),
            capturing(model, sites) as outputs,
        ):
            capture = Capture.of(model, collate(every, model.device), starts)
        answer = torch.tensor(
            [row.ids[row.prompt] for row, n in zip(rows, numbers, strict=True) for _ in n],
            device=model.device,
        )
        last = torch.tensor([row.prompt - 1 for row in every], device=model.device)
        runs = torch.arange(len(every), device=model.device)
        chances = _chances(model, capture.final[runs, last], answer)
        return cls(capture, outputs, every, numbers, answer, chances)

    def samples(self, fact: int) -> int:
        """Corrupted runs of a fact."""
        return len(self.numbers[fact]) - 1

    def of_fact(self, fact: int) -> Tensor:
        """The probabilities in a fact's runs, the clean one first."""
        own = self.numbers[fact]
        return self.chances[own.start : own.stop].clone()

    def restored(self, model: ModelHandle, start: int, jobs: Sequence[_Job]) -> Tensor:
        """Probabilities `[jobs]` with each job's states restored, from block `start` on."""
        device = model.device
        run = torch.tensor([job.run for job in jobs], device=device)
        place = torch.tensor([job.place for job in jobs], device=device)
        clean = torch.tensor([self.numbers[job.fact][0] for job in jobs], device=device)
        last = torch.tensor([self.rows[job.run].prompt - 1 for job in jobs], device=device)
        resume = self.capture.resume(start, place, run)
        with ExitStack() as hooks:
            for site, mine in self._restorations(jobs).items():
                values = self.outputs[site][clean[mine], place[mine]]
                hooks.enter_context(model.hooked([_setting(model, site, mine, values)]))
            for site, mine in self._severances(model, jobs).items():
                values = self.outputs[site][run[mine], place[mine]]
                hooks.enter_context(model.hooked([_setting(model, site, mine, values)]))
            states = resume.run(model)
        ends = states[torch.arange(len(jobs), device=device), last - place]
        return _chances(model, ends, self.answer[run])

    def _restorations(self, jobs: Sequence[_Job]) -> dict[Site, list[int]]:
        """Which jobs are restored at each site."""
        found: dict[Site, list[int]] = {}
        for number, job in enumerate(jobs):
            for block in job.blocks:
                found.setdefault(Site(block, _RESTORED[job.kind]), []).append(number)
        return found

    def _severances(self, model: ModelHandle, jobs: Sequence[_Job]) -> dict[Site, list[int]]:
        """Which jobs keep what a site gave in the corrupted run."""
        found: dict[Site, list[int]] = {}
        for number, job in enumerate(jobs):
            if part := _SEVERED.get(job.kind):
                for block in range(job.blocks.stop, model.n_layers):
                    found.setdefault(Site(block, part), []).append(number)
        return found


def _setting(
    model: ModelHandle, site: Site, rows: Sequence[int], values: Tensor
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A hook that sets a site's output at the first token of some rows."""
    index = torch.tensor(rows, device=values.device)

    def put(output: Tensor) -> Tensor:
        changed = output.clone()
        changed[index, 0] = values.to(output)
        return changed

    return model.module(site), put


def _padded(model: ModelHandle, shifts: Sequence[Tensor]) -> Tensor:
    """`[samples, longest subject, d_model]`, shorter subjects led by zeros."""
    longest = max((len(shift) for shift in shifts), default=1)
    padded = torch.zeros(max(len(shifts), 1), longest, model.width, device=model.device)
    for number, shift in enumerate(shifts):
        padded[number, -len(shift) :] = shift
    return padded


def _chances(model: ModelHandle, states: Tensor, answer: Tensor) -> Tensor:
    """Probability `[n]` of a token after each final hidden state `[n, d_model]`, on the CPU."""
    chosen = logits(model, states).softmax(-1).gather(1, answer[:, None])
    return chosen[:, 0].cpu()


def _row(model: ModelHandle, fact: Fact) -> Tokens:
    """The prompt, and the true object after it."""
    return model.encode(fact.prompt, fact.true)
