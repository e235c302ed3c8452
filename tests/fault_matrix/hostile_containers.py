"""Parquet files and WebDataset tars that are damaged or lie, as sources: converted, or refused in a line."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from container_files import features, images_of, parquet_bytes, tar_bytes
from converting_child import ConvertingChild
from mutations import HOSTILE, change_bytes, json_text
from trial import Kind, Outcome

from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image

__all__ = ["KINDS", "Hostile", "hostile", "prepare"]

NUM_IMAGES = 10
CLASSES = ("ant", "bee", "cow")
# Converts the files whose paths come on stdin with one worker process, and says what came of each. More than 500 MB, or
# 10 s of processor time for one of them, end the process. The process that lists Parquet files, and the worker, are
# counted with it: their memory and time are those of children.
CHILD = """
import contextlib, io, json, resource, signal, sys, time
from pathlib import Path
from conversion import convert_folder
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.preprocess.sources.scan import scan
from sdpnet.preprocess.verify import verify
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + 500_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
def cpu():
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
for line in sys.stdin:
    path = line.rstrip("\\n")
    signal.setitimer(signal.ITIMER_PROF, 10)
    start = cpu()
    try:
        out = Path(path).with_suffix(".out")
        with contextlib.redirect_stderr(io.StringIO()):
            manifest = convert_folder(scan(None, train=path), out, on_bad="skip", num_workers=WORKERS)
        _, reader = open_split(out, "train")
        found = manifest.splits["train"]
        answer = {
            "samples": [[manifest.classes[label], reader.encoded(i).tobytes().hex()] for i, label in
                        enumerate(reader.labels.tolist())],
            "bad": found.num_quarantined,
            "left_out": manifest.origin.num_left_out,
            "problems": [str(problem) for problem in verify(out, decode=True)],
        }
        bad = out / "quarantine.jsonl"
        answer["crashes"] = bad.read_text().count("the decoder crashes") if bad.exists() else 0
    except UserError as error:
        answer = {"refused": str(error)}
    signal.setitimer(signal.ITIMER_PROF, 0)
    answer["cpu"] = cpu() - start
    answer["peak"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Hostile:
    """The images, what is stored of each, and good files of them."""

    images: list[bytes]
    stored: list[str]
    labels: list[int]
    good: list[bytes]


def prepare(folder: Path, make_good: Callable[[list[bytes], list[int]], list[bytes]]) -> Hostile:
    """Makes the images and good files of them."""
    images = images_of(NUM_IMAGES)
    labels = [number % len(CLASSES) for number in range(NUM_IMAGES)]
    stored = [encode_image(image, EncodeSettings()).data.hex() for image in images]
    return Hostile(images, stored, labels, make_good(images, labels))


def _good_parquet(images: list[bytes], labels: list[int]) -> list[bytes]:
    texts = [CLASSES[label] for label in labels]
    make = partial(parquet_bytes, images)
    return [
        make(labels, CLASSES, compression="snappy", write_page_checksum=True),
        make(labels, CLASSES, compression="zstd", rows=3),
        make(labels, CLASSES, compression="none", rows=100, data_page_size=500),
        make(texts, compression="gzip", is_struct=False, use_dictionary=True),
        make(labels, CLASSES, compression="snappy", large=True, use_dictionary=False, data_page_version="2.0"),
        parquet_bytes([images[i % 2] for i in range(NUM_IMAGES)], labels, CLASSES, use_dictionary=True, rows=5),
    ]


def _odd_parquet(rng: np.random.Generator, made: Hostile) -> bytes:
    """A whole file with odd contents."""
    images, labels = list(made.images), [int(label) for label in made.labels]
    number = int(rng.integers(NUM_IMAGES))
    odd = HOSTILE[int(rng.integers(len(HOSTILE)))]
    make = partial(parquet_bytes, images)
    bomb = bytes(int(rng.integers(1, 300)) << 20)

    def tree() -> str:
        raw = features(CLASSES)
        feature = raw["info"]["features"]["label"]
        feature[str(rng.choice(["names", "_type", "x"]))] = odd
        return json_text(raw, rng)[0].decode(errors="replace")

    def value(values: list[Any], other: Any) -> list[Any]:
        return [*values[:number], other, *values[number + 1 :]]

    huge = int(rng.choice([-1, -(2**62), 3, 10**6, 2**31, 2**62]))
    choices: list[Callable[[], bytes]] = [
        lambda: make(labels, metadata=tree()),
        lambda: make(labels, metadata=tree()),
        lambda: make(labels, metadata="[" * 100_000),
        lambda: make(labels, metadata=json_text(features(CLASSES), rng)[0].decode(errors="replace")),
        lambda: make(value(labels, huge), CLASSES),
        lambda: make(value(labels, huge)),
        lambda: make(value(labels, None), CLASSES),
        lambda: make([CLASSES[label] for label in labels[:-1]] + ["x" * int(rng.integers(1, 1 << 22))]),
        lambda: make([f"{'y' * 500}{i}" for i in range(len(labels))]),
        lambda: make([str(rng.choice(["", " ", "a\nb", "\x1b[2J", "../x"]))] * len(labels)),
        lambda: parquet_bytes(value(images, None), labels, CLASSES),
        lambda: parquet_bytes(value(images, b""), labels, CLASSES),
        lambda: parquet_bytes(value(images, rng.bytes(200)), labels, CLASSES),
        lambda: parquet_bytes(value(images, bomb), labels, CLASSES, compression="zstd"),
        lambda: parquet_bytes([bomb] * len(images), labels, CLASSES, compression="zstd", use_dictionary=True),
        lambda: parquet_bytes([bomb[: 1 << 20]] * 1000, [0] * 1000, CLASSES, rows=1000, use_dictionary=True),
        lambda: parquet_bytes([None] * len(images), labels, CLASSES),
        lambda: parquet_bytes([], [], CLASSES),
        lambda: make(labels, CLASSES, extra={f"c{i}": labels for i in range(int(rng.integers(1, 2000)))}),
        lambda: make(labels, CLASSES, image="\x1b[2J", label="a.b"),
        lambda: make(labels, CLASSES, image="bytes", is_struct=False),
        lambda: make([float(label) for label in labels], CLASSES),
    ]
    return choices[int(rng.integers(len(choices)))]()


def _mutated_parquet(made: Hostile, rng: np.random.Generator) -> tuple[str, bytes, bool]:
    """How it was made, the file, and whether all images that are found must be among those that are known."""
    content = made.good[int(rng.integers(len(made.good)))]
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    kind = str(
        rng.choice(
            ["odd", "bytes", "footer", "footer bits", "length", "pages", "cut", "joined"],
            p=[0.25, 0.1, 0.15, 0.2, 0.05, 0.15, 0.05, 0.05],
        )
    )
    if kind == "odd":
        return kind, _odd_parquet(rng, made), False
    if kind == "bytes":
        return kind, change_bytes(content, rng, made.good[0])[0], False
    changed = bytearray(content)
    if kind == "footer":
        inner, _ = change_bytes(content[footer:-8], rng)
        return kind, content[:footer] + inner + len(inner).to_bytes(4, "little") + b"PAR1", False
    if kind == "footer bits":
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(footer, len(content) - 8))] = int(rng.integers(256))
        return kind, bytes(changed), False
    if kind == "length":
        value = int(rng.choice([0, 1, footer, len(content), 2**31 - 1, 2**31, 2**32 - 1]))
        return kind, content[:-8] + value.to_bytes(4, "little") + b"PAR1", False
    if kind == "pages":
        for _ in range(int(rng.integers(1, 6))):
            changed[int(rng.integers(4, footer))] = int(rng.integers(256))
        return kind, bytes(changed), False
    if kind == "cut":
        return kind, content[: int(rng.integers(len(content)))], False
    return kind, content + content, False


