"""Texts and numbers as they are shown, the same in the terminal and on the page."""

from collections.abc import Sequence

from palimpsest.ask.bench import Findings
from palimpsest.ask.reading import Reading, legibility

BLOCKS = "▁▂▃▄▅▆▇█"
"""Legibility from 0 to 1 in eight steps."""


def share(probability: float) -> str:
    """A probability in four characters or fewer: `.93`, `<.01`, `1.0`."""
    if probability >= 0.995:
        return "1.0"
    return "<.01" if probability < 0.005 else f"{probability:.2f}".removeprefix("0")


def block(rank: int, vocabulary: int) -> str:
    """A rank's legibility as a block character."""
    return BLOCKS[min(int(legibility(rank, vocabulary) * len(BLOCKS)), len(BLOCKS) - 1)]


def strip(reading: Reading, which: int, vocabulary: int) -> str:
    """One character a layer: how legible the old (0) or the new object (1) is."""
    return "".join(block(ranks[which], vocabulary) for ranks in reading.ranks)


def place(reading: Reading) -> str:
    """Where a method changes the model."""
    change = reading.change
    if change.layer is None:
        return "nothing changed"
    return f"changes layer {change.layer}, {change.part}"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: `a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# -- sentences -------------------------------------------------------------------------------------


def about_failures(findings: Findings) -> list[str]:
    """Which methods could not change the model, so that theirs is the unchanged model's column."""
    return [
        f"{reading.name} failed: {cause}."
        for reading in findings.readings
        for cause in reading.change.failed.values()
    ]


def about_fits(findings: Findings) -> list[str]:
    """What methods were fitted on."""
    return [*about_relation(findings), *about_moments(findings)]


def about_relation(findings: Findings) -> list[str]:
    """How the relation was chosen, and what was fitted on its facts."""
    chosen, sample = findings.relation, findings.sample
    if chosen is None:
        return ["No relation of the facts has two objects of enough subjects."]
    if not chosen.cosines:
        lines = [f"Relation {chosen.name}, as named."]
    else:
        ranking = sorted(chosen.cosines.items(), key=lambda pair: -pair[1])
        cosines = ", ".join(f"{name} {cosine:.2f}" for name, cosine in ranking)
        lines = [
            f"Nearest relation: {chosen.name}, by the cosine of centred states at the prompt's "
            f"last token after layer {chosen.site.layer} ({cosines})."
        ]
    if sample is not None:
        lines.append(about_sample(findings))
    return lines


def about_sample(findings: Findings) -> str:
    """Who was fitted on how many facts, and whether these are few."""
    sample = findings.sample
    assert sample is not None
    wide = [r.name for r in findings.readings if r.change.scope == "relation"]
    ratio = sample.n / sample.width
    few = "; few for that width, so that held-out leakage is to be expected" if ratio < 2 else ""
    return (
        f"{listed(wide)}: fitted on n = {sample.n} facts of it (d = {sample.width}, n/d = "
        f"{ratio:.1f}, {sample.classes} objects), never on the asked subject{few}."
    )


def about_moments(findings: Findings) -> list[str]:
    """Whose second moments are taken over less text than in a run, and how to have as much."""
    return [
        f"{name}: second moments over {each.tokens:,} sampled tokens, to be quick; "
        f"{name}:intervene.{each.key}=null takes a run's {each.usual:,}."
        for name, each in findings.moments.items()
        if each.tokens < each.usual
    ]


def about_premises(findings: Findings) -> list[str]:
    """Which second hops the unchanged model does not answer, so that no method can be blamed."""
    objects = (findings.inquiry.old, findings.inquiry.new)
    missing: dict[str, list[str]] = {}
    for question, right in zip(findings.inquiry.questions, findings.premises, strict=True):
        wrong = [o for o, known in zip(objects, right, strict=False) if not known]
        if wrong:
            missing[question.name] = wrong
    return [
        f"The unchanged model itself does not name the {name} of {listed(wrong)}."
        for name, wrong in missing.items()
    ]


def about_collateral(findings: Findings) -> str:
    """How many neighbors each method keeps."""
    total = sum(known.kept for known in findings.unchanged.neighbors)
    if not total:
        return "The unchanged model knows none of them."
    kept = [f"{reading.name} {_kept(reading, findings)}" for reading in findings.readings[1:]]
    return f"Kept of the {total} that the unchanged model says: {', '.join(kept) or 'all'}."


def _kept(reading: Reading, findings: Findings) -> int:
    """How many neighbors are said both before and after."""
    pairs = zip(findings.unchanged.neighbors, reading.neighbors, strict=True)
    return sum(before.kept and after.kept for before, after in pairs)


def about_collision(findings: Findings) -> str:
    """Why there is no strip."""
    inquiry = findings.inquiry
    return (
        f"No strip: {inquiry.old} and {inquiry.new} begin with the same token, so that a rank of "
        "it would speak for both."
    )
