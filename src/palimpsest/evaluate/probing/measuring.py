"""What measures by probes share: the sample they are trained on, the places, and the rows."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

from torch import Tensor

from palimpsest.cache import cached_tensors
from palimpsest.errors import check_at_least
from palimpsest.evaluate.probing.readings import (
    accuracies,
    baselines,
    labelled,
    selectivities,
    undefined,
)
from palimpsest.evaluate.probing.training import KINDS, Kit, Where
from palimpsest.evaluate.scene import Scene, ends_with_subject
from palimpsest.facts.fact import Fact
from palimpsest.facts.splits import Splits
from palimpsest.model.forward import features
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Position, Site
from palimpsest.model.tokens import Tokens
from palimpsest.record.row import Row

POSITIONS: tuple[Position, ...] = ("last_subject", "last_prompt")

States = Mapping[Where, Tensor]
"""States `[n, d_model]` by layer and position."""


@dataclass(frozen=True)
class Asked:
    """Facts that probes are laid on.

    Attributes:
        scene: the changed model.
        facts: whose objects are sought.
        rows: their fit prompts, with owners.
        states: of these prompts.
    """

    scene: Scene
    facts: Sequence[Fact]
    rows: Sequence[Tokens]
    states: States


@dataclass(frozen=True)
class Read:
    """Where probes read: a layer in so many, at two tokens of the prompt.

    Attributes:
        stride: every how many layers states are read; the last layer always is.
    """

    along: ClassVar[bool] = False
    name: ClassVar[str]

    stride: int = 3

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            RequestError: it is too small.
        """
        check_at_least(f"evaluate.{self.name}.stride", self.stride, 1)

    def layers(self, model: ModelHandle) -> list[int]:
        """The layers whose outputs are read."""
        return sorted({*range(0, model.n_layers, self.stride), model.n_layers - 1})

    def features(self, model: ModelHandle, rows: Sequence[Tokens]) -> dict[Where, Tensor]:
        """States of the model as it stands by layer and position."""
        return self._by_place(model, features(model, rows, *self._sites(model)))

    def states(self, scene: Scene, rows: Sequence[Tokens]) -> dict[Where, Tensor]:
        """The same of the changed model; computed once for all measures."""
        return self._by_place(scene.model, scene.features(rows, *self._sites(scene.model)))

    def asked(self, scene: Scene, relation: str, owned: Sequence[tuple[int, Fact]]) -> Asked:
        """The facts of a relation, each with its owner, and the states of their prompts."""
        mine = [(owner, fact) for owner, fact in owned if fact.relation == relation]
        rows = [scene.model.encode(fact.prompt, owner=owner) for owner, fact in mine]
        return Asked(scene, [fact for _, fact in mine], rows, self.states(scene, rows))

    def _sites(self, model: ModelHandle) -> tuple[list[Site], tuple[Position, ...]]:
        return [Site(layer) for layer in self.layers(model)], POSITIONS

    def _by_place(self, model: ModelHandle, found: Tensor) -> dict[Where, Tensor]:
        return {
            (layer, position): found[i, j]
            for i, layer in enumerate(self.layers(model))
            for j, position in enumerate(POSITIONS)
        }


