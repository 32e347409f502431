"""The layer at which causal tracing finds the largest effect, on dev facts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from palimpsest.errors import RequestError
from palimpsest.locate.locator import Evidence, Located, Locator, best, site
from palimpsest.locate.tracing import Kind, Trace, Tracing
from palimpsest.model.handle import ModelHandle
from palimpsest.model.positions import Group
from palimpsest.model.site import check_choice


@dataclass(frozen=True)
class CausalTrace(Locator):
    """The peak of the average indirect effect (Meng et al. 2022, arXiv 2202.05262, section 2).

    Whether that is where an edit works best is another question (Hase et al. 2023, arXiv
    2301.04213).

    Attributes:
        tracing: how facts are traced.
        kind: of the restored states; None: the part that the method changes, or, where that is
            a norm's output, the part that reads it.
        position: the group of tokens that is looked at; None: the subject's last token for `mlp`,
            the prompt's last for others.
    """

    tracing: Any = field(default_factory=Tracing)
    kind: str | None = None
    position: str | None = None

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            RequestError: an unknown one, or a kind that is not traced.
        """
        if self.kind is not None:
            check_choice("locate.kind", self.kind, Kind)
            self._check_traced(self.kind)
        if self.position is not None:
            check_choice("locate.position", self.position, Group)

    def _check_traced(self, kind: str) -> None:
        if kind not in self.tracing.kinds:
            raise RequestError(
                f"expected {kind!r} among locate.tracing.kinds, found "
                f"{', '.join(self.tracing.kinds)}; add it, or set locate.kind to one of them"
            )

    def locate(self, model: ModelHandle, part: str, place: str, evidence: Evidence) -> Located:
        """The traced layer, from the lowest that the method has room for, with the largest AIE.

        Raises:
            RequestError: no dev facts, none of them can be traced, or no traced layer fits.
        """
        kind = self.kind or part.removesuffix("_norm")
        self._check_traced(kind)
        position = self.position or ("last_subject" if kind == "mlp" else "last_prompt")
        traces = [each for each in self.tracing.trace(model, evidence.facts()) if not each.cause]
        scores = average(traces, self.tracing.protocol(kind), position)
        fitting = {layer: score for layer, score in scores.items() if layer >= evidence.lowest}
        if not fitting:
            raise RequestError(
                f"expected dev facts with an effect at {position} from layer {evidence.lowest} on, "
                f"found none in {len(traces)} traced facts; set locate.position or facts.dev"
            )
        return Located(site(best(fitting), part), fitting)


def average(traces: Sequence[Trace], protocol: str, position: str) -> dict[int, float]:
    """Average indirect effect by layer, over facts that have a token at a position group.

    Args:
        traces: of one model, with the same layers.
        protocol: the kind's name, such as `mlp_window_10`.
        position: the group; several tokens of one fact are averaged first.
    """
    sums: dict[int, list[float]] = {}
    for trace in traces:
        tokens = [n for n, place in enumerate(trace.places) if trace.group(place) == position]
        if tokens:
            means = trace.effects[protocol][tokens].mean(0).tolist()
            for layer, value in zip(trace.layers, means, strict=True):
                sums.setdefault(layer, []).append(value)
    return {layer: fmean(values) for layer, values in sums.items()}
