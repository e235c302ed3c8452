"""Conversions of sources that change between a kill and the next run, and of sources that hold odd files."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conversion_trials import FORMATS, Run, copy, finished, flags, make_source, refusal, run
from faults import Commands, Fault
from PIL import Image
from trial import Kind, Outcome

from sdpnet.pipelines.shards.layout import open_split
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image
from sdpnet.preprocess.sources.files.location import MAX_FILE_MB
from sdpnet.preprocess.verify import verify

__all__ = ["KINDS"]

NUM_TRAIN, NUM_VAL = 14, 6


@dataclass(frozen=True)
class Sources:
    """A folder, a folder of two tars of the same, and what comes of both by the format of the output."""

    folder: Path
    tars: Path
    whole: dict[tuple[str, str], Path]


def _prepare(folder: Path) -> Sources:
    source = make_source(folder / "images", NUM_TRAIN, NUM_VAL, sides=(8, 20), bad=0)
    tars = folder / "tars"
    tars.mkdir()
    for split in ("train", "val"):
        with tarfile.open(tars / f"{split}.tar", "w") as archive:
            archive.add(source / split, arcname=split)
    whole = {}
    with Commands(limit=60) as commands:
        for kind, place in (("folder", source), ("tars", tars)):
            for format in FORMATS:
                whole[kind, format] = folder / f"{kind}-{format}"
                ended = commands.run(format, _arguments(kind, place, whole[kind, format]))
                assert ended.status == 0, ended.stderr
    return Sources(source, tars, whole)


def _arguments(kind: str, source: Path, out: Path) -> list[str]:
    if kind == "folder":
        return flags(source, out)
    return ["--train", str(source / "train.tar"), "--val", str(source / "val.tar"), "--out", str(out)]


def _change(kind: str, source: Path, rng: np.random.Generator) -> tuple[str, bool]:
    """Changes a source; says how, and whether its list of images is another one then."""
    images = sorted(path for path in source.rglob("*") if path.is_file())
    victim, other = (images[index] for index in rng.choice(len(images), 2, replace=False).tolist())
    if kind == "tars":
        how = str(rng.choice(["rewritten", "cut", "bytes"]))
        if how == "rewritten":  # the same images, in reverse
            with tarfile.open(victim) as archive:
                members = [(member, archive.extractfile(member)) for member in archive if member.isfile()]
                content = [(member, file.read()) for member, file in members if file is not None]
            with tarfile.open(victim, "w") as archive:
                for member, data in reversed(content):
                    archive.addfile(member, io.BytesIO(data))
            return f"{victim.name} rewritten", True
        if how == "cut":
            os.truncate(victim, victim.stat().st_size // 2)
            return f"{victim.name} cut", True
        data = bytearray(victim.read_bytes())
        data[1536:1540] = b"\0\0\0\0"  # within the first image
        victim.write_bytes(data)
        return f"{victim.name} edited", False
    how = str(rng.choice(["added", "removed", "renamed", "another", "swapped", "emptied", "a folder", "moved"]))
    if how == "added":
        shutil.copy(victim, victim.with_name("added" + victim.suffix))
    elif how == "removed":
        victim.unlink()
    elif how == "renamed":
        victim.rename(victim.with_name("zz" + victim.suffix))
    elif how == "moved":
        below = "bee" if victim.parent.name == "ant" else "ant"
        victim.rename(victim.parent.parent / below / f"moved{victim.suffix}")
    elif how == "another":
        Image.new("RGB", (9, 9), (200, 10, 10)).save(victim)
    elif how == "swapped":
        content = victim.read_bytes()
        victim.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif how == "emptied":
        victim.write_bytes(b"")
    else:
        victim.unlink()
        victim.mkdir()
    return f"{victim.parent.name}/{victim.name} {how}", how not in ("another", "swapped", "emptied")


def _changed(sources: Sources, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """A run is killed, the source changes, the command is repeated: it refuses, or each image is that of one moment."""
    with Commands(limit=60) as commands:
        for seed in seeds:
            rng = np.random.default_rng([6, seed])
            kind, format = ("folder", "folder", "tars")[seed % 3], FORMATS[seed // 3 % 2]
            original = sources.folder if kind == "folder" else sources.tars
            source = copy(original, scratch / str(seed) / original.name)
            out = scratch / str(seed) / "out"
            fault = Fault("*", "", 20 + int(rng.integers(60)), "kill")
            killed = commands.run(format, _arguments(kind, source, out), fault)
            change, is_listed = _change(kind, source, rng)
            what = f"{kind}, {format}, killed at call {fault.nth}, then {change}"
            if killed.status != -signal.SIGKILL:
                yield Outcome("wrong", f"the harness did not kill it: {what}")
                continue
            ended = Run(*_pair(commands.run(format, _arguments(kind, source, out))))
            if is_listed:
                if (bad := refusal(ended, what)) is not None:
                    yield bad
                    continue
            elif ended.status == 0:
                yield _each_of_one_moment(original, source, out, what) or Outcome("ok", group="not listed: finished")
                continue
            elif (bad := refusal(ended, what)) is not None:  # without --on-bad skip
                yield bad
                continue
            shutil.rmtree(source)
            copy(original, source)
            ended = Run(*_pair(commands.run(format, _arguments(kind, source, out))))
            outcome = finished(ended, out, sources.whole[kind, format], f"{what}, then as it was")
            yield outcome or Outcome("ok", group=f"{'listed' if is_listed else 'not listed'}: refused, then finished")


def _pair(ended: object) -> tuple[int, str]:
    return ended.status, ended.stderr  # type: ignore[attr-defined]


def _each_of_one_moment(original: Path, source: Path, out: Path, what: str) -> Outcome | None:
    """None where each stored image is what is stored of the image before the change, or of that after it."""
    if problems := [str(problem) for problem in verify(out, decode=True)]:
        return Outcome("wrong", f"{what}: verify says {problems[0]}")
    known = {b""}
    if original.name == "images":
        for root in (original, source):
            files = [path for path in root.rglob("*") if path.is_file() and path.stat().st_size]
            known |= {encode_image(path, EncodeSettings()).data for path in files}
        for split in ("train", "val"):
            _, reader = open_split(out, split)
            if any(reader.encoded(index).tobytes() not in known for index in range(reader.num_samples)):
                return Outcome("wrong", f"{what}: an image that is neither the old nor the new one")
    return None


def _odd(sources: Sources, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """A source with special files, links and odd names: each good image is stored, each other file accounted for."""
    for seed in seeds:
        rng = np.random.default_rng([7, seed])
        source = copy(sources.folder, scratch / str(seed) / "images")
        out, format = scratch / str(seed) / "out", FORMATS[seed % 2]
        made, good = {}, 0  # what lies at a path, for each path
        for number in range(1 + int(rng.integers(5))):
            path, kind, images = _make_odd(source, rng, number)
            made[path] = f"{kind} {path.name!r}"
            good += images
        names = list(made.values())
        what = f"{format}, with {', '.join(names)}"
        ended = run(format, flags(source, out, "--workers", "1"))
        if ended.status == 2 and ended.error:
            yield Outcome("wrong", f"{what}: {ended.error}")
            continue
        if ended.status != 0 or "Traceback" in ended.stderr:
            yield refusal(ended, what) or Outcome("wrong", what)
            continue
        if problems := [str(problem) for problem in verify(out, decode=True)]:
            yield Outcome("wrong", f"{what}: verify says {problems[0]}")
            continue
        manifest, _ = open_split(out, "train")
        found = sum(split.num_samples for split in manifest.splits.values())
        others = sum(split.num_quarantined for split in manifest.splits.values()) + manifest.origin.num_left_out
        if found != NUM_TRAIN + NUM_VAL + good or others < len(names) - good:
            yield Outcome("lost", f"{what}: {found} images and {others} other files, of which {good} are good")
        else:
            yield Outcome("ok", group=f"{len(names)} odd files")


def _make_odd(source: Path, rng: np.random.Generator, number: int) -> tuple[Path, str, int]:
    """Makes an odd file; says where, what it is, and how many good images it is."""
    folder = source / "train" / ("ant", "bee")[int(rng.integers(2))]
    suffix = ("", ".jpg", ".png", ".txt")[int(rng.integers(4))]
    path = folder / f"odd{number}{suffix}"
    image = next(path for path in sorted((source / "val" / "ant").iterdir()))
    kinds = ["pipe", "socket", "device", "loop", "up", "nowhere", "long link", "sparse", "huge", "empty", "zeros"]
    kinds += ["name", "bytes name", "link", "no permission", "set", "manifest pipe", "manifest huge", "deep json"]
    kind = kinds[int(rng.integers(len(kinds)))]
    good = 0
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        home = os.getcwd()
        os.chdir(folder)  # a socket's path has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(home)
    elif kind == "device":
        path.symlink_to(("/dev/zero", "/dev/random", "/dev/tty", "/dev/full")[int(rng.integers(4))])
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "up":
        path.symlink_to((".", "..", "../..", "/")[int(rng.integers(4))])
    elif kind == "nowhere":
        path.symlink_to(("nowhere", "nowhere/x", f"{image.name}/x")[int(rng.integers(3))])
    elif kind == "long link":
        path.symlink_to("x" * 255)
    elif kind in ("sparse", "huge"):
        path.write_bytes(image.read_bytes() if kind == "huge" else b"")
        size = 1 << int(rng.integers(28, 40))
        os.truncate(path, size)
        good = int(kind == "huge" and size <= MAX_FILE_MB * 1_000_000)  # what follows an image is no damage
    elif kind == "empty":
        path.touch()
    elif kind == "zeros":
        path.write_bytes(bytes(5000))
    elif kind in ("name", "bytes name", "link", "no permission"):
        odd = "a b\n\x1b[31m\u202e" if kind == "name" else os.fsdecode(b"\xff\xfe") if kind == "bytes name" else kind
        path = folder / f"{odd}{number}{image.suffix}"
        path.symlink_to(image) if kind == "link" else shutil.copy(image, path)
        if kind == "no permission":
            path.chmod(0)
        good = int(kind != "no permission" or os.access(path, os.R_OK))
    else:
        path = folder / "manifest.json"
        path.unlink(missing_ok=True)
        if kind == "set":
            path.write_text("{}")
        elif kind == "manifest pipe":
            os.mkfifo(path)
        elif kind == "manifest huge":
            path.touch()
            os.truncate(path, 1 << 40)
        else:
            path.write_text("[" * 200_000)
    return path, kind, good


KINDS = [
    Kind("source changed after a kill", 120, _prepare, _changed, batch=20),
    Kind("source with odd files", 120, _prepare, _odd, batch=10),
]
