"""Tars as people do not make them, as the source of a conversion: listed and converted, or refused in a line."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from converting_child import ConvertingChild
from PIL import Image
from trial import Kind, Outcome

from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image

__all__ = ["KINDS"]

BLOCK = tarfile.BLOCKSIZE
NUM_IMAGES = 12
# Converts the tars whose paths come on stdin, and says what came of each. More than 500 MB, or 10 s of processor time
# for one of them, end the process.
CHILD = """
import contextlib, io, json, resource, signal, sys
from pathlib import Path
from conversion import convert_folder
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.preprocess.sources.scan import scan
from sdpnet.preprocess.verify import verify
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + 500_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for line in sys.stdin:
    path = line.rstrip("\\n")
    signal.setitimer(signal.ITIMER_PROF, 10)
    try:
        out = Path(path).with_suffix(".out")
        with contextlib.redirect_stderr(io.StringIO()):
            manifest = convert_folder(scan(None, train=path), out, on_bad="skip")
        _, reader = open_split(out, "train")
        found = manifest.splits["train"]
        answer = {
            "samples": [[manifest.classes[label], reader.encoded(i).tobytes().hex()] for i, label in
                        enumerate(reader.labels.tolist())],
            "bad": found.num_quarantined,
            "left_out": manifest.origin.num_left_out,
            "problems": [str(problem) for problem in verify(out, decode=True)],
        }
    except UserError as error:
        answer = {"refused": str(error)}
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Tars:
    """Images by name, what is stored of each, and a tar of them in each of tarfile's formats."""

    images: dict[str, bytes]
    stored: dict[str, str]
    tars: list[bytes]


def _prepare(folder: Path) -> Tars:
    rng = np.random.default_rng(0)
    images, stored = {}, {}
    for number in range(NUM_IMAGES):
        name = f"{('ant', 'bee', 'cow')[number % 3]}/{number}.{('jpg', 'png')[number % 2]}"
        file = io.BytesIO()
        size = rng.integers(9, 40, 2).tolist()
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size).save(
            file, ("JPEG", "PNG")[number % 2]
        )
        images[name] = file.getvalue()
        stored[name] = encode_image(file.getvalue(), EncodeSettings()).data.hex()
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    return Tars(images, stored, [_tar([_member(name, data, f) for name, data in images.items()]) for f in formats])


def _member(name: str, data: bytes = b"", format: int = tarfile.PAX_FORMAT, **changes: object) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for key, value in changes.items():
        setattr(entry, key, value)
    return entry.tobuf(format, errors="surrogateescape") + data + bytes(-len(data) % BLOCK)


def _tar(members: Sequence[bytes]) -> bytes:
    content = b"".join(members) + bytes(2 * BLOCK)
    return content + bytes(-len(content) % 10_240)


def _pax(name: str, data: bytes, **records: str) -> bytes:
    return _member(name, data, pax_headers=records)


def _raw_pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return _member("pax", records, type=kind)


