"""What is done to a shard set: seeded changes of each kind of file in it. A change says in a line what it did."""

from __future__ import annotations

import hashlib
import json
import math
import random
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from conversion import write_manifest, write_samples
from decoder_seeds import seeds
from special_files import SPECIAL_FILES

from sdpnet.pipelines.shards import index_file
from sdpnet.pipelines.shards.beton import ALLOCATION_DTYPE, FIELD_DTYPE, HEADER_DTYPE, METADATA_DTYPE
from sdpnet.pipelines.shards.manifest import Manifest, Split
from sdpnet.pipelines.shards.tar import SAMPLE_DTYPE
from sdpnet.preprocess.conversion.writers.beton import BetonWriter
from sdpnet.preprocess.conversion.writers.tar import TarWriter
from sdpnet.preprocess.encoding.encode import EncodedImage

__all__ = ["CHANGES", "Change"]


@dataclass(frozen=True)
class Change:
    """What was changed, in a line, and whether verify must say so: not where the checksums were made to fit."""

    what: str
    must_be_found: bool = True


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


# Values that JSON can hold and a manifest should not.
_PLAIN = (None, True, False, -1, 0, 1, 7, 1.5, -0.0, 1e308, 2**31, 2**63, 2**64, 2**70, -(2**70), 10**400)
_PLAIN += (math.nan, math.inf, -math.inf)
_NAMES = (
    "",
    "a",
    "\ud800",
    "\udcff",
    "a\udfff",
    "\0",
    "\x1b[2J",
    "\n",
    "/dev/zero",
    "..",
    "../a",
    "train.beton",
    "a" * 300,
)
_NAMES += ("\u00e9" * 200, "a" * 20_000, "\u202e", "NaN", "9" * 5000, "=1+1", "<b>")
_NESTED = (list, dict, lambda: [[]], lambda: {"\ud800": 1}, lambda: {"": None})
_NESTED += tuple(partial(deep, levels) for levels in (20, 300, 900))  # made anew each time: a trial depends on its seed
HOSTILE = (*_PLAIN, *_NAMES, *_NESTED)


