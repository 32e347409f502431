"""Intervention: what a method leaves behind. Frozen tensors, never a model.

An intervention is applied for the length of a context and leaves the model as it was, bit for bit,
also after an error or Ctrl-C. It is saved as safetensors and JSON.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, get_args

import safetensors.torch
import torch
from torch import Tensor

from palimpsest.errors import RequestError, visible
from palimpsest.facts.dataset import SPLITS
from palimpsest.facts.splits import Splits
from palimpsest.files import atomic, write_json
from palimpsest.intervene.moments import SampledMoments
from palimpsest.model.difference import Difference
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Part, Policy, Site
from palimpsest.record.row import Row

_LARGEST = 64 * 2**20
"""Bytes of an `intervention.json`; a thousand edits' take a hundredth of that."""

_DEEPEST = 16
"""Levels of parts in parts; a history of pairs of erasers of all layers has four."""

_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
    safetensors.SafetensorError,
)
"""What a damaged file raises where it is read."""


class Method(Protocol):
    """Hyper-parameters only. Everything else comes with the call to `fit`.

    All that the rest of the code asks of a method is declared here. `method.MethodBase` has the
    usual answers.
    """

    @property
    def part(self) -> str:
        """The part of a block that the method changes."""
        ...

    @property
    def place(self) -> str:
        """The row of the model's usual layers (`depths`) that it goes by; normally the part."""
        ...

    @property
    def lowest(self) -> int:
        """The lowest layer at which it has room."""
        ...

    @property
    def scope(self) -> str:
        """What it is fitted on: `fact`, single facts, or `relation`, all facts of a relation."""
        ...

    @property
    def imitates(self) -> "Method | None":
        """The method of which this one is a control; None if it is no control."""
        ...

    @property
    def sited(self) -> bool:
        """Whether the site matters; if not, runs at different layers are one run."""
        ...

    def sampled_moments(self, model: ModelHandle, site: Site) -> SampledMoments | None:
        """Second moments over text sampled from the model that a fit takes; None if it does not."""
        ...

    def with_moments(self, tokens: int, length: int) -> "Method":
        """The method with second moments over so many tokens of text, in rows of `length` tokens.

        A method that takes no second moments, or those that it was given, returns itself.
        """
        ...

    def fit(self, model: ModelHandle, facts: Splits, site: Site) -> "Intervention":
        """Compute an intervention; the model is left untouched."""
        ...


