"""The headline numbers: what each is, which rows it is made of, and which direction is better."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from palimpsest.record.row import Axis, Row
from palimpsest.record.store import Run
from palimpsest.study.intervals import Estimate, estimate
from palimpsest.study.recoverable import recoverable

Direction = Literal["up", "down"] | None
"""Which way is better; None where neither is."""

REFITTED = ("retrained", "adaptive")
"""Protocols of probes that were trained after the change, the preferred one first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One headline number.

    Attributes:
        key: `axis/metric/protocol`, also the name in report.csv and in wandb.
        axis: the group of columns it stands in.
        title: its heading.
        short: its heading where room is scarce.
        meaning: one line.
        editor: the better direction for a method that writes a new object; None if neither.
        eraser: the better direction for a method that removes the old one.
        read: makes the number from a run.
        style: `share` (two decimals), `number` (three digits) or `rank`.
        caution: a footnote that the number must never be shown without.
    """

    key: str
    axis: Axis
    title: str
    short: str
    meaning: str
    editor: Direction = None
    eraser: Direction = None
    read: Callable[[Run], Estimate]
    style: Literal["share", "number", "rank"] = "share"
    caution: str | None = None


def rows_of(
    metric: str, protocol: str, prompt: str = "", **equal: str | int | None
) -> Callable[[Run], list[Row]]:
    """Select a metric's rows from prompts whose id starts with `prompt`.

    Without a `step` among the columns that are to be equal: those after the last edit.
    """

    def select(run: Run) -> list[Row]:
        found = run.select(metric, protocol, budget=None, **equal)
        return [row for row in last_step(found) if (row.prompt_id or "").startswith(prompt)]

    return select


def last_step(rows: Sequence[Row]) -> list[Row]:
    """The rows that describe the run's end: those without a step, else those of the last one."""
    steps = {row.step for row in rows}
    last = None if None in steps else max((s for s in steps if s is not None), default=None)
    return [row for row in rows if row.step == last]


def probe_rows(run: Run, protocol: str, position: str = "last_prompt") -> list[Row]:
    """A probe's rows on the facts that every method changes, at all layers."""
    return rows_of("probe_accuracy", protocol, split="target", position=position)(run)


def probe_frozen(run: Run) -> Estimate:
    """Accuracy of probes trained on the unchanged model, at the deepest measured layer."""
    layer = _deepest(_probes(run))
    rows = [row for row in probe_rows(run, "frozen") if row.layer == layer]
    return estimate(rows, place=_at(layer))


def probe_refit(run: Run) -> Estimate:
    """The same place, probes trained after the change: retrained ones, or else adaptive ones."""
    layer = _deepest(_probes(run))
    named = [(name, [r for r in probe_rows(run, name) if r.layer == layer]) for name in REFITTED]
    for name, rows in named:
        if any(row.value is not None for row in rows):
            return estimate(rows, place=f"{name}, {_at(layer)}")
    return estimate([row for _, rows in named for row in rows], place=_at(layer))


def old_rank(run: Run) -> Estimate:
    """Median rank of the old object under the logit lens at the deepest measured layer."""
    rows = rows_of("lens_rank_old", "logit_lens", position="last_prompt")(run)
    layer = _deepest(rows)
    return estimate([row for row in rows if row.layer == layer], "median", _at(layer))


def _probes(run: Run) -> list[Row]:
    return [row for name in ("frozen", *REFITTED) for row in probe_rows(run, name)]


def _deepest(rows: Sequence[Row]) -> int | None:
    return max((row.layer for row in rows if row.layer is not None), default=None)


def _at(layer: int | None) -> str | None:
    return None if layer is None else f"layer {layer}"


@dataclass(frozen=True, slots=True)
class Mean:
    """A number that is the mean of some rows, so that two runs can be compared fact by fact.

    Attributes:
        rows: which, of a run.
    """

    rows: Callable[[Run], list[Row]]

    def __call__(self, run: Run) -> Estimate:
        """The number."""
        return estimate(self.rows(run))


def _mean(metric: str, protocol: str, prompt: str = "", **equal: str) -> Mean:
    return Mean(rows_of(metric, protocol, prompt, **equal))