def change_json(raw: Any, rng: random.Random) -> str:
    """Changes a random node of a JSON value in place."""
    nodes: list[tuple[Any, Any, str]] = []

    def walk(node: Any, name: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            nodes.append((node, key, f"{name}/{key}"))
            walk(value, f"{name}/{key}")

    walk(raw, "")
    top = rng.choice(list(raw)) if isinstance(raw, dict) and raw and rng.random() < 0.5 else ""
    below = [node for node in nodes if node[2].startswith(f"/{top}")]  # the short parts as often as the long ones
    holder, key, name = rng.choice(below)
    how = rng.randrange(8)
    if how == 0:
        del holder[key]
        return f"{name} removed"
    if how == 1:
        other, other_key, other_name = rng.choice(nodes)
        try:
            holder[key], other[other_key] = json.loads(json.dumps(other[other_key])), holder[key]
        except (KeyError, IndexError, RecursionError):
            return f"{name} kept"
        return f"{name} and {other_name} swapped"
    if how == 2 and isinstance(holder, dict):
        new = rng.choice(_NAMES)
        holder[new] = holder.pop(key)
        return f"{name} is called {new[:40]!r}"
    if how == 3 and isinstance(holder, list):
        holder.insert(key, holder[key])
        return f"{name} doubled"
    value = rng.choice(HOSTILE)
    value = value() if callable(value) else value
    holder[key] = value
    return f"{name} = {reprlib.repr(value)}"


def _safely(change: Callable[[], str]) -> str:
    try:
        return change()
    except RecursionError:  # of a value that was nested in another one
        return "nested too deeply to be changed again"


def change_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Bits, bytes, pieces and the end of a file."""
    data = bytearray(content)
    size = len(data)
    place = rng.randrange(max(1, size))
    how = rng.randrange(7)
    if how == 0:
        return content[:place], f"cut at {place}"
    if how == 1:
        more = rng.choice((1, 4, 24, 512, 10_000))
        return content + rng.randbytes(more), f"{more} bytes more"
    if how == 2 and size:
        other, length = rng.randrange(size), rng.choice((1, 4, 24, 100))
        first, second = data[place : place + length], data[other : other + length]
        data[other : other + len(first)], data[place : place + len(second)] = first, second
        return bytes(data), f"{length} bytes at {place} and {other} swapped"
    if how == 3:
        length = rng.choice((1, 8, 24, 512))
        return content[:place] + content[place + length :], f"{length} bytes at {place} removed"
    if how == 4:
        length = rng.choice((1, 8, 24, 512))
        return content[:place] + rng.randbytes(length) + content[place:], f"{length} bytes at {place} inserted"
    for _ in range(rng.choice((1, 1, 2, 8)) if size else 0):
        place = rng.randrange(size)
        data[place] = data[place] ^ 1 << rng.randrange(8) if how == 5 else rng.choice((0, 1, 127, 128, 255))
    return bytes(data), f"bytes up to {place} changed"


def _number(rng: random.Random, bits: int, near: int) -> int:
    kinds = (
        rng.randrange(4),
        (1 << rng.randrange(bits + 1)) - rng.randrange(3),
        near + rng.choice((-24, -1, 1, 24, 512)),
    )
    return rng.choice((*kinds, rng.getrandbits(bits))) % (1 << bits)


def change_fields(content: bytes, rng: random.Random, name: str) -> tuple[bytes, str]:
    """A field of a header or of a table becomes another number."""
    data = bytearray(content)
    if name.endswith(".beton"):
        header = np.frombuffer(content[:24], HEADER_DTYPE)[0]
        samples, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
        metadata = 24 + 2 * FIELD_DTYPE.itemsize
        parts = ((HEADER_DTYPE, 0, 1), (METADATA_DTYPE, metadata, samples), (ALLOCATION_DTYPE, table, samples))
    elif name.endswith(".index"):
        start, found = index_file.HEADER_DTYPE.itemsize, [(index_file.HEADER_DTYPE, 0, 1)]
        header = np.frombuffer(content[:start], index_file.HEADER_DTYPE)[0]
        for table, dtype in (("containers", index_file.CONTAINER_DTYPE), ("samples", index_file.SAMPLE_DTYPE)):
            start += 8 * int(header["num_folders"]) * (table == "containers")
            found.append((dtype, start, int(header[f"num_{table}"])))
            start += dtype.itemsize * found[-1][2]
        parts = tuple(found)
    else:
        parts = ((SAMPLE_DTYPE, 0, len(content) // SAMPLE_DTYPE.itemsize),)
    said = []
    for _ in range(rng.choice((1, 1, 2))):
        dtype, start, count = rng.choice(parts)
        record, field = rng.randrange(count), rng.choice(dtype.names or ())
        kind, offset = (dtype.fields or {})[field][:2]
        place = start + record * dtype.itemsize + offset
        if kind.kind == "S":  # the mark of an index
            continue
        now = int.from_bytes(data[place : place + kind.itemsize], "little")
        number = _number(rng, 8 * kind.itemsize, now)
        data[place : place + kind.itemsize] = number.to_bytes(kind.itemsize, "little")
        said.append(f"{field} of {record} = {number}")
    return bytes(data), ", ".join(said)


def _sealed(folder: Path, name: str, content: bytes) -> None:
    """Has the manifest believe a file's new content."""
    raw = json.loads((folder / "manifest.json").read_text())
    if name == "quarantine.jsonl":
        raw["quarantine_sha256"] = hashlib.sha256(content).hexdigest()
    for split in raw["splits"].values():
        for file in split["files"]:
            if name in file["sidecars"]:
                file["sidecars"][name] = hashlib.sha256(content).hexdigest()
            elif name == file["name"]:
                first = file["hashed_from"]
                file["bytes"] = len(content)
                file["sha256"] = hashlib.sha256(content[first:] + content[:first]).hexdigest()
    (folder / "manifest.json").unlink()  # it is a hard link to that of the whole set
    write_manifest(folder, raw)


def _put(path: Path, content: bytes) -> None:
    path.unlink()  # the others of the set are hard links
    path.write_bytes(content)


def change_manifest(folder: Path, rng: random.Random) -> Change:
    path = folder / "manifest.json"
    if rng.random() < 0.2:
        content, what = change_bytes(path.read_bytes(), rng)
        changed = content != path.read_bytes()
        _put(path, content)
        return Change(f"manifest.json: {what}", changed)
    raw = json.loads(path.read_text())
    raw["origin"] = raw.get("origin") or {
        "places": {"train": "train/"},
        "left_out": [],
        "val_share": 0.5,
        "val_seed": 0,
    }
    what = ", ".join(_safely(partial(change_json, raw, rng)) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    path.unlink()
    try:
        write_manifest(folder, raw)
    except (ValueError, RecursionError):  # more digits, or levels, than Python writes
        path.write_text("[" * 50_000 if rng.random() < 0.5 else '{"schema_version": ' + "9" * 5000 + "}")
    return Change(f"manifest.json, checksum made to fit: {what}", False)


def _changed(path: Path, content: bytes, new: bytes, what: str, sealed: bool) -> Change:
    """Puts a file's new content in the place of the old one; `sealed`: with checksums that fit."""
    _put(path, new)
    if sealed:
        _sealed(path.parent, path.name, new)
    return Change(f"{path.name}{', checksum made to fit' * sealed}: {what}", new != content and not sealed)


def change_file(suffix: str, folder: Path, rng: random.Random) -> Change:
    """A file with this suffix: half of the time with checksums that fit."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.suffix == suffix))
    content = path.read_bytes()
    fields = suffix in (".beton", ".samples", ".index") and rng.random() < 0.6
    new, what = change_fields(content, rng, path.name) if fields else change_bytes(content, rng)
    return _changed(path, content, new, what, rng.random() < 0.5)


def change_quarantine(folder: Path, rng: random.Random) -> Change:
    path = folder / "quarantine.jsonl"
    content = path.read_bytes()
    if rng.random() < 0.4:
        new, what = change_bytes(content, rng)
    else:
        entries = [json.loads(line) for line in content.splitlines()]
        what = _safely(partial(change_json, entries, rng))
        try:
            new = "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()
        except (ValueError, RecursionError):
            new = b"[" * 50_000
    return _changed(path, content, new, what, rng.random() < 0.7)


def put_special(folder: Path, rng: random.Random) -> Change:
    path = rng.choice(sorted(folder.iterdir()))
    kind = rng.choice(sorted(SPECIAL_FILES))
    path.unlink()
    SPECIAL_FILES[kind](path)
    return Change(f"{path.name}: {kind}")


def hostile_images(folder: Path, rng: random.Random) -> Change:
    """A set that was written over changed JPEGs: its checksums are right, its images may not be."""
    for path in folder.iterdir():
        path.unlink()
    files, splits, said = list(seeds().items()), {}, []
    beton = rng.random() < 0.5
    for name in ("train", "val"):
        images = []
        for _ in range(6):
            kind, jpeg = rng.choice(files)
            while "CMYK" in kind or "RGB" in kind or len(jpeg) < 100:
                kind, jpeg = rng.choice(files)
            height, width = _size(jpeg)
            if rng.random() < 0.1:
                jpeg, what = change_bytes(jpeg, rng)
                said.append(f"{name} {len(images)}, {kind}: {what}")
            images.append(EncodedImage(jpeg or b"\0", height, width))
        writer = partial(BetonWriter, page_size=1 << 15) if beton else partial(TarWriter, shard_bytes=8192)
        splits[name] = Split(len(images), "beton" if beton else "tar", write_samples(writer, folder, name, images))
    manifest = Manifest("seeds", tuple("abcdef"), {}, splits, "the fault matrix")
    (folder / "manifest.json").write_text(manifest.to_json())
    return Change(f"{'beton' if beton else 'tar'}: {'; '.join(said)}", False)


def _size(jpeg: bytes) -> tuple[int, int]:
    at = next(i for i in range(len(jpeg)) if jpeg[i] == 0xFF and jpeg[i + 1] in (0xC0, 0xC2))
    return int.from_bytes(jpeg[at + 5 : at + 7], "big"), int.from_bytes(jpeg[at + 7 : at + 9], "big")


# By the kind's name: the format of the set, and the change.
CHANGES: dict[str, tuple[str, Callable[[Path, random.Random], Change]]] = {
    "manifest.json": ("any", change_manifest),
    ".beton": ("beton", partial(change_file, ".beton")),
    ".crc32": ("beton", partial(change_file, ".crc32")),
    ".tar": ("tar", partial(change_file, ".tar")),
    ".samples": ("tar", partial(change_file, ".samples")),
    ".idx": ("tar", partial(change_file, ".idx")),
    "quarantine.jsonl": ("any", change_quarantine),
    ".index": ("index", partial(change_file, ".index")),
    "special files": ("any", put_special),
    "special files beside an index": ("index", put_special),
    "hostile images": ("any", hostile_images),
}
