"""The headline numbers: what each is, which rows it is made of, and which direction is better."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import harmonic_mean
from typing import Literal

import numpy as np

from palimpsest.record.results import Results, sql_text
from palimpsest.record.row import Axis
from palimpsest.study.intervals import Estimate, Sample, estimates
from palimpsest.study.recoverable import (
    FITTED,
    ZONES,
    fitted,
    profiles,
    recoverable,
    recoverable_after,
    recoverable_beyond_name,
)
from palimpsest.study.samples import Key, picked, samples
from palimpsest.study.table import Direction, Heading

ByRun = Mapping[str, Estimate]
"""A number of many runs, by run id; a run of which nothing was measured may lack it."""

NOT_MEASURED = Estimate(None, note="not measured")


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number that is the mean of some rows, so that two runs can be compared fact by fact.

    Attributes:
        metric: of the rows.
        protocol: of the rows.
        prompt: what their prompt ids begin with.
        split: of the rows; any if None.
    """

    metric: str
    protocol: str
    prompt: str = ""
    split: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One headline number: the mean of some rows, or what a function reads.

    Attributes:
        key: `axis/metric/protocol`, also the name in report.csv and in wandb.
        axis: the group of columns it stands in.
        title: its heading.
        short: its heading where room is scarce.
        meaning: one line.
        editor: the better direction for a method that writes a new object; None if neither.
        eraser: the better direction for a method that removes the old one.
        rows: the rows that it is the mean of; None if it is none.
        read: else makes the number of all runs.
        style: `share` (two decimals), `number` (three digits) or `rank`.
        caution: a footnote that the number must never be shown without.
        closer: whether it stands in the second table, which looks closer at what is recoverable.
    """

    key: str
    axis: Axis
    title: str
    short: str
    meaning: str
    editor: Direction = None
    eraser: Direction = None
    rows: Quantity | None = None
    read: Callable[[Results], ByRun] | None = None
    style: Literal["share", "number", "rank"] = "share"
    caution: str | None = None
    closer: bool = False

    def heading(self, signed: bool = False, data: bool = False) -> Heading:
        """The column of a table that shows the number, or differences of it; or CSV alone."""
        return Heading(
            key=self.key,
            title=self.title,
            short=self.short,
            group=self.axis,
            meaning=self.meaning,
            editor=self.editor,
            eraser=self.eraser,
            style=self.style,
            signed=signed,
            caution=None if signed else self.caution,
            data=data,
        )


def headline(results: Results) -> dict[str, ByRun]:
    """The headline numbers of all runs, by column key."""
    means = means_of(results, [c.rows for c in HEADLINE if c.rows])
    found = {
        column.key: column.read(results) if column.read else means[column.rows]
        for column in HEADLINE
    }
    seen = {run_id: Estimate(None, note=FITTED) for run_id in fitted(results)}
    hidden = {c.key for c in HEADLINE if c.axis == "recoverability"}
    return {key: {**values, **seen} if key in hidden else values for key, values in found.items()}


def means_of(results: Results, wanted: Iterable[Quantity | None]) -> dict[Quantity | None, ByRun]:
    """Each quantity's estimates by run id."""
    listed = [quantity for quantity in wanted if quantity]
    found = estimates(samples(results, rows_of(listed), ["item"]))
    made: dict[Quantity | None, dict[str, Estimate]] = {quantity: {} for quantity in listed}
    for (run_id, item), value in found.items():
        made[listed[item]][run_id] = value
    return dict(made)