HEADLINE = (
    Column(
        key="downstream/efficacy/probability",
        axis="downstream",
        title="efficacy",
        short="eff",
        meaning="the new object is more probable than the old one on the prompt that was fitted",
        editor="up",
        read=_mean("efficacy", "probability"),
    ),
    Column(
        key="downstream/paraphrase/probability",
        axis="downstream",
        title="paraphrase",
        short="par",
        meaning="the same on paraphrases that no fit has seen",
        editor="up",
        read=_mean("paraphrase", "probability"),
    ),
    Column(
        key="downstream/neighborhood/probability",
        axis="downstream",
        title="neighborhood",
        short="nbr",
        meaning="other subjects with the same old object keep preferring it",
        editor="up",
        eraser="up",
        read=_mean("neighborhood", "probability"),
    ),
    Column(
        key="downstream/score/harmonic_mean",
        axis="downstream",
        title="score",
        short="sco",
        meaning="harmonic mean of efficacy, paraphrase and neighborhood",
        editor="up",
        read=_mean("score", "harmonic_mean"),
    ),
    Column(
        key="downstream/suppression/candidates",
        axis="downstream",
        title="suppression",
        short="sup",
        meaning="on unseen paraphrases the old object no longer wins among the relation's objects",
        editor="up",
        eraser="up",
        read=_mean("suppression", "candidates", "paraphrase"),
    ),
    Column(
        key="downstream/relation_accuracy/vocabulary",
        axis="downstream",
        title="test accuracy",
        short="tst",
        meaning="untouched subjects of the same relations are still answered correctly",
        editor="up",
        eraser="up",
        read=_mean("relation_accuracy", "vocabulary", split="test"),
    ),
    Column(
        key="downstream/other_accuracy/vocabulary",
        axis="downstream",
        title="other accuracy",
        short="oth",
        meaning="facts of other relations are still answered correctly",
        editor="up",
        eraser="up",
        read=_mean("other_accuracy", "vocabulary"),
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
        read=_mean("perplexity", "heldout_text"),
    ),
    Column(
        key="recoverability/probe_accuracy/frozen",
        axis="recoverability",
        title="probe old (frozen)",
        short="frz",
        meaning="a linear probe trained on the unchanged model reads the old object, last prompt "
        "token, deepest measured layer",
        editor="down",
        eraser="down",
        read=probe_frozen,
    ),
    Column(
        key="recoverability/probe_accuracy/refit",
        axis="recoverability",
        title="probe old (re-fit)",
        short="ref",
        meaning="the same place, probe trained after the change (retrained, or adaptive where "
        "retrained is undefined)",
        editor="down",
        eraser="down",
        read=probe_refit,
    ),
    Column(
        key="recoverability/recoverable/index",
        axis="recoverability",
        title="recoverable old",
        short="rec",
        meaning="chance-corrected success of the strongest of all attacks and probes, less what "
        "being the best of many gains",
        editor="down",
        eraser="down",
        read=recoverable,
        caution="Names alone give much away: compare with a probe on bare input embeddings "
        "(probe_baseline, embedding), which no change of weights reaches.",
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
        read=_mean("twohop_new", "vocabulary"),
    ),
    Column(
        key="consistency/twohop_old/vocabulary",
        axis="consistency",
        title="two-hop old",
        short="old",
        meaning="the same question is still answered as the old object requires",
        editor="down",
        eraser="down",
        read=_mean("twohop_old", "vocabulary"),
    ),
    Column(
        key="consistency/twohop_neither/vocabulary",
        axis="consistency",
        title="two-hop neither",
        short="nei",
        meaning="the same question gets any other answer",
        read=_mean("twohop_neither", "vocabulary"),
    ),
    Column(
        key="consistency/agreement_correct/true",
        axis="consistency",
        title="agree on old",
        short="=old",
        meaning="two paraphrases get the same answer, and it is the old object",
        editor="down",
        eraser="down",
        read=_mean("agreement_correct", "true"),
    ),
    Column(
        key="consistency/agreement_correct/new",
        axis="consistency",
        title="agree on new",
        short="=new",
        meaning="two paraphrases get the same answer, and it is the new object",
        editor="up",
        read=_mean("agreement_correct", "new"),
    ),
)
"""The headline columns, in order."""
