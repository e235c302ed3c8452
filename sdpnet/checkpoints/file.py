"""One checkpoint file: it is there whole or not at all, and it is read only when nothing in it is damaged or foreign.

A checkpoint is a file of `torch.save`: a zip archive that stores its members uncompressed, each with its CRC-32.
`torch.load` does not look at the CRC-32s, believes what an archive says of sizes, and may call more than a checkpoint
needs, `weights_only` or not. So all of that is checked first.
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

from sdpnet.checkpoints.sections import VERSION, missing
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import errors_name, partial_path, publish, write_all
from sdpnet.pipelines.files.regular import open_regular_file

__all__ = ["VERSION", "Refusal", "load_checkpoint", "plain_state", "refusals", "write_atomically", "write_checkpoint"]

# All that the pickle of a state names: tensors, their storages, and the mapping that holds a tensor's hooks (none).
_GLOBAL: Final = re.compile(r"torch\._utils _rebuild_tensor_v2|torch [A-Za-z0-9]+Storage|collections OrderedDict")
_DIRECTORY: Final = 0x10  # of an archive's file attributes: torch would leave what such a member held uninitialised
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class Refusal(UserError):
    """The system refused to write a file, which it may take later. `cause` is the message without its advice."""

    def __init__(self, cause: str, advice: str) -> None:
        super().__init__(f"{cause}; {advice}")
        self.cause = cause


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write `path` into a `Refusal`."""
    try:
        yield
    except OSError as error:
        advice = "free some space and continue with --resume" if error.errno in _FULL else "continue with --resume"
        cause = f"{path}: cannot be written ({error.strerror})"
        raise Refusal(cause, f"what was saved before is still there: {advice}") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)`, waits for the disk, then gives the file its name. An `OSError` names `path`."""
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


def plain_state(state: Any, of_tensor: Callable[[Tensor, tuple[Any, ...]], Tensor], where: tuple[Any, ...] = ()) -> Any:
    """`state` in plain dicts, lists and tuples, with `of_tensor(tensor, its keys)` for each tensor.

    Raises `TypeError` for what `load_checkpoint` would refuse: anything but these, numbers, text and None.
    """
    if isinstance(state, Tensor):
        return of_tensor(state.detach(), where)
    if isinstance(state, Mapping):
        return {key: plain_state(value, of_tensor, (*where, key)) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(plain_state(value, of_tensor, (*where, index)) for index, value in enumerate(state))
    if type(state) not in (int, float, str, bool, type(None)):
        raise TypeError(f"{'.'.join(map(str, where))}: a checkpoint cannot hold a {type(state).__name__}")
    return state


class _Output:
    """The file that `torch.save` writes to. Keeps the first error: raised through torch's writer it would be lost."""

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
    """Writes a state of plain values; the file's size in bytes.

    Raises:
        UserError: a weight is NaN or infinite (such a checkpoint could not be loaded), and nothing is written.
        OSError: the system refuses; nothing is left but what was there.
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
    """The state that a training run saved, on the CPU: of version 2, or 1 (which has no key "version").

    Nothing of the file is executed, and no more memory is taken than it has bytes. Raises `UserError` for a file that
    is damaged, unfinished, foreign or hostile, and for one whose weights are not finite.
    """
    try:
        with open(
            open_regular_file(path), "rb"
        ) as file:  # one open file is checked and read, whatever becomes of its name
            _require_intact(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
            _require_real_tensors(state)
            what = missing(state)
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
    """Raises `ValueError`, or one of `zipfile`'s errors, for what is no undamaged archive of `torch.save`."""
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
    """Raises `ValueError` for a tensor that takes more memory when it is copied than it has in the file."""
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
    """The name of a weight that has a NaN or an infinity; None: there is none."""
    for section in ("model", "ema"):
        for name, weight in (state.get(section) or {}).items():
            if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
                return f"{section}.{name}"
    return None
