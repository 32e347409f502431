"""All probes of one relation, trained on one sample of states, at every place at once."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from palimpsest.evaluate.probing.information import online_code
from palimpsest.evaluate.probing.mlp import train_mlps
from palimpsest.evaluate.probing.probes import Probe, Reduced, choose, fit, middle
from palimpsest.facts.fact import Fact
from palimpsest.model.site import Position

Where = tuple[int, Position]
"""A layer and a position."""

KINDS = {"linear": "", "mlp": "_mlp"}
"""Kinds of probes, and what their protocols end with."""


@dataclass(frozen=True)
class Recipe:
    """How probes are trained.

    Attributes:
        strengths: of the linear probes' penalty, inverse; one of them is chosen.
        seed: of permuted labels and of the order of the online code.
    """

    strengths: Sequence[float]
    seed: int


@dataclass(frozen=True)
class Reader:
    """What was trained at one place.

    Attributes:
        probes: by kind.
        controls: the same, trained on permuted labels.
        capacity: by kind, the control's accuracy on what it was trained on.
        bits: the length of the online code of the labels; NaN for MLPs, and of states not finite.
    """

    probes: Mapping[str, Probe]
    controls: Mapping[str, Probe]
    capacity: Mapping[str, float]
    bits: float


@dataclass(frozen=True)
class Kit:
    """What was trained on one sample.

    Attributes:
        readers: by place.
        labels: the objects of the sample.
        strength: C of the linear probes.
        chosen_on: dev facts that it was chosen on; 0 if it was not.
        embedding: a linear probe on the mean of the subject's input embeddings alone; None if there
            is none.
    """

    readers: Mapping[Where, Reader]
    labels: Sequence[str]
    strength: float
    chosen_on: int
    embedding: Probe | None = None

    def over(self, below: "Kit") -> "Kit":
        """With the other kit's readers where this one has none."""
        return replace(self, readers={**below.readers, **self.readers})

    def majority(self, barred: str | None) -> str:
        """The most common object of the sample but one, the first of equal ones."""
        kept = [label for label in sorted(self.labels) if label != barred]
        return Counter(kept).most_common(1)[0][0]

    def tensors(self) -> dict[str, Tensor]:
        """The whole as named tensors, labels apart."""
        found = {"strength": torch.tensor([self.strength, self.chosen_on], dtype=torch.float64)}
        for (layer, position), reader in self.readers.items():
            name = f"{layer}/{position}"
            found[f"{name}/bits"] = torch.tensor(reader.bits, dtype=torch.float64)
            for kind, value in reader.capacity.items():
                found[f"{name}/{kind}/capacity"] = torch.tensor(value, dtype=torch.float64)
                found |= _packed(f"{name}/{kind}", reader.probes[kind])
                found |= _packed(f"{name}/{kind}/control", reader.controls[kind])
        return found | ({} if self.embedding is None else _packed("embedding", self.embedding))

    @classmethod
    def restored(
        cls, tensors: Mapping[str, Tensor], places: Sequence[Where], labels: Sequence[str]
    ) -> "Kit":
        """What `tensors` gave."""
        classes = tuple(sorted(set(labels)))

        def reader(name: str) -> Reader:
            kinds = [kind for kind in KINDS if f"{name}/{kind}/capacity" in tensors]
            return Reader(
                {kind: _unpacked(f"{name}/{kind}", tensors, classes) for kind in kinds},
                {kind: _unpacked(f"{name}/{kind}/control", tensors, classes) for kind in kinds},
                {kind: float(tensors[f"{name}/{kind}/capacity"]) for kind in kinds},
                float(tensors[f"{name}/bits"]),
            )

        strength, chosen_on = tensors["strength"].tolist()
        readers = {(at, where): reader(f"{at}/{where}") for at, where in places}
        names = _unpacked("embedding", tensors, classes) if "embedding/weight" in tensors else None
        return cls(readers, labels, strength, int(chosen_on), names)


def _packed(name: str, probe: Probe) -> dict[str, Tensor]:
    parts = {"weight": probe.weight, "bias": probe.bias}
    if probe.hidden is not None:
        parts |= dict(zip(("hidden_weight", "hidden_bias"), probe.hidden, strict=True))
    return {f"{name}/{part}": tensor for part, tensor in parts.items()}


