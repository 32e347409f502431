"""What is saved comes back bit for bit, and damage is told from data."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from palimpsest.errors import RequestError
from palimpsest.intervene.changes.composition import Composition, History
from palimpsest.intervene.changes.deltas import ReaderDeltas, WeightDeltas
from palimpsest.intervene.changes.erasure import Erasure
from palimpsest.intervene.controls import NoChange
from palimpsest.intervene.intervention import Intervention, Unchanged, load
from palimpsest.model.handle import ModelHandle
from palimpsest.model.site import Change, Site
from tests.intervene.conftest import TARGETS, splits

KINDS = [WeightDeltas, ReaderDeltas, Erasure, Unchanged]
MODEL = "0123456789abcdef" * 4


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers that no shorter format keeps."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INTERVENTIONS: dict[str, Intervention] = {
    "independent": WeightDeltas(
        change=Change("fact", True, 3),
        model=MODEL,
        left=noise(4, 1, 16).float(),
        right=noise(4, 1, 8, seed=1).float(),
    ),
    "joint, not contiguous": WeightDeltas(
        change=Change("fact", False, 0),
        model=MODEL,
        left=noise(16, 4, 1).float().transpose(0, 2),
        right=noise(8, 4, 1, seed=1).float().transpose(0, 2),
    ),
    "erasure": Erasure(
        change=Change("relation", False, 2, "attention", "last_subject"),
        model=MODEL,
        proj_left=noise(8, 3),
        proj_right=noise(8, 3, seed=1).T,
        bias=noise(8, seed=2),
    ),
    "readers": ReaderDeltas(
        change=Change("relation", False, 2, "mlp_norm"),
        model=MODEL,
        left=noise(24, 3),
        right=noise(3, 8, seed=1),
        shift=noise(16, seed=2),
    ),
    "readers without a bias": ReaderDeltas(
        change=Change("relation", False, 2, "attention_norm"),
        model=MODEL,
        left=noise(24, 3),
        right=noise(3, 8, seed=1),
        shift=noise(0),
    ),
    "unchanged": Unchanged(change=Change("fact", False, None), model=MODEL),
}


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_every_kind_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    saved = INTERVENTIONS[name]
    saved.save(tmp_path / "run" / "intervention")
    loaded = load(tmp_path / "run" / "intervention", kinds=KINDS)
    assert type(loaded) is type(saved)
    assert loaded.change == saved.change
    assert loaded.model == saved.model
    assert loaded.tensors().keys() == saved.tensors().keys()
    for tensor_name, tensor in saved.tensors().items():
        assert loaded.tensors()[tensor_name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors()[tensor_name], tensor)


def test_what_comes_back_changes_a_model_alike(model: ModelHandle, tmp_path: Path) -> None:
    width = model.w_out(0).shape[1]
    saved = WeightDeltas(
        change=Change("fact", False, 0),
        model=model.fingerprint,
        left=noise(1, 1, width).float(),
        right=noise(1, 1, model.width).float(),
    )
    saved.save(tmp_path)
    with saved.applied(model):
        expected = model.w_out(0).clone()
    with load(tmp_path, kinds=KINDS).applied(model):
        assert torch.equal(model.w_out(0), expected)


def test_the_last_of_two_saves_is_what_is_loaded(tmp_path: Path) -> None:
    for name in INTERVENTIONS:
        INTERVENTIONS[name].save(tmp_path)
        assert load(tmp_path, kinds=KINDS).change == INTERVENTIONS[name].change


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_safetensors_and_json_are_all_that_is_written(name: str, tmp_path: Path) -> None:
    INTERVENTIONS[name].save(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*")}
    assert files.keys() == {"intervention.json", "intervention.safetensors"}
    assert json.loads(files["intervention.json"])["kind"] == INTERVENTIONS[name].kind
    raw = files["intervention.safetensors"]
    size = int.from_bytes(raw[:8], "little")
    assert isinstance(json.loads(raw[8 : 8 + size]), dict)  # a pickle has no such header


def test_diagnostics_are_rows_and_stay_out_of_the_files(gpt2: ModelHandle, tmp_path: Path) -> None:
    fitted = NoChange().fit(gpt2, splits(TARGETS), Site(0))
    replace(fitted, diagnostics=("anything",)).save(tmp_path)
    assert load(tmp_path, kinds=KINDS) == fitted


# -- damage ----------------------------------------------------------------------------------------

TENSORS, DESCRIPTION = "intervention.safetensors", "intervention.json"


def edit(directory: Path, change: Callable[[dict], object]) -> None:
    """Change the JSON file's content."""
    description = json.loads((directory / DESCRIPTION).read_text())
    change(description)
    (directory / DESCRIPTION).write_text(json.dumps(description))


def truncate(path: Path, keep: int) -> None:
    """Keep the first bytes alone."""
    path.write_bytes(path.read_bytes()[:keep])


def other_tensors(directory: Path, name: str) -> None:
    """Put another intervention's tensors in their place."""
    INTERVENTIONS[name].save(directory / "other")
    (directory / "other" / TENSORS).replace(directory / TENSORS)