@dataclass(frozen=True)
class ProbeMeasure(Read, ABC):
    """Probes trained on the probe subjects of each relation.

    Frozen ones are trained on the unchanged model, retrained ones on the changed model, where every
    subject feels the change.

    Attributes:
        stride: every how many layers states are read; the last layer always is.
        least: subjects a class that a relation needs for its probes, on average.
    """

    kind: ClassVar[str] = "linear"

    least: int = 5

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What frozen probes depend on, besides the places, the facts and the seed."""

    @abstractmethod
    def train(
        self, states: States, labels: Sequence[str], dev: States, truth: Sequence[str], seed: int
    ) -> Kit:
        """Probes at every place.

        Args:
            states: of the probe subjects.
            labels: their objects.
            dev: states of the dev subjects.
            truth: their objects.
            seed: of all that is drawn.
        """

    def complete(self, kit: Kit, model: ModelHandle, sample: Sequence[Fact]) -> Kit:
        """The frozen kit with what only the unchanged model's kit has."""
        return kit

    def about_frozen(self, row: partial[Row], kit: Kit, target: Asked) -> Iterator[Row]:
        """Rows of baselines on target facts."""
        yield from baselines(row, kit, target.facts, target.states)

    def about_kit(
        self,
        row: partial[Row],
        protocol: str,
        kit: Kit,
        asked: Sequence[tuple[partial[Row], Asked]],
    ) -> Iterator[Row]:
        """Further rows of a frozen or retrained kit."""
        yield from ()

    def about_retrained(self, row: partial[Row], kit: Kit) -> Iterator[Row]:
        """Further rows of a retrained kit."""
        yield from ()

    def instead(self, row: partial[Row], kit: Kit, cause: str, target: Asked) -> Iterator[Row]:
        """Further rows where no probe can be retrained, for a cause."""
        yield from ()

    # -- on the unchanged model -------------------------------------------------------------------

    def prepare(self, model: ModelHandle, facts: Splits, seed: int) -> dict[str, Kit]:
        """Train the frozen probes of each relation that has enough subjects."""
        trained = {}
        for relation in sorted({fact.relation for fact in facts.target}):
            sample, dev = of_relation(facts.probe, relation), of_relation(facts.dev, relation)
            classes = len({fact.true for fact in sample})
            if classes >= 2 and len(sample) >= self.least * classes:
                trained[relation] = self._frozen(model, sample, dev, seed)
        return trained

    def _frozen(
        self, model: ModelHandle, sample: Sequence[Fact], dev: Sequence[Fact], seed: int
    ) -> Kit:
        def make() -> dict[str, Tensor]:
            rows = [model.encode(fact.prompt) for fact in (*sample, *dev)]
            found = self.features(model, rows)
            kit = self._kit(found, sample, dev, seed, list(found))
            return self.complete(kit, model, sample).tensors()

        labels = [fact.true for fact in sample]
        tensors = cached_tensors(self.name, self._key(model, sample, dev, seed), make)
        return Kit.restored(tensors, list(product(self.layers(model), POSITIONS)), labels)

    def _key(
        self, model: ModelHandle, sample: Sequence[Fact], dev: Sequence[Fact], seed: int
    ) -> dict[str, Any]:
        """All that the frozen probes depend on."""
        return {
            "version": 3,
            "model": model.state,
            "prefix": model.prefix,
            "batch_size": model.batch_size,
            "layers": self.layers(model),
            **self.settings(),
            "seed": seed,
            "facts": [[f.prompt.text, f.prompt.span, f.true] for f in sample],
            "dev": [[f.prompt.text, f.prompt.span, f.true] for f in dev],
        }

    def _kit(
        self,
        found: States,
        sample: Sequence[Fact],
        dev: Sequence[Fact],
        seed: int,
        places: Sequence[Where],
    ) -> Kit:
        """Probes at some places, of states of the sample's prompts and then the dev facts'."""
        n = len(sample)
        return self.train(
            {where: found[where][:n] for where in places},
            [fact.true for fact in sample],
            {where: found[where][n:] for where in places},
            [fact.true for fact in dev],
            seed,
        )

    # -- on the changed model ---------------------------------------------------------------------

    def measure(self, scene: Scene, prepared: Mapping[str, Kit]) -> Iterator[Row]:
        """Rows of the axis `recoverability`; definitions stand in docs/metrics.md.

        Args:
            scene: the changed model.
            prepared: frozen probes by relation.
        """
        asked = (*scene.facts.target, *scene.facts.test)
        ends = {f.id for f in asked if ends_with_subject(scene.model.encode(f.prompt))}
        for relation in sorted({fact.relation for fact in scene.facts.target}):
            rows = self._relation(scene, relation, prepared.get(relation))
            yield from labelled(rows, scene.change, ends)

    def _relation(self, scene: Scene, relation: str, kit: Kit | None) -> Iterator[Row]:
        row, facts = partial(scene.row("recoverability"), relation=relation), scene.facts
        if kit is None:
            cause = f"fewer than {self.least} probe subjects a class"
            null = partial(row, metric="probe_accuracy", value=None, n=0, note=cause)
            yield null(protocol="frozen" + KINDS[self.kind])
            return
        target = self.asked(scene, relation, list(enumerate(facts.target)))
        test = self.asked(scene, relation, scene.dealt(facts.test))
        groups = [(partial(row, split="target"), target), (partial(row, split="test"), test)]
        yield from self.about_frozen(groups[0][0], kit, target)
        after, cause = self._refit(scene, kit, relation)
        for protocol, each in [("frozen", kit), *([("retrained", after)] if after else [])]:
            yield from self.about_kit(row, protocol, each, groups)
            for of, group in groups:
                yield from accuracies(of, protocol, each, group.facts, group.states)
            yield from selectivities(row, protocol, each, test.facts, test.states, scene.seed)
        if after is not None:
            yield from self.about_retrained(row, after)
            return
        yield from undefined(row, kit, cause)
        yield from self.instead(row, kit, cause, target)

    def _refit(self, scene: Scene, frozen: Kit, relation: str) -> tuple[Kit | None, str]:
        """Probes trained on the changed model's states of probe subjects, where that is defined.

        Where the change cannot reach they are the frozen ones.
        """
        change, model = scene.change, scene.model
        if change.layer is None:
            return frozen, ""
        if change.independent:
            return None, "undefined for independent edits: no probe subject is edited"
        sample = of_relation(scene.facts.probe, relation)
        dev = of_relation(scene.facts.dev, relation)
        rows = [model.encode(fact.prompt) for fact in (*sample, *dev)]
        coincide = any(ends_with_subject(row) for row in rows[: len(sample)])
        places = [where for where in frozen.readers if change.reaches(*where, coincide)]
        if not places:
            return frozen, ""
        kit = self._kit(self.states(scene, rows), sample, dev, scene.seed, places)
        return kit.over(frozen), ""


def of_relation(facts: Sequence[Fact], relation: str) -> list[Fact]:
    """Those of one relation, in their order."""
    return [fact for fact in facts if fact.relation == relation]
