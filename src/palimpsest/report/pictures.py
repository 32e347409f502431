"""Figures for papers, saved as PNG and PDF."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from palimpsest.files import atomic
from palimpsest.study.figures.style import FAINT, INK
from palimpsest.study.study import Picture

_LOOK: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": INK,
    "text.usetex": False,
    "text.parse_math": False,  # `$` in a data set's text is a dollar
    "pdf.fonttype": 42,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.dpi": 200,
}
"""Fonts are embedded as TrueType, which publishers ask for."""


def write_pictures(found: Sequence[Picture], folder: Path) -> list[Path]:
    """Draw pictures and write each as PNG and as PDF.

    Args:
        found: the pictures; their paths are under `folder`.
        folder: holds nothing else.

    Returns:
        the files.

    Raises:
        RequestError: the directory cannot be written.
        WriteError: there is no room.
    """
    if not found:
        return []
    with _drawing():
        return [path for each in found for path in _saved(each.draw(), folder / each.path)]


@contextmanager
def _drawing() -> Iterator[None]:
    """Matplotlib's settings for the pictures; letters that its font lacks are boxes."""
    import matplotlib

    with matplotlib.rc_context(_LOOK), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def _saved(figure: Any, path: Path) -> list[Path]:
    """Write a figure, laid out once, as PNG and as PDF."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "pdf")]
    for file in paths:
        kind = file.suffix[1:]
        with atomic(file) as temporary:
            undated = {"CreationDate": None} if kind == "pdf" else {}
            figure.savefig(temporary, format=kind, metadata=undated)
    return paths