def _odd_members(rng: np.random.Generator, data: bytes) -> bytes:
    """One or more members that no ordinary tar has."""
    number = int(rng.integers(1 << 40))
    choices: list[Callable[[], bytes]] = [
        lambda: _member("ant/x.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        lambda: _member("ant/x.jpg", type=tarfile.LNKTYPE, linkname="ant/0.jpg"),
        lambda: _member("ant/x.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        lambda: _member("ant/x.jpg", type=tarfile.BLKTYPE),
        lambda: _member("ant/x.jpg", type=tarfile.FIFOTYPE),
        lambda: _member("ant/x.jpg", data, type=tarfile.CONTTYPE),
        lambda: _member("ant/x.jpg", data, type=b"Z"),
        lambda: _member("ant/x.jpg", data, type=tarfile.GNUTYPE_SPARSE, format=tarfile.GNU_FORMAT),
        lambda: _pax("ant/x.jpg", data, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
        lambda: _pax("ant/x.jpg", data, **{"GNU.sparse.size": str(number), "GNU.sparse.map": "0,1,5"}),
        lambda: _pax("ant/x.jpg", data, **{"GNU.sparse.realsize": "1e9", "GNU.sparse.name": "../x"}),
        lambda: _member("/ant/x.jpg", data),
        lambda: _member("../ant/x.jpg", data),
        lambda: _member("ant/../../x.jpg", data),
        lambda: _member("C:/ant/x.jpg", data),
        lambda: _member("ant\\x.jpg", data),
        lambda: _member("ant/a\nb.jpg", data),
        lambda: _member("ant/\x1b[31m.jpg", data),
        lambda: _member("ant/0.jpg", data),  # a second one
        lambda: _member("ant/x.jpg", data, size=number),
        lambda: _member("ant/x.jpg", data, size=-number, format=tarfile.GNU_FORMAT),
        lambda: _pax("ant/x.jpg", data, size=str(number << int(rng.integers(40)))),
        lambda: _pax("ant/x.jpg", data, size=str(rng.choice(["-1", "x", "", "1e3", "٣", "9" * 5000]))),
        lambda: _pax("ant/x.jpg", data, path="bee/" + "y" * int(rng.integers(1, 70_000)) + ".jpg"),
        lambda: _pax("ant/x.jpg", data, path=str(rng.choice(["", ".", "..", "/", "a/./b", "bee/\0.jpg", "\udcff/x"]))),
        lambda: _pax("ant/x.jpg", data, path="bee/0.jpg"),
        lambda: _pax("ant/x.jpg", data, hdrcharset="BINARY", path="ant/\udcff\udcfe.jpg"),
        lambda: _raw_pax(b"11 path=x\n") + _member("ant/x.jpg", data),
        lambda: _raw_pax(b"%d path=%s\n" % (number, b"x" * 40)) + _member("ant/x.jpg", data),
        lambda: _raw_pax(rng.bytes(int(rng.integers(600)))) + _member("ant/x.jpg", data),
        lambda: _raw_pax(b"16 path=cow/z/z\n", tarfile.XGLTYPE) + _member("ant/x.jpg", data),
        lambda: _raw_pax(b"11 size=99\n", tarfile.XGLTYPE) + _member("ant/x.jpg", data),
        lambda: _member("long", b"bee/" + b"n" * 4000, type=tarfile.GNUTYPE_LONGNAME) + _member("ant/x.jpg", data),
        lambda: _member("long", b"", type=tarfile.GNUTYPE_LONGNAME) * int(rng.integers(1, 2000)),
        lambda: _member("pax", b"", type=tarfile.XHDTYPE, size=number),
        lambda: _member("ant", data, type=tarfile.DIRTYPE),
        lambda: _member("ant/dir/", b"", type=tarfile.DIRTYPE) * int(rng.integers(1, 3000)),
        lambda: b"".join(_member(f"ant/{i}.txt") for i in range(int(rng.integers(20_000)))),
        lambda: _member("dog.tar", _tar([_member("1.jpg", data)])),
        lambda: _member("dog.tar", _tar([_member("dog.tar", _tar([_member("1.jpg", data)]))])),
        lambda: _member("ant/x.jpg", gzip.compress(bytes(int(rng.integers(1 << 24))))),
        lambda: _member("ant/._x.jpg", data) + _member("__MACOSX/ant/x.jpg", data) + _member(".hidden/x.jpg", data),
    ]
    return choices[int(rng.integers(len(choices)))]()


def _mutated(tars: Tars, rng: np.random.Generator) -> tuple[str, bytes, bool]:
    """How it was made, the tar, and whether all images that are found must be among those that are known."""
    content = tars.tars[int(rng.integers(3))]
    data = list(tars.images.values())[int(rng.integers(NUM_IMAGES))]
    names = ["odd member", "odd members", "header byte", "bytes", "cut", "hole", "compressed", "joined", "moved"]
    kind = names[int(rng.choice(len(names), p=[0.3, 0.1, 0.25, 0.1, 0.1, 0.05, 0.02, 0.03, 0.05]))]
    members = [_member(name, image) for name, image in tars.images.items()]
    if kind.startswith("odd"):
        for _ in range(1 if kind == "odd member" else 4):
            members.insert(int(rng.integers(len(members) + 1)), _odd_members(rng, data))
        return kind, _tar(members), True
    if kind == "header byte":
        headers = [at for at in range(0, len(content), BLOCK) if content[at + 257 : at + 262] == b"ustar"]
        changed = bytearray(content)
        at = int(rng.choice(headers)) + int(rng.integers(512))
        changed[at] = int(rng.integers(256))
        if rng.integers(2):  # with the checksum made good
            start = at // BLOCK * BLOCK
            changed[start + 148 : start + 156] = b" " * 8
            changed[start + 148 : start + 156] = b"%06o\0 " % sum(changed[start : start + BLOCK])
        return kind, bytes(changed), True
    if kind == "bytes":
        changed = bytearray(content)
        for _ in range(int(rng.integers(1, 40))):
            changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
        return kind, bytes(changed), False
    if kind == "cut":
        return kind, content[: int(rng.integers(len(content)))], True
    if kind == "hole":
        start = int(rng.integers(len(content) // BLOCK)) * BLOCK
        size = int(rng.integers(1, 4)) * BLOCK
        return kind, content[:start] + bytes(size) + content[start + size :], False
    if kind == "compressed":
        pack: Callable[[bytes], bytes] = gzip.compress if rng.integers(2) else bz2.compress
        return kind, pack(content), True
    if kind == "joined":
        return kind, content + content[: int(rng.integers(len(content)))], True
    start, size = (int(rng.integers(len(content) // BLOCK)) * BLOCK for _ in range(2))
    return kind, content[:start] + content[start + size % (4 * BLOCK) :], False


def _judge(tars: Tars, kind: str, answer: dict, known: bool) -> Outcome:
    if "refused" in answer:
        ok = "\n" not in answer["refused"] and ".tar" in answer["refused"]
        return Outcome("ok" if ok else "wrong", f"{kind}: refused, but: {answer['refused'][:300]}", f"{kind}: refused")
    if answer["problems"]:
        return Outcome("wrong", f"{kind}: converted, but verify says {answer['problems'][0]}")
    if known and (strange := [name for name, data in answer["samples"] if data not in tars.stored.values()]):
        return Outcome("wrong", f"{kind}: converted, with an image of {strange[0]!r} that is none of the source")
    found = len(answer["samples"]) + answer["bad"] + answer["left_out"]
    if found < NUM_IMAGES and not kind.startswith("moved"):  # a piece that is a whole entry is missed by nobody
        return Outcome("lost", f"{kind}: of {NUM_IMAGES} images it accounts for {found} only")
    return Outcome("ok", group=f"{kind}: converted")


def _hostile(tars: Tars, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    with ConvertingChild(CHILD, scratch) as child:
        for seed in seeds:
            kind, content, known = _mutated(tars, np.random.default_rng([4, seed]))
            path = scratch / f"{seed}.tar"
            path.write_bytes(content)
            if rare := np.random.default_rng([5, seed]).integers(50) == 0:  # a file of a terabyte, nearly all a hole
                os.truncate(path, 1 << 40)
                kind = f"{kind}, 1 TB"
            answer = child.convert(path, kind)
            outcome = answer if isinstance(answer, Outcome) else _judge(tars, kind, answer, known)
            if rare and outcome.group.endswith("converted"):
                outcome = Outcome("wrong", f"{kind}: converted")
            yield outcome


KINDS = [Kind("conversion of hostile tars", 3_000, _prepare, _hostile, batch=100)]