def enlarge(path: Path) -> None:
    """Make a file of 65 MB, which takes no room on the disk."""
    with path.open("r+b") as file:
        file.truncate(65 * 2**20)


def pipe(path: Path) -> None:
    """Put a pipe that nobody writes to in a file's place."""
    path.unlink()
    os.mkfifo(path)


def nest(path: Path) -> None:
    """A composition of one part, which is a composition of one part, and so on."""
    whole = json.loads(path.read_text()) | {"kind": "composition", "shapes": {}}
    raw = json.dumps(whole).removesuffix("}") + ', "parts": ['
    path.write_text(raw * 20 + "]}" * 20)
    safetensors.torch.save_file({}, path.with_suffix(".safetensors"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no description": lambda d: (d / DESCRIPTION).unlink(),
    "no tensors": lambda d: (d / TENSORS).unlink(),
    "neither": lambda d: [path.unlink() for path in d.iterdir()],
    "tensors cut short": lambda d: truncate(d / TENSORS, 300),
    "tensors empty": lambda d: truncate(d / TENSORS, 0),
    "tensors overwritten": lambda d: (d / TENSORS).write_bytes(b"\x80\x04nonsense" * 99),
    "description cut short": lambda d: truncate(d / DESCRIPTION, 40),
    "description not text": lambda d: (d / DESCRIPTION).write_bytes(b"\xff\xfe\x00"),
    "description a list": lambda d: (d / DESCRIPTION).write_text("[1, 2]"),
    "description null": lambda d: (d / DESCRIPTION).write_text("null"),
    "splits in letters": lambda d: edit(d, lambda j: j["change"].update(fitted_on="target")),
    "an unknown split": lambda d: edit(d, lambda j: j["change"].update(fitted_on=["all"])),
    "unknown kind": lambda d: edit(d, lambda j: j.update(kind="quantum")),
    "another kind": lambda d: edit(d, lambda j: j.update(kind="erasure")),
    "no kind": lambda d: edit(d, lambda j: j.pop("kind")),
    "no model": lambda d: edit(d, lambda j: j.pop("model")),
    "no change": lambda d: edit(d, lambda j: j.pop("change")),
    "unknown part of the change": lambda d: edit(d, lambda j: j["change"].update(colour="red")),
    "brackets": lambda d: (d / DESCRIPTION).write_text("[" * 10**6),
    "brackets in a key": lambda d: (d / DESCRIPTION).write_text('{"change":' * 10**5),
    "too large": lambda d: enlarge(d / DESCRIPTION),
    "a pipe": lambda d: pipe(d / DESCRIPTION),
    "tensors in a pipe": lambda d: pipe(d / TENSORS),
    "a directory": lambda d: ((d / DESCRIPTION).unlink(), (d / DESCRIPTION).mkdir()),
    "a kind of another type": lambda d: edit(d, lambda j: j.update(kind=[])),
    "a model of another type": lambda d: edit(d, lambda j: j.update(model=5)),
    "a change of another type": lambda d: edit(d, lambda j: j.update(change=[1])),
    "a flag of another type": lambda d: edit(d, lambda j: j["change"].update(independent=[])),
    "a layer of another type": lambda d: edit(d, lambda j: j["change"].update(layer="3")),
    "a layer below none": lambda d: edit(d, lambda j: j["change"].update(layer=-1)),
    "a policy that is none": lambda d: edit(d, lambda j: j["change"].update(policy="some")),
    "a site of another type": lambda d: edit(d, lambda j: j["change"].update(part={})),
    "failures of another type": lambda d: edit(d, lambda j: j["change"].update(failed=3)),
    "causes of another type": lambda d: edit(d, lambda j: j["change"].update(failed={"a": 3})),
    "a name of two lines": lambda d: edit(d, lambda j: j["change"].update({"a\nb": 1})),
    "parts of another type": lambda d: edit(d, lambda j: j.update(kind="composition", parts=7)),
    "no parts": lambda d: edit(d, lambda j: j.update(kind="composition")),
    "a number for a part": lambda d: edit(d, lambda j: j.update(kind="history", parts=[7])),
    "parts in parts": lambda d: nest(d / DESCRIPTION),
    "no steps": lambda d: edit(d, lambda j: j.update(kind="history", parts=[], steps=[])),
    "another's tensors": lambda d: other_tensors(d, "erasure"),
    "tensors of other shapes": lambda d: other_tensors(d, "joint, not contiguous"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_or_missing_is_refused(damage: str, tmp_path: Path) -> None:
    INTERVENTIONS["independent"].save(tmp_path)
    DAMAGE[damage](tmp_path)
    message = f"expected a saved intervention .* in {tmp_path}, found .*; name a run's"
    with pytest.raises(RequestError, match=message) as refused:
        load(tmp_path, kinds=[*KINDS, Composition, History])
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_a_kind_that_may_not_stand_there_is_refused(tmp_path: Path) -> None:
    INTERVENTIONS["erasure"].save(tmp_path)
    with pytest.raises(RequestError, match="KeyError: 'erasure'"):
        load(tmp_path, kinds=[WeightDeltas])