def _good_tars(images: list[bytes], labels: list[int]) -> list[bytes]:
    made = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        files: list[tuple[str, bytes]] = []
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            files.append((f"{number:06}.jpg", image))
            fields = {"label": label, "class_name": CLASSES[label], "é": "ü" * 100}
            if number % 2 or format == tarfile.GNU_FORMAT:
                files.append((f"{number:06}.cls", str(label).encode()))
            files.append((f"{number:06}.json", json.dumps(fields).encode()))
        made.append(tar_bytes(files, format))
    return made


def _odd_tar(rng: np.random.Generator, made: Hostile) -> bytes:
    """A whole tar with odd samples among good ones."""
    files: list[tuple[str, bytes]] = []
    for number, (image, label) in enumerate(zip(made.images, made.labels, strict=True)):
        files += [(f"{number:06}.png", image), (f"{number:06}.cls", str(label).encode())]
    at = int(rng.integers(NUM_IMAGES))
    key, image = f"{at:06}", made.images[at]
    raw: dict[str, Any] = {"label": int(rng.integers(3)), "class_name": "x", "deep": {"a": [1, 2]}}
    field = str(rng.choice(["label", "class_name", "deep"]))
    raw[field] = HOSTILE[int(rng.integers(len(HOSTILE)))]
    text, _ = json_text(raw, rng)
    labels = (b"", b"x", b"-1", b"1000000", b"9" * 5000, b"1e3", b" 2 \n", b"\xff", b"0x1", b"1_0", "٣".encode())
    label = labels[int(rng.integers(len(labels)))]
    choices: list[Callable[[], list[tuple[str, bytes]]]] = [
        lambda: [(f"{key}.json", text)],
        lambda: [("new.jpg", image), ("new.json", text)],
        lambda: [("new.jpg", image), ("new.json", text)],
        lambda: [("new.jpg", image), ("new.cls", label)],
        lambda: [("new.jpg", image), ("new.txt", label)],
        lambda: [("new.jpg", image)],
        lambda: [("new.cls", b"1")],
        lambda: [(f"{key}.jpg", image)],
        lambda: [(f"{key}.cls", b"1")],
        lambda: [(f"{key}.seg.png", image)],
        lambda: [(f"a/{key}.jpg", image), (f"a/{key}.cls", b"1")],
        lambda: [("new.jpg", image), ("new.json", b"[" * 100_000)],
        lambda: [("new.jpg", image), ("new.json", b" " * (2 << 20))],
        lambda: [(f"o{i}.cls", b"1") for i in range(int(rng.integers(5000)))],
        lambda: [(".jpg", image), (".cls", b"1")],
        lambda: [("a/.hidden/x.jpg", image), ("__MACOSX/x.jpg", image), ("._x.jpg", image)],
        lambda: [("../x.jpg", image), ("../x.cls", b"1")],
        lambda: [("new.jpg", image[: len(image) // 2]), ("new.cls", b"1")],
        lambda: [("new", image), ("new.cls", b"1")],
    ]
    place = int(rng.integers(len(files) + 1))
    files[place:place] = choices[int(rng.integers(len(choices)))]()
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    return tar_bytes(files, formats[int(rng.integers(3))])


def _mutated_tar(made: Hostile, rng: np.random.Generator) -> tuple[str, bytes, bool]:
    content = made.good[int(rng.integers(3))]
    kind = str(rng.choice(["odd", "header byte", "bytes", "cut", "block"], p=[0.4, 0.3, 0.15, 0.1, 0.05]))
    if kind == "odd":
        return kind, _odd_tar(rng, made), False
    if kind == "bytes":
        return kind, change_bytes(content, rng, made.good[0])[0], False
    if kind == "cut":
        return kind, content[: int(rng.integers(len(content)))], True
    changed = bytearray(content)
    if kind == "block":
        start, size = int(rng.integers(len(content) // 512)) * 512, int(rng.integers(1, 4)) * 512
        return kind, content[:start] + content[start + size :], False
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    at = int(rng.choice(headers)) + int(rng.integers(512))
    changed[at] = int(rng.integers(256))
    if rng.integers(2):  # with the checksum made good
        start = at // 512 * 512
        changed[start + 148 : start + 156] = b" " * 8
        changed[start + 148 : start + 156] = b"%06o\0 " % sum(changed[start : start + 512])
    return kind, bytes(changed), True


def _judge(made: Hostile, kind: str, suffix: str, answer: dict[str, Any], known: bool) -> Outcome:
    if answer["cpu"] > 10:
        return Outcome("hung", f"{kind}: {answer['cpu']:.1f} s of processor time")
    if "refused" in answer:
        ok = "\n" not in answer["refused"] and suffix in answer["refused"]
        if "crashes pyarrow" in answer["refused"]:
            kind += ", which crashes pyarrow"
        return Outcome("ok" if ok else "wrong", f"{kind}: refused, but: {answer['refused'][:300]}", f"{kind}: refused")
    if answer["problems"]:
        return Outcome("wrong", f"{kind}: converted, but verify says {answer['problems'][0]}")
    if known and any(data not in made.stored for _, data in answer["samples"]):
        return Outcome("wrong", f"{kind}: converted, with an image that is none of the source")
    crashes = ", with images that crash pyarrow" if answer["crashes"] else ""
    return Outcome("ok", group=f"{kind}: converted{crashes}")


def hostile(
    suffix: str,
    mutated: Callable[[Hostile, np.random.Generator], tuple[str, bytes, bool]],
    num_workers: int,
    made: Hostile,
    seeds: Sequence[int],
    scratch: Path,
) -> Iterator[Outcome]:
    """Converts a changed file for each seed."""
    with ConvertingChild(CHILD.replace("WORKERS", str(num_workers)), scratch) as child:
        for seed in seeds:
            kind, content, known = mutated(made, np.random.default_rng([8, seed]))
            path = scratch / f"{seed}{suffix}"
            path.write_bytes(content)
            answer = child.convert(path, kind)
            yield answer if isinstance(answer, Outcome) else _judge(made, kind, suffix, answer, known)


KINDS = [
    Kind(
        "conversion of hostile Parquet files",
        1_500,
        partial(prepare, make_good=_good_parquet),
        partial(hostile, ".parquet", _mutated_parquet, 1),
        batch=50,
    ),
    Kind(
        "conversion of hostile WebDataset tars",
        1_500,
        partial(prepare, make_good=_good_tars),
        partial(hostile, ".tar", _mutated_tar, 0),
        batch=100,
    ),
]