@dataclass(frozen=True, kw_only=True)
class Intervention(ABC):
    """A change of a model, as data.

    Attributes:
        change: where it begins and whose it is.
        model: fingerprint of the model it was fitted on.
        diagnostics: rows of the axis `cost` that the fit measured.
    """

    kind: ClassVar[str]
    change: Change
    model: str
    diagnostics: tuple[Row, ...] = field(default=(), compare=False)

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors, by name; also the constructor's arguments."""

    @abstractmethod
    def changing(self, handle: ModelHandle) -> AbstractContextManager[None]:
        """Change the model while the context lasts; `applied` without its checks."""

    def differences(self) -> tuple[Difference, ...]:
        """W' − W, a difference or several for each layer whose W_out is changed; none if none is.

        Those of one layer add up. Of biases and other matrices, and of what hooks do to states,
        nothing is told.
        """
        return ()

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Numbers of edits after which a sequence of edits can be measured; none of one change."""
        return ()

    def at(self, step: int) -> "Intervention":
        """The change as it was after `step` edits, one of `checkpoints`.

        Raises:
            ValueError: there is no such checkpoint.
        """
        raise ValueError(f"no checkpoint after {step} edits")

    def plus(self, other: "Intervention") -> "Intervention":
        """This change and then another of its kind at the same place, as one.

        Raises:
            TypeError: such changes do not add up.
        """
        raise TypeError(f"{self.kind} cannot be added to")

    def alone(self, fact: int) -> "Intervention":
        """The change of one fact, as one that every prompt feels.

        Args:
            fact: its place among the target facts.

        Raises:
            TypeError: the facts' changes do not stand apart.
        """
        raise TypeError(f"{self.kind} holds no change of one fact")

    @contextmanager
    def applied(self, handle: ModelHandle, owner: int | None = None) -> Iterator[None]:
        """Change the model while the context lasts, for whoever calls it.

        Args:
            handle: the model.
            owner: of an independent change, the fact whose change every row of every forward pass
                feels, whatever owner it brings: what stands in weights is really changed, as
                `palimpsest apply` does. None: each row of our own forward passes feels its owner's
                change, and calls by other code are refused.

        Raises:
            RequestError: the intervention was fitted on another model, all facts share one change,
                or there is no such fact.
        """
        self.check_model(handle)
        change = self if owner is None else self._of(owner)
        with change.changing(handle):
            handle.changes.append(change.digest)
            try:
                yield
            finally:
                handle.changes.pop()

    def _of(self, owner: int) -> "Intervention":
        if not self.change.independent:
            raise RequestError(
                f"expected an owner of independent changes alone, found owner={owner} with one "
                "change for all facts; leave owner out"
            )
        return self.alone(owner)

    def check_model(self, handle: ModelHandle) -> None:
        """Refuse a model other than the one that the intervention was fitted on.

        Raises:
            RequestError: the fingerprints differ.
        """
        if handle.fingerprint != self.model:
            raise RequestError(
                f"expected the model with fingerprint {self.model[:12]} that this intervention was "
                f"fitted on, found {handle.fingerprint[:12]}; load that model or fit anew"
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what it is and every tensor."""
        hashed = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            hashed.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            hashed.update(raw.numpy().data)
        return hashed.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What `intervention.json` says besides the tensors' shapes."""
        return {"kind": self.kind, "model": self.model, "change": asdict(self.change)}

    def save(self, directory: Path) -> None:
        """Write `intervention.safetensors` and `intervention.json`, each atomically."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        with atomic(directory / "intervention.safetensors") as temporary:
            safetensors.torch.save_file(tensors, temporary)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        write_json(directory / "intervention.json", self.describe() | {"shapes": shapes})

    @classmethod
    def from_saved(
        cls,
        description: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        kinds: "Mapping[str, type[Intervention]]",
    ) -> Self:
        """The intervention that `save` described; `kinds` are those that it may be made of."""
        fields: dict[str, Any] = dict(tensors)
        return cls(change=described(description), model=description["model"], **fields)


def described(description: Mapping[str, Any]) -> Change:
    """The change that `Intervention.describe` tells of.

    Raises:
        KeyError, TypeError: something is missing, or of another type.
    """
    told = dict(description["change"])
    unknown = ["target", "fit"] if told["scope"] == "relation" else []
    fitted_on = told.get("fitted_on", unknown)
    if not isinstance(fitted_on, list) or not set(fitted_on) <= set(SPLITS):
        raise TypeError("fitted_on is no list of splits")
    change = Change(**told | {"fitted_on": tuple(fitted_on)})
    named: list[tuple[str, tuple[str, ...]]] = [
        (change.scope, ("fact", "relation")),
        (change.part, get_args(Part)),
        (change.policy, get_args(Policy)),
    ]
    layer = change.layer is None or (type(change.layer) is int and change.layer >= 0)
    flags = (change.independent, change.gated)
    texts = (description["model"], *change.failed, *change.failed.values(), *change.fitted_on)
    if not (
        layer
        and all(value in valid for value, valid in named)
        and all(isinstance(flag, bool) for flag in flags)
        and all(isinstance(text, str) for text in texts)
    ):
        raise TypeError("a change with values of other types")
    return change


@dataclass(frozen=True, kw_only=True)
class Unchanged(Intervention):
    """No change at all: what everything is compared with."""

    kind: ClassVar[str] = "unchanged"

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def changing(self, handle: ModelHandle) -> AbstractContextManager[None]:
        """Change nothing."""
        return nullcontext()


def load(directory: Path, kinds: Sequence[type[Intervention]]) -> Intervention:
    """Read what `save` wrote.

    Args:
        directory: holds `intervention.json` and `intervention.safetensors`.
        kinds: the classes that may stand in it.

    Raises:
        RequestError: not an intervention, or damaged.
    """
    try:
        description = _read(directory / "intervention.json")
        tensors = _tensors(directory / "intervention.safetensors")
        by_name = {kind.kind: kind for kind in kinds}
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if _levels(description) > _DEEPEST:
            raise ValueError(f"parts in parts, more than {_DEEPEST} levels of them")
        if shapes != description["shapes"]:
            raise ValueError("tensors of other shapes than the description says")
        return by_name[description["kind"]].from_saved(description, tensors, by_name)
    except _UNREADABLE as error:
        missing = isinstance(error, FileNotFoundError)
        found = "none" if missing else visible(f"{type(error).__name__}: {error}"[:200])
        raise RequestError(
            f"expected a saved intervention (intervention.json and intervention.safetensors) in "
            f"{directory}, found {found}; name a run's directory or its intervention/"
        ) from error


def _read(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError, ValueError, RecursionError: no file, too large, not JSON or nested too deep.
    """
    with _plain(path).open("rb") as file:
        raw = file.read(_LARGEST + 1)
    if len(raw) > _LARGEST:
        raise ValueError(f"more than {_LARGEST >> 20} MB in {path.name}")
    return json.loads(raw)


def _levels(description: Any) -> int:
    return 1 + max(map(_levels, description.get("parts", ())), default=0)


def _tensors(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(_plain(path))


def _plain(path: Path) -> Path:
    """A path, if a file is there; to read a pipe would not end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name} is no file")
    return path