def rows_of(wanted: Sequence[Quantity], *columns: str) -> str:
    """A query for `samples`: the rows of some quantities.

    Args:
        wanted: the quantities; a row's place in them is the column `item`.
        columns: further columns.
    """
    listed = ", ".join(
        f"({place}, {sql_text(q.metric)}, {sql_text(q.protocol)}, {sql_text(q.prompt)}, "
        f"{'NULL' if q.split is None else sql_text(q.split)})"
        for place, q in enumerate(wanted)
    )
    found = picked(
        "true", "item", *columns, counts="starts_with(coalesce(prompt_id, ''), q.prompt)"
    )
    named = f"compared JOIN (VALUES {listed}) AS q (item, metric, protocol, prompt, split) ON "
    named += "compared.metric = q.metric AND compared.protocol = q.protocol"
    return (
        found.replace("FROM compared", f"FROM {named}")
        + " AND budget IS NULL AND (q.split IS NULL OR q.split = compared.split)"
    )


@lru_cache(maxsize=2)
def probe_samples(results: Results, position: str) -> dict[Key, Sample]:
    """Probes on the facts that every method changes, by run, protocol and layer."""
    names = ", ".join(map(sql_text, ("frozen", "shadow", "retrained")))
    condition = (
        f"metric = 'probe_accuracy' AND protocol IN ({names}) AND split = 'target' "
        f"AND position = {sql_text(position)} AND budget IS NULL"
    )
    found = picked(condition, "protocol", "layer")
    return samples(results, found, ["protocol", "layer"], ["protocol"])


def probe_of(results: Results, protocol: str) -> ByRun:
    """Accuracy of probes of a protocol for the true object, at the deepest measured layer."""
    found = _at_the_deepest(probe_samples(results, "last_prompt"))
    return _estimated(
        {
            run: (some.get(protocol) or _together([]), f"layer {layer}")
            for run, (layer, some) in found.items()
        }
    )


def removal(results: Results) -> ByRun:
    """Harmonic mean of what is removed, 1 − recoverable, and what is kept, accuracy elsewhere.

    A method that leaves the old object readable anywhere has little, and a ruined model as little.
    The ends are those of both numbers at once: wider than 95% of the mean itself.
    """
    kept = means_of(results, [_ELSEWHERE])[_ELSEWHERE]
    return {
        run_id: _both(found, kept.get(run_id, NOT_MEASURED))
        for run_id, found in recoverable(results).items()
    }


_ELSEWHERE = Quantity("other_accuracy", "vocabulary")


def _both(found: Estimate, kept: Estimate) -> Estimate:
    if found.value is None or kept.value is None:
        cause = found.note if found.value is None else f"other accuracy: {kept.note}"
        return Estimate(None, note=cause)
    ends = ((found.high, kept.low), (found.low, kept.high))
    low, high = (None if r is None or k is None else harmonic_mean([1 - r, k]) for r, k in ends)
    value = harmonic_mean([1 - found.value, kept.value])
    return Estimate(value, low, high, found.n, found.note, found.place)


def recoverable_in(results: Results, zone: str) -> ByRun:
    """The index of the places of one zone by themselves, for each run."""
    found = profiles(results)
    absent = Estimate(None, note="nothing was measured there")
    return {run.run_id: found.get(run.run_id, {}).get(zone, absent) for run in results.runs}


def old_rank(results: Results) -> ByRun:
    """Median rank of the old object under the logit lens at the deepest measured layer."""
    condition = (
        "metric = 'lens_rank_old' AND protocol = 'logit_lens' AND position = 'last_prompt' "
        "AND budget IS NULL"
    )
    rows = picked(condition, "protocol", "layer")
    found = samples(results, rows, ["protocol", "layer"], ["protocol"])
    chosen = {
        run: (some["logit_lens"], f"layer {layer}")
        for run, (layer, some) in _at_the_deepest(found).items()
    }
    return _estimated(chosen, "median")


def _at_the_deepest(found: Mapping[Key, Sample]) -> dict[str, tuple[int, dict[str, Sample]]]:
    """By run the deepest measured layer, and the samples there by protocol."""
    deepest: dict[str, int] = {}
    for run, _, layer in found:
        if layer is not None:
            deepest[run] = max(layer, deepest.get(run, layer))
    chosen: dict[str, tuple[int, dict[str, Sample]]] = {}
    for (run, protocol, layer), sample in found.items():
        if layer is not None and layer == deepest[run]:
            chosen.setdefault(run, (layer, {}))[1][protocol] = sample
    return chosen


