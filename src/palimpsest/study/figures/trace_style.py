"""How causal tracing looks, the same on the page and in pictures: colours, tokens, titles."""

from collections.abc import Iterable

import numpy as np

from palimpsest.study.figures.style import shorten
from palimpsest.study.intervals import Floats
from palimpsest.study.text import DASH, plain
from palimpsest.study.traces import TracedFact, corruption_text

EFFECT = "indirect effect"
COLUMNS = 3
"""Panels beside each other; further ones begin a new row."""

NOTHING = "#e8eaed"
"""Where no state was restored; zero is white."""

GROUP_COLOURS = {
    "first_subject": "#cc79a7",
    "middle_subject": "#e69f00",
    "last_subject": "#d55e00",
    "first_subsequent": "#56b4e9",
    "further": "#009e73",
    "last_prompt": "#0072b2",
}
"""Okabe and Ito's colours: told apart by the colour-blind too."""

GROUP_DASHES = {
    "first_subject": "dot",
    "middle_subject": "dash",
    "last_subject": "solid",
    "first_subsequent": "dashdot",
    "further": "dash",
    "last_prompt": "solid",
}
"""Plotly's names of the lines: the two places that matter most are solid."""

_RAMP = (
    "#7f2704",
    "#d94801",
    "#fd8d3c",
    "#fdd0a2",
    "#ffffff",
    "#c6dbef",
    "#6baed6",
    "#2171b5",
    "#08306b",
)
_SIGNS = {"\n": "↵", "\r": "↵", "\t": "⇥"}


def limits(maps: Iterable[Floats]) -> tuple[float, float]:
    """The least and the largest value of all maps, reaching zero; NaN does not count."""
    values = np.concatenate([found[np.isfinite(found)] for found in maps])
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    return (low, high) if low < high else (0.0, 1.0)


def colour_stops(low: float, high: float) -> list[tuple[float, str]]:
    """A colour scale from `low` to `high`: white at zero, blue above, orange below.

    Both sides darken equally fast.

    Returns:
        places from 0 to 1 and their colours.
    """
    reach = max(-low, high)
    steps = [reach * k / 4 for k in range(-4, 5) if low < reach * k / 4 < high]
    return [((v - low) / (high - low), _colour(v / reach)) for v in (low, *steps, high)]


def token_text(token: str) -> str:
    """A token in a label: on one line, with signs for what could not be seen."""
    text = token.strip(" ") or "␣" * len(token)
    return shorten("".join(_SIGNS.get(c) or _visible(c) for c in text), 28)


def token_texts(fact: TracedFact) -> list[str]:
    """The labels of a fact's tokens; a star marks those of the subject."""
    first, last = fact.subject
    texts = map(token_text, fact.tokens)
    return [f"{text} *" if first <= k <= last else text for k, text in enumerate(texts)]


def fact_title(fact: TracedFact) -> str:
    """The object and its probability, clean and corrupted; all but the numbers is as it is."""
    chance = DASH if fact.clean is None else plain(fact.clean)
    corrupted = [
        f"{plain(p)} corrupted by {corruption_text(name)}" for name, p in fact.corrupted.items()
    ]
    name = " ".join(map(token_text, str(fact.fact["true"]).split()))
    return f"{name}: probability " + ", ".join([f"{chance} clean", *corrupted])


def _visible(letter: str) -> str:
    if letter.isspace() and letter != " ":
        return "␣"
    return letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}"


def _colour(share: float) -> str:
    """The ramp's colour at a place from -1 to 1."""
    parts = [[int(colour[k : k + 2], 16) for colour in _RAMP] for k in (1, 3, 5)]
    mixed = [np.interp(share, np.linspace(-1, 1, len(_RAMP)), part) for part in parts]
    return "#" + "".join(f"{round(float(value)):02x}" for value in mixed)
