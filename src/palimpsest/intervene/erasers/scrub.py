"""Concept scrubbing (Belrose et al. 2023, arXiv 2306.03819, section 6): LEACE at every layer."""

from dataclasses import dataclass

from palimpsest.intervene.erasers.leace import Leace


@dataclass(frozen=True)
class Scrub(Leace):
    """LEACE from below, each layer fitted on states that the layers below have already erased.

    What a layer's own eraser guarantees is then true of the states that it really meets. The
    paper scrubs what attention and MLP read, at every token; here it is one `part` (these two are
    `attention_norm` and `mlp_norm`), on the tokens of `policy`, at every layer where none is named.
    """

    @property
    def in_turn(self) -> bool:
        """Yes."""
        return True