def _together(found: Sequence[Sample]) -> Sample:
    """Samples without values as one, with the causes of all."""
    causes = sorted({cause for sample in found for cause in sample.causes})
    return Sample(np.empty(0), (), (), asked=sum(s.asked for s in found), causes=tuple(causes))


def _estimated(
    chosen: Mapping[str, tuple[Sample, str]], center: Literal["mean", "median"] = "mean"
) -> ByRun:
    places = {run: place for run, (_, place) in chosen.items()}
    return estimates({run: sample for run, (sample, _) in chosen.items()}, center, places)


HEADLINE = (
    Column(
        key="downstream/efficacy/probability",
        axis="downstream",
        title="efficacy",
        short="eff",
        meaning="the new object is more probable than the old one on the prompt that was fitted",
        editor="up",
        rows=Quantity("efficacy", "probability"),
    ),
    Column(
        key="downstream/paraphrase/probability",
        axis="downstream",
        title="paraphrase",
        short="par",
        meaning="the same on paraphrases that no fit has seen",
        editor="up",
        rows=Quantity("paraphrase", "probability"),
    ),
    Column(
        key="downstream/neighborhood/probability",
        axis="downstream",
        title="neighborhood",
        short="nbr",
        meaning="other subjects with the same old object keep preferring it",
        editor="up",
        eraser="up",
        rows=Quantity("neighborhood", "probability"),
    ),
    Column(
        key="downstream/score/harmonic_mean",
        axis="downstream",
        title="score",
        short="sco",
        meaning="harmonic mean of efficacy, paraphrase and neighborhood",
        editor="up",
        rows=Quantity("score", "harmonic_mean"),
    ),
    Column(
        key="downstream/suppression/candidates",
        axis="downstream",
        title="suppression",
        short="sup",
        meaning="on unseen paraphrases the old object no longer wins among the relation's objects",
        editor="up",
        eraser="up",
        rows=Quantity("suppression", "candidates", "paraphrase"),
    ),
    Column(
        key="downstream/relation_accuracy/vocabulary",
        axis="downstream",
        title="test accuracy",
        short="tst",
        meaning="untouched subjects of the same relations are still answered correctly",
        editor="up",
        eraser="up",
        rows=Quantity("relation_accuracy", "vocabulary", split="test"),
    ),
    Column(
        key="downstream/other_accuracy/vocabulary",
        axis="downstream",
        title="other accuracy",
        short="oth",
        meaning="facts of other relations are still answered correctly",
        editor="up",
        eraser="up",
        rows=Quantity("other_accuracy", "vocabulary"),
    ),
    Column(
        key="downstream/perplexity/heldout_text",
        axis="downstream",
        title="perplexity",
        short="ppl",
        meaning="on held-out text",
        editor="down",
        eraser="down",
        style="number",
        rows=Quantity("perplexity", "heldout_text"),
    ),
    Column(
        key="recoverability/recoverable/model",
        axis="recoverability",
        title="recoverable old",
        short="rec",
        meaning="from the whole changed model: chance-corrected success of the strongest of all "
        "attacks, chosen on other facts",
        editor="down",
        eraser="down",
        read=recoverable,
    ),
    Column(
        key="recoverability/removal/harmonic_mean",
        axis="recoverability",
        title="selective removal",
        short="rem",
        meaning="harmonic mean of 1 − recoverable old and other accuracy",
        editor="up",
        eraser="up",
        read=removal,
    ),
    Column(
        key="recoverability/recoverable/beyond_name",
        axis="recoverability",
        closer=True,
        title="recoverable beyond the name",
        short="rec|nm",
        meaning="the same as a share of what a probe on the name’s input embeddings leaves open",
        editor="down",
        eraser="down",
        read=recoverable_beyond_name,
    ),
    Column(
        key="recoverability/recoverable/after_change",
        axis="recoverability",
        title="recoverable after the change",
        short="aft",
        meaning="the same from prompts and states at or after the change alone",
        editor="down",
        eraser="down",
        read=recoverable_after,
        caution="Methods that change different layers are asked at different states: a late "
        "change leaves few of them. Rank no methods by it across layers.",
    ),
    *(
        Column(
            key=f"recoverability/recoverable/{key}",
            axis="recoverability",
            closer=True,
            title=f"recoverable {title}",
            short=short,
            meaning=f"the same from {meaning} alone",
            read=partial(recoverable_in, zone=zone),
        )
        for zone, key, title, short, meaning in (
            (ZONES[0], "upstream", "upstream", "ups", "states before the change"),
            (ZONES[1], "site", "at the site", "sit", "the first measured layer that it changes"),
            (ZONES[2], "downstream", "downstream", "dwn", "the layers above that"),
            (ZONES[3], "prompts", "by prompts", "ask", "prompts"),
        )
    ),
    Column(
        key="recoverability/probe_accuracy/frozen",
        axis="recoverability",
        closer=True,
        title="probe old (frozen)",
        short="frz",
        meaning="a linear probe trained on the unchanged model reads the old object, last prompt "
        "token, deepest measured layer",
        editor="down",
        eraser="down",
        read=partial(probe_of, protocol="frozen"),
    ),
    Column(
        key="recoverability/probe_accuracy/shadow",
        axis="recoverability",
        closer=True,
        title="probe old (shadow)",
        short="shd",
        meaning="the same place, probe trained on subjects that the same method has changed",
        editor="down",
        eraser="down",
        read=partial(probe_of, protocol="shadow"),
    ),
    Column(
        key="recoverability/probe_accuracy/retrained",
        axis="recoverability",
        closer=True,
        title="probe old (retrained)",
        short="ret",
        meaning="the same place, probe trained on all probe subjects in the changed model; "
        "undefined where edits are independent",
        editor="down",
        eraser="down",
        read=partial(probe_of, protocol="retrained"),
    ),
    Column(
        key="recoverability/lens_rank_old/logit_lens",
        axis="recoverability",
        title="lens rank old",
        short="lens",
        meaning="median rank of the old object under the logit lens, deepest measured layer "
        "(1 = top)",
        editor="up",
        eraser="up",
        style="rank",
        read=old_rank,
    ),
    Column(
        key="consistency/twohop_new/vocabulary",
        axis="consistency",
        title="two-hop new",
        short="new",
        meaning="a question that the fact entails is answered as the new object requires",
        editor="up",
        rows=Quantity("twohop_new", "vocabulary"),
    ),
    Column(
        key="consistency/twohop_old/vocabulary",
        axis="consistency",
        title="two-hop old",
        short="old",
        meaning="the same question is still answered as the old object requires",
        editor="down",
        eraser="down",
        rows=Quantity("twohop_old", "vocabulary"),
    ),
    Column(
        key="consistency/twohop_neither/vocabulary",
        axis="consistency",
        title="two-hop neither",
        short="nei",
        meaning="the same question gets any other answer",
        rows=Quantity("twohop_neither", "vocabulary"),
    ),
    Column(
        key="consistency/agreement_correct/true",
        axis="consistency",
        title="agree on old",
        short="=old",
        meaning="two paraphrases get the same answer, and it is the old object",
        editor="down",
        eraser="down",
        rows=Quantity("agreement_correct", "true"),
    ),
    Column(
        key="consistency/agreement_correct/new",
        axis="consistency",
        title="agree on new",
        short="=new",
        meaning="two paraphrases get the same answer, and it is the new object",
        editor="up",
        rows=Quantity("agreement_correct", "new"),
    ),
)
"""The headline columns, in order."""
