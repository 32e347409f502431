"""A change of weights made for good: a model directory that plain transformers loads, and back.

What is written is read back and must be, by its fingerprint, the very model that was meant; only
then does the directory appear. Beside the weights stand a record and the original values of the
changed matrices, from which `undo` restores the model bit for bit.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from palimpsest import __version__
from palimpsest.errors import RequestError, WriteError, nearest
from palimpsest.files import read_json, write_json, writing
from palimpsest.intervene.changes.composition import Parts
from palimpsest.intervene.changes.deltas import BiasShift, ReaderDeltas, WeightDeltas
from palimpsest.intervene.changes.dense import DenseDeltas
from palimpsest.intervene.changes.kinds import KINDS
from palimpsest.intervene.intervention import Intervention, Unchanged, load
from palimpsest.model.handle import ModelHandle
from palimpsest.model.load import Pretrained
from palimpsest.model.site import Site

RECORD = "palimpsest.json"
"""What was applied to which model."""

ORIGINAL = "palimpsest_original.safetensors"
"""The changed matrices as they were, by their names in the model's state dict."""

OPTION = "--output="
"""What names another place where one cannot be written."""


# -- what is applied -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """One change of weights, taken out of what a run has saved.

    Attributes:
        change: what is applied; every prompt feels it.
        digest: of the whole saved intervention.
        kind: of the whole saved intervention.
        fact: the fact whose change it is; None if all facts share it.
        step: the number of edits that it holds; None for the last state, or of one change.
        dtype: of the weights that it was fitted on, if the run's record tells.
    """

    change: Intervention
    digest: str
    kind: str
    fact: str | None
    step: int | None
    dtype: str | None


def choose(directory: Path, fact: str | None = None, step: int | None = None) -> Chosen:
    """Read a saved intervention, and take out of it what is to be applied.

    Args:
        directory: a run's directory, or the `intervention/` in it.
        fact: a fact's id, of an intervention with a change for each fact.
        step: a checkpoint, of a sequence of edits; None for its last state.

    Raises:
        RequestError: nothing saved there; no change of weights; no such fact or step; a fact is
            named, or none, where there is one change for all, or one for each.
    """
    whole = saved_in(directory)
    _check_weights(whole)
    change = whole if step is None else _at(whole, step)
    run = _folder(directory).parent
    if whole.change.independent or fact is not None:
        change = change.alone(_number(whole, run, fact))
    return Chosen(change, whole.digest, whole.kind, fact, step, _dtype(run))


def saved_in(directory: Path) -> Intervention:
    """The intervention of a run.

    Raises:
        RequestError: there is none, or it is damaged.
    """
    return load(_folder(directory), KINDS)


def _folder(directory: Path) -> Path:
    inner = directory / "intervention"
    return (inner if inner.is_dir() else directory).absolute()


def _check_weights(whole: Intervention) -> None:
    """Refuse what does not stand in weights.

    Raises:
        RequestError: an erasure, or no change at all.
    """
    if isinstance(whole, Parts):
        for each in whole.parts:
            _check_weights(each)
    elif isinstance(whole, Unchanged):
        raise RequestError(
            "expected a change of weights, found a run that changes nothing (intervene=none); "
            "name another run"
        )
    elif not isinstance(whole, WeightDeltas | DenseDeltas | BiasShift | ReaderDeltas):
        raise RequestError(
            f"expected a change of weights, found kind {whole.kind!r}: it acts on chosen tokens' "
            f"states at layer {whole.change.layer} while the model runs, which no weight can hold; "
            "apply it in Python by `with intervention.applied(model):`, or name the run of an "
            "editor, leace_weights or leace_readers"
        )


def _at(whole: Intervention, step: int) -> Intervention:
    if step in whole.checkpoints:
        return whole.at(step)
    if whole.checkpoints:
        valid = ", ".join(map(str, whole.checkpoints))
        raise RequestError(f"expected --step to be one of {valid}, found {step}; name one of these")
    raise RequestError(
        f"expected --step of a run with protocol=sequential alone, found {step} with a "
        f"{whole.kind.replace('_', ' ')}; leave --step out"
    )


def _number(whole: Intervention, run: Path, fact: str | None) -> int:
    """The place of a fact among those that an independent intervention changes."""
    if not whole.change.independent:
        raise RequestError(
            f"expected --fact of a run with protocol=independent alone, found {fact!r} with one "
            "change for all facts; leave --fact out"
        )
    ids = _facts(run, _count(whole))
    if fact is None:
        raise RequestError(
            f"expected --fact ID, found none: each of {len(ids)} facts has a change of its own; "
            f"name one, such as {ids[0]!r}, or run with protocol=batch"
        )
    if fact not in ids:
        raise RequestError(f"expected a target fact's id, found {fact!r}; {nearest(fact, ids)}")
    if fact in whole.change.failed:
        raise RequestError(
            f"expected a fact that was changed, found {fact!r} ({whole.change.failed[fact]!r}); "
            "name another"
        )
    return ids.index(fact)


def _facts(run: Path, count: int) -> list[str]:
    """The ids of a run's target facts, in the order of their changes."""
    try:
        ids = [str(fact["fact_id"]) for fact in read_json(run / "facts.json")]
        if len(ids) != count:
            raise ValueError(f"{len(ids)} facts for {count} changes")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RequestError(
            f"expected facts.json in {run}, which tells whose change is whose, found "
            f"{type(error).__name__}: {error}; name a finished run's directory"
        ) from error
    return ids