def _unpacked(name: str, tensors: Mapping[str, Tensor], classes: tuple[str, ...]) -> Probe:
    hidden = None
    if f"{name}/hidden_weight" in tensors:
        hidden = tensors[f"{name}/hidden_weight"], tensors[f"{name}/hidden_bias"]
    return Probe(tensors[f"{name}/weight"], tensors[f"{name}/bias"], classes, hidden)


def train_kit(
    states: Mapping[Where, Tensor],
    labels: Sequence[str],
    dev: Mapping[Where, Tensor],
    truth: Sequence[str],
    recipe: Recipe,
) -> Kit:
    """Train every probe and its control, and send the labels by the online code.

    Args:
        states: `[n, d_model]` by place, of the same subjects everywhere.
        labels: their objects; at least two different ones.
        dev: states `[k, d_model]` of the subjects that the strength is chosen on.
        truth: the objects of these; those that are no label choose nothing.
        recipe: how.
    """
    stacked = torch.stack(list(states.values()))
    reduced = Reduced.of(stacked)
    held = torch.stack([dev[where] for where in states])
    strength, chosen_on = chosen_strength(reduced, labels, recipe.strengths, held, truth)
    permuted = shuffled(labels, recipe.seed)
    probes, controls = (fit(reduced, each, strength) for each in (labels, permuted))
    fitted = zip(controls, stacked, strict=True)
    capacity = [_accuracy(probe, found, permuted) for probe, found in fitted]
    bits = online_code(reduced, labels, strength, recipe.seed).tolist()
    readers = _readers("linear", list(states), probes, controls, capacity, bits)
    return Kit(readers, labels, strength, chosen_on)


def chosen_strength(
    reduced: Reduced,
    labels: Sequence[str],
    strengths: Sequence[float],
    states: Tensor,
    truth: Sequence[str],
) -> tuple[float, int]:
    """The strength that does best on held-out subjects, and how many of them chose it.

    Args:
        reduced: what the probes are trained on.
        labels: its objects.
        strengths: to choose from.
        states: `[places, k, d_model]` of the held-out subjects.
        truth: their objects; those that are no label choose nothing.

    Returns:
        the middle strength and 0 where there is no choice, or fewer than two subjects to make it.
    """
    judges = [n for n, name in enumerate(truth) if name in labels]
    if len(judges) < 2 or len(strengths) < 2:
        return middle(strengths), 0
    wanted = [truth[n] for n in judges]
    return choose(reduced, labels, strengths, states[:, judges], wanted), len(judges)


def train_mlp_kit(
    states: Mapping[Where, Tensor], labels: Sequence[str], hidden: int, seed: int
) -> Kit:
    """Train an MLP probe and its control at every place.

    Args:
        states: `[n, d_model]` by place, of the same subjects everywhere.
        labels: their objects; at least two different ones.
        hidden: units of the hidden layer.
        seed: of permuted labels and of the weights.
    """
    reduced = Reduced.of(torch.stack(list(states.values())))
    (probes, controls), accuracy = train_mlps(
        reduced, [labels, shuffled(labels, seed)], hidden, seed
    )
    capacity = accuracy[1].masked_fill(~reduced.finite, torch.nan).tolist()
    nothing = [torch.nan] * len(states)
    return Kit(_readers("mlp", list(states), probes, controls, capacity, nothing), labels, 0.0, 0)


def _readers(
    kind: str,
    places: Sequence[Where],
    probes: Sequence[Probe],
    controls: Sequence[Probe],
    capacity: Sequence[float],
    bits: Sequence[float],
) -> dict[Where, Reader]:
    """What was trained at each place, all of one kind."""
    trained = zip(places, probes, controls, capacity, bits, strict=True)
    return {
        where: Reader({kind: probe}, {kind: control}, {kind: share}, length)
        for where, probe, control, share, length in trained
    }


def _accuracy(probe: Probe, states: Tensor, labels: Sequence[str]) -> float:
    """The share of states that the probe names right; NaN if some are not finite."""
    guesses = probe.predict(states)
    if None in guesses:
        return torch.nan
    return sum(a == b for a, b in zip(guesses, labels, strict=True)) / len(labels)


def shuffled(labels: Sequence[str], seed: int) -> list[str]:
    """The labels permuted: the control task of the probe subjects."""
    return random.Random(f"shuffled/{seed}").sample(list(labels), len(labels))


def control(fact: Fact, labels: Sequence[str], seed: int) -> str:
    """The control task's label of a subject that trains no probe, as frequent as in the sample."""
    return random.Random(f"control/{seed}/{fact.relation}/{fact.subject}").choice(list(labels))
