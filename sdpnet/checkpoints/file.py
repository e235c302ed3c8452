"""One checkpoint file: it is written completely or not at all, and it is checked before it is read.

A checkpoint is a file of `torch.save`: a zip archive with uncompressed members, each with its CRC-32. `torch.load`
ignores the CRC-32s, trusts the sizes that the archive claims, and may call more functions than a checkpoint needs, even
with `weights_only`. All of this is therefore checked before the file is passed to `torch.load`.
"""

from __future__ import annotations

import errno
import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from sdpnet.checkpoints.sections import VERSION, defect
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import errors_name, partial_path, publish, write_all
from sdpnet.pipelines.files.regular import open_regular_file

__all__ = ["VERSION", "Refusal", "load_checkpoint", "plain_state", "refusals", "write_atomically", "write_checkpoint"]

# The only names in the pickle of a state: tensors, their storages, and the (empty) mapping of a tensor's hooks.
_GLOBAL: Final = re.compile(r"torch\._utils _rebuild_tensor_v2|torch [A-Za-z0-9]+Storage|collections OrderedDict")
# The bit in a member's attributes that marks a directory. torch.load reads no byte of such a member and returns
# uninitialised memory as its tensor. No checksum covers this bit (records/LOG.md, 2026-11-23).
_DIRECTORY: Final = 0x10
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class Refusal(UserError):
    """The system refused to write a file; a later try may succeed. `cause` is the message without the advice."""

    def __init__(self, cause: str, advice: str) -> None:
        super().__init__(f"{cause}; {advice}")
        self.cause = cause


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turns an `OSError` on writing `path` into a `Refusal`."""
    try:
        yield
    except OSError as error:
        advice = "free some space and continue with --resume" if error.errno in _FULL else "continue with --resume"
        cause = f"{path}: cannot be written ({error.strerror})"
        raise Refusal(cause, f"what was saved before is still there: {advice}") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)`, syncs the file to the disk and renames it to `path`. An `OSError` names `path`."""
    temporary = partial_path(path)
    with errors_name(path):
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            publish(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def plain_state(
    state: Any, replace_tensor: Callable[[Tensor, tuple[Any, ...]], Tensor], where: tuple[Any, ...] = ()
) -> Any:
    """A copy of `state` in plain dicts, lists and tuples, in which each tensor is replaced.

    Args:
        replace_tensor: is called with a tensor and its path of keys in `state`; returns the tensor's replacement.
        where: the path of keys that leads to `state`.

    Raises:
        TypeError: a value is none of these, no number, no text and not None. `load_checkpoint` would refuse it.
    """
    if isinstance(state, Tensor):
        return replace_tensor(state.detach(), where)
    if isinstance(state, Mapping):
        return {key: plain_state(value, replace_tensor, (*where, key)) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(plain_state(value, replace_tensor, (*where, index)) for index, value in enumerate(state))
    if type(state) not in (int, float, str, bool, type(None)):
        raise TypeError(f"{'.'.join(map(str, where))}: a checkpoint cannot hold a {type(state).__name__}")
    return state


class _Output:
    """The file that `torch.save` writes to.

    It keeps the first error instead of raising it, because an error that passes through torch's writer is lost.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.size = descriptor, 0
        self.error: OSError | None = None

    def write(self, content: memoryview) -> int:
        if self.error is None:
            try:
                write_all(self.descriptor, content, self.size)
                self.size += len(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        pass


def write_checkpoint(path: Path, state: dict[str, Any]) -> int:
    """Writes a state of plain values to `path` and returns the file's size in bytes.

    Raises:
        UserError: a weight is NaN or infinite, so that the checkpoint could not be loaded. Nothing is written.
        OSError: the system refuses to write. An earlier file at `path` stays, and no temporary file is left.
    """
    if (name := _non_finite(state)) is not None:
        raise UserError(f"{path}: not saved, because {name} is not finite; the checkpoints before it are still there")
    partial = partial_path(path)
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            output = _Output(descriptor)
            torch.save(state, output)  # type: ignore[arg-type]
            if output.error is not None:
                raise output.error
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        publish(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return output.size


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads the state that a training run saved, with its tensors on the CPU.

    The state is of version 2, or of version 1, which has no key "version". Nothing in the file is executed, and no more
    memory is allocated than the file has bytes.

    Raises:
        UserError: the file is damaged, unfinished, not a checkpoint or hostile, or a weight in it is not finite.
    """
    try:
        # One open file is both checked and read, so that replacing the file in between has no effect.
        with open(open_regular_file(path), "rb") as file:
            _require_intact(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
            _require_real_tensors(state)
            what = defect(state)
            name = None if what else _non_finite(state)
    except OSError as error:
        raise UserError(f"{path}: not a readable checkpoint ({error.strerror or error})") from None
    except Exception as error:  # a hostile file makes zipfile and torch raise nearly anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: not a readable checkpoint ({reason[0]})") from None
    if what is not None:
        raise UserError(f"{path}: not a checkpoint of sdpnet ({what})")
    if name is not None:
        raise UserError(f"{path}: not a readable checkpoint ({name} is not finite)")
    return state


def _require_intact(file: Any) -> None:
    """Raises `ValueError`, or one of `zipfile`'s errors, unless the file is an undamaged archive of `torch.save`."""
    if file.read(4) != b"PK\x03\x04" or not zipfile.is_zipfile(file):  # torch's older format is a bare pickle stream
        raise ValueError("damaged, or not written by torch.save")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two members have one name")
        if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members):
            raise ValueError("compressed")
        if any(member.external_attr & _DIRECTORY for member in members):
            raise ValueError("a member is marked as a directory")
        if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
            raise ValueError("claims more bytes than it has")
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("not written by torch.save")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4") or (
                opcode.name == "GLOBAL" and not _GLOBAL.fullmatch(str(argument))
            ):
                raise ValueError(f"it would call {str(argument or opcode.name).replace(' ', '.')}")


def _require_real_tensors(state: Any) -> None:
    """Raises `ValueError` for a tensor that would take more memory when it is copied than it takes in the file."""
    todo, seen = [state], set()
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            held = value.untyped_storage().nbytes() if value.layout is torch.strided else 0
            if value.device.type != "cpu" or value.numel() * value.element_size() > held:
                raise ValueError("a tensor claims more elements than it has")
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value.values() if isinstance(value, dict) else value)


def _non_finite(state: dict[str, Any]) -> str | None:
    """The name of a weight that contains a NaN or an infinity, or None."""
    for section in ("model", "ema"):
        for name, weight in (state.get(section) or {}).items():
            if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
                return f"{section}.{name}"
    return None