def _count(change: Intervention) -> int:
    """How many facts have a change of their own."""
    first = change.parts[0] if isinstance(change, Parts) else change
    return len(next(iter(first.tensors().values())))


def _dtype(run: Path) -> str | None:
    """The model's dtype by a run's record, if there is one."""
    try:
        found = read_json(run / "run.json")["config"]["model"]["dtype"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return str(found)


# -- what is recorded ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What `palimpsest.json` says.

    Attributes:
        version: Palimpsest's.
        command: the command line.
        intervention: its digest and kind, and which fact's change or which step was taken.
        model: name and fingerprint of the original.
        fingerprint: of the changed model.
        dtype: of the weights.
        changed: names of the changed matrices in the state dict.
    """

    version: str
    command: str
    intervention: Mapping[str, Any]
    model: Mapping[str, str]
    fingerprint: str
    dtype: str
    changed: Sequence[str]

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The record in a model directory.

        Raises:
            RequestError: `apply` has not written that directory.
        """
        try:
            found = read_json(directory / RECORD)
            record = cls(**{field.name: found[field.name] for field in fields(cls)})
            model = (record.model["name"], record.model["fingerprint"])
            named = (record.intervention["digest"], *model, *record.changed)
            if not all(isinstance(name, str) for name in (record.fingerprint, *named)):
                raise TypeError("not a text")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RequestError(
                f"expected a model directory that `palimpsest apply` has written, found no record "
                f"of a change in {directory / RECORD} ({type(error).__name__}); name the --output "
                "of an earlier `palimpsest apply`"
            ) from error
        return record


# -- there -----------------------------------------------------------------------------------------


def apply(source: Pretrained, chosen: Chosen, output: Path, command: str = "") -> Record:
    """Write the changed model as a directory that transformers' `from_pretrained` loads.

    The dtype is that of the loaded weights; W + ΔW is summed in float32 and rounded once, as in the
    run. At most one copy of the model is in memory at a time.

    Args:
        source: where the original comes from.
        chosen: the change.
        output: must not exist, or be an empty directory; appears whole or not at all.
        command: for the record.

    Raises:
        RequestError: the change was fitted on another model, alters nothing, or `output` is taken
            or cannot be written.
        WriteError: there is no room, or what was written is not what is read back.
    """
    with _appearing(output) as folder:
        record = _write_changed(source.load(), chosen, folder, command)
        _check_written(source, folder, record.fingerprint)
    return record


def _write_changed(handle: ModelHandle, chosen: Chosen, folder: Path, command: str) -> Record:
    names = _names(handle, chosen.change)
    before = {name: handle.model.get_parameter(name).detach().cpu().clone() for name in names}
    with chosen.change.applied(handle):
        original = {name: kept for name, kept in before.items() if not _equal(handle, name, kept)}
        if not original:
            raise RequestError(
                "expected a change that alters weights, found none that does so in "
                f"{handle.model.dtype}; name another run or fact"
            )
        record = Record(
            __version__,
            command,
            {
                "digest": chosen.digest,
                "kind": chosen.kind,
                "fact": chosen.fact,
                "step": chosen.step,
            },
            {"name": handle.name, "fingerprint": handle.fingerprint},
            _fingerprint(handle),
            str(handle.model.dtype).removeprefix("torch."),
            sorted(original),
        )
        _save(handle, folder)
    safetensors.torch.save_file(original, folder / ORIGINAL)
    (folder / ORIGINAL).chmod(0o644)
    write_json(folder / RECORD, asdict(record))
    return record


def _names(handle: ModelHandle, change: Intervention) -> list[str]:
    """The names of the parameters that a change of weights may alter."""
    names = {id(parameter): name for name, parameter in handle.model.named_parameters()}
    return sorted({names[id(parameter)] for parameter in _parameters(handle, change)})


def _parameters(handle: ModelHandle, change: Intervention) -> Iterator[nn.Parameter]:
    """The parameters themselves."""
    if isinstance(change, Parts):
        for each in change.parts:
            yield from _parameters(handle, each)
        return
    assert change.change.layer is not None
    layer = handle.check_layer(change.change.layer)
    if isinstance(change, ReaderDeltas):
        for module in handle.reading(change.site):
            yield from module.parameters(recurse=False)
    else:
        name = "bias" if isinstance(change, BiasShift) else "weight"
        yield handle.module(Site(layer, "mlp")).get_parameter(name)


def _equal(handle: ModelHandle, name: str, value: Tensor) -> bool:
    return torch.equal(handle.model.get_parameter(name).detach().cpu(), value)


def _fingerprint(handle: ModelHandle) -> str:
    """The model's fingerprint as it is now; a handle keeps that of the moment it first told."""
    return ModelHandle(handle.model, handle.tokenizer, handle.name).fingerprint


# -- and back --------------------------------------------------------------------------------------


def undo(source: Pretrained, output: Path, intervention: Path | None = None) -> Record:
    """Write the original of a model directory that `apply` has written.

    Its tensors are the original's bit for bit, and so is its fingerprint.

    Args:
        source: its path is that directory; the record tells the dtype.
        output: as of `apply`.
        intervention: if given, it must be what was applied.

    Returns:
        the record of what was undone.

    Raises:
        RequestError: no record there; the model is not what `apply` left; another intervention.
        WriteError: there is no room, or what was written is not what is read back.
    """
    directory = Path(source.path or "")
    record = Record.read(directory)
    if intervention is not None:
        _check_same(record, saved_in(intervention))
    source = replace(source, dtype=record.dtype)
    with _appearing(output) as folder:
        _write_original(source.load(), record, directory, folder)
        _check_written(source, folder, record.model["fingerprint"])
    return record


def _check_same(record: Record, given: Intervention) -> None:
    applied = record.intervention["digest"]
    if given.digest != applied:
        raise RequestError(
            f"expected the intervention {applied[:12]} that was applied, found "
            f"{given.digest[:12]}; leave --intervention out, or name the right one"
        )


def _write_original(handle: ModelHandle, record: Record, directory: Path, folder: Path) -> None:
    if handle.fingerprint != record.fingerprint:
        raise RequestError(
            f"expected the model {record.fingerprint[:12]} that `palimpsest apply` wrote in "
            f"{directory}, found {handle.fingerprint[:12]}: it was changed since, and cannot be "
            "undone; apply the intervention anew"
        )
    _restore(handle, _original(directory, record))
    if _fingerprint(handle) != record.model["fingerprint"]:
        raise _damaged(directory, "other values than the original's")
    _save(handle, folder)


def _original(directory: Path, record: Record) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(directory / ORIGINAL)
    except (OSError, SafetensorError) as error:
        raise _damaged(directory, f"{type(error).__name__}: {error}") from error
    if sorted(tensors) != sorted(record.changed):
        raise _damaged(directory, "the values of other matrices")
    return tensors


def _restore(handle: ModelHandle, original: Mapping[str, Tensor]) -> None:
    own = dict(handle.model.named_parameters())
    for name, value in original.items():
        if name in own and own[name].shape == value.shape:
            own[name].data.copy_(value)


def _damaged(directory: Path, found: str) -> RequestError:
    return RequestError(
        f"expected the original values of the changed matrices in {directory / ORIGINAL}, found "
        f"{found}; take the original model itself"
    )


# -- a directory that appears whole ----------------------------------------------------------------


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """Yield a new directory beside `output`, which becomes `output` if all goes well inside.

    Raises:
        RequestError: `output` is taken, or cannot be written.
        WriteError: there is no room.
    """
    output = output.resolve()
    _check_free(output)
    with (
        writing(output, OPTION),
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as place,
    ):
        folder = Path(place) / "model"
        folder.mkdir()
        yield folder
        _check_free(output)
        folder.rename(output)


def _check_free(output: Path) -> None:
    try:
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError:
        taken = True
    if taken:
        raise RequestError(
            f"expected --output to name a directory that does not exist or is empty, found "
            f"something at {output}; name another"
        )
    if not output.parent.is_dir():
        raise RequestError(
            f"expected --output in a directory that exists, found none at {output.parent}; make it"
        )


def _save(handle: ModelHandle, folder: Path) -> None:
    """Model, generation settings and tokenizer, as transformers writes them."""
    handle.model.save_pretrained(folder)
    handle.tokenizer.save_pretrained(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)


def _check_written(source: Pretrained, folder: Path, fingerprint: str) -> None:
    """Read a model back.

    Raises:
        WriteError: it is another than was to be written.
    """
    found = replace(source, path=str(folder), revision=None).load().fingerprint
    if found != fingerprint:
        raise WriteError(
            f"cannot keep the model: {fingerprint[:12]} was written by save_pretrained, and "
            f"{found[:12]} is read back by from_pretrained; nothing is left behind"
        )
