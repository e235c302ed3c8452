"""Checkpoints that are damaged, foreign or hostile are refused in one line, and nothing of them is executed."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_faults import state_of
from equality import equal

from sdpnet.checkpoints.file import load_checkpoint, plain_state, write_checkpoint
from sdpnet.pipelines.errors import UserError


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: not a") and "\n" not in str(caught.value)


class Code:
    """Writes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


class Call:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Packs the members anew."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def larger_storage(name: str, content: bytes) -> bytes:
    """300 elements become 2,147,483,647."""
    changed = content.replace(b"M\x2c\x01", b"J\xff\xff\xff\x7f") if name.endswith("data.pkl") else content
    assert changed != content or not name.endswith("data.pkl")
    return changed


HUGE = torch.zeros(1).expand(1 << 50)
STATES: dict[str, tuple[Callable[[dict[str, Any], Path], Any], str]] = {
    "code": (lambda s, marker: {**s, "model": Code(marker)}, "would call"),
    "code in a list": (lambda s, marker: {**s, "guard": [Code(marker)]}, "would call"),
    "60 GB of bytes": (lambda s, _: {**s, "guard": Call(bytearray, 60 << 30)}, "would call .*bytearray"),
    "petabytes in one element": (lambda s, _: {**s, "model": {"a": HUGE}}, "claims more elements"),
    "petabytes in the optimizer": (lambda s, _: {**s, "optimizer": {"state": [HUGE]}}, "claims more elements"),
    "a tensor without a device": (
        lambda s, _: {**s, "model": {"a": torch.empty(1 << 50, device="meta")}},
        "would call",
    ),
    "a sparse tensor": (lambda s, _: {**s, "model": {"a": torch.eye(3).to_sparse()}}, "would call"),
    "a numpy array": (lambda s, _: {**s, "guard": np.zeros(3)}, "would call"),
    "no dict": (lambda s, _: [s], "a list"),
    "no model": (lambda s, _: {k: v for k, v in s.items() if k != "model"}, "lacks model"),
    "no order": (lambda s, _: {k: v for k, v in s.items() if k != "order"}, "lacks order"),
    "optimizer is a number": (lambda s, _: {**s, "optimizer": 3}, "lacks optimizer"),
    "weights are numbers": (lambda s, _: {**s, "model": {"a": 3}}, "model is not weights"),
    "ema without names": (lambda s, _: {**s, "ema": {1: torch.zeros(1)}}, "ema is not weights"),
    "version 3": (lambda s, _: {**s, "version": 3}, "version 3"),
    "version 'x'": (lambda s, _: {**s, "version": "x" * 999}, "version 'xxx"),
    "a NaN": (lambda s, _: {**s, "model": {"a": torch.tensor([1.0, float("nan")])}}, r"model\.a is not finite"),
    "an infinite average": (lambda s, _: {**s, "ema": {"a": torch.tensor(-float("inf"))}}, r"ema\.a is not finite"),
}


@pytest.mark.parametrize(("change", "match"), STATES.values(), ids=STATES)
def test_hostile_states(change: Callable[[dict[str, Any], Path], Any], match: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "step_00000001.pt", tmp_path / "executed"
    torch.save(change(state_of(1), marker), path)
    refused(path, match)
    assert os.listdir(tmp_path) == [path.name]


def foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")


def old_format(path: Path) -> None:
    torch.save(state_of(1), path, _use_new_zipfile_serialization=False)


def duplicate(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"N.")


def marked_as_a_directory(path: Path) -> None:
    """One bit of the archive's directory: torch then reads no byte of the tensor, and leaves its memory as it was."""
    with zipfile.ZipFile(path) as archive:
        names, entry = archive.namelist(), archive.start_dir
    content = bytearray(path.read_bytes())
    for name in names[: names.index("archive/data/0")]:
        entry += 46 + len(name)
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + 38] ^= 0x10
    path.write_bytes(content)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not written by torch.save"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "not written by torch.save"),
    "text": (lambda path: path.write_text("weights"), "not written by torch.save"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Call(os.abort))), "not written by torch.save"),
    "torch's old format": (old_format, "not written by torch.save"),
    "cut by one byte": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
    "its first half": (lambda path: path.write_bytes(path.read_bytes()[:3000]), "damaged"),
    "bytes before it": (lambda path: path.write_bytes(b"\x80\x02N." + path.read_bytes()), "damaged"),
    "another program's zip": (foreign_zip, "not written by torch.save"),
    "compressed": (lambda path: rewrite(path, lambda _, data: data, zipfile.ZIP_DEFLATED), "compressed"),
    "a larger storage than there is": (lambda path: rewrite(path, larger_storage), "does not match|size"),
    "two members of one name": (duplicate, "two members"),
    "a tensor marked as a directory": (marked_as_a_directory, "marked as a directory"),
    "a directory": (replaced(Path.mkdir), "directory|not a file"),
    "a pipe": (replaced(lambda path: os.mkfifo(path)), "not a file"),
    "a link to nothing": (replaced(lambda path: path.symlink_to("nowhere")), "No such file"),
    "a link to a device": (replaced(lambda path: path.symlink_to("/dev/zero")), "not a file"),
    "a link to itself": (replaced(lambda path: path.symlink_to(path.name)), "symbolic links"),
}


@pytest.mark.parametrize(("change", "match"), FILES.values(), ids=FILES)
def test_damaged_files(change: Callable[[Path], object], match: str, tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.pt"
    write_checkpoint(path, state_of(1))
    change(path)
    refused(path, match)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("stride", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_no_flipped_bit_changes_a_state(tmp_path: Path, stride: int) -> None:
    """The file is refused, or the bit meant nothing."""
    path = tmp_path / "step_00000001.pt"
    state = state_of(1, 4)
    write_checkpoint(path, state)
    content = path.read_bytes()
    refusals = 0
    bits = range(0, 8 * len(content), stride)
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert equal(load_checkpoint(path), state), bit
        except UserError:
            refusals += 1
    assert refusals > len(bits) / 4


def test_a_state_survives_a_round_trip_and_torch_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "step_00000007.pt"
    size = write_checkpoint(path, state_of(7))
    assert size == path.stat().st_size and os.listdir(tmp_path) == [path.name]
    assert equal(load_checkpoint(path), state_of(7))
    assert equal(torch.load(path, weights_only=True), state_of(7))


def test_version_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.pt"
    old = {"model": torch.nn.Linear(2, 3).state_dict()}
    torch.save({**old, **{name: {} for name in ("optimizer", "scaler", "cursor", "order", "evaluation")}}, path)
    assert isinstance(old["model"], OrderedDict) and equal(load_checkpoint(path)["model"], old["model"])


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    state = state_of(1)
    state["model"]["b"][1, 1] = float("inf")
    with pytest.raises(UserError, match=r"not saved, because model\.b is not finite"):
        write_checkpoint(tmp_path / "step_00000001.pt", state)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "value", [np.float64(1), {1, 2}, b"x", Path("x"), io.BytesIO()], ids=lambda v: type(v).__name__
)
def test_what_could_not_be_loaded_is_not_saved(value: object) -> None:
    with pytest.raises(TypeError, match=r"^guard\.0\.x: a checkpoint cannot hold a"):
        plain_state({"guard": [{"x": value}]}, lambda tensor, _: tensor)
