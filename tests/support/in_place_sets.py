"""Images of all kinds of JPEGs in class folders and in tars, and shard sets of them in place."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

from jpeg_files import make_image, pillow_jpeg
from PIL import Image

from sdpnet.pipelines.shards.manifest import Manifest
from sdpnet.preprocess.adoption.command import index_images
from sdpnet.preprocess.adoption.look import Look
from sdpnet.preprocess.adoption.lookers import Lookers
from sdpnet.preprocess.sources.scan import scan

__all__ = ["CLASSES", "adopt_images", "as_ilsvrc_tars", "as_webdataset", "write_images", "write_odd_images"]

CLASSES = ("ant", "bee", "cow")
SIZES = ((40, 56), (75, 33), (130, 170), (310, 260))


def write_images(root: Path) -> Path:
    """Three classes of 8 training and 4 validation JPEGs: baseline, progressive, grey, with all common samplings."""
    kinds = (
        {"subsampling": "4:2:0", "quality": 90},
        {"progressive": True, "subsampling": "4:2:0"},
        {"mode": "L"},
        {"subsampling": "4:4:4", "restart_marker_rows": 1},
        {"progressive": True, "subsampling": "4:2:2", "quality": 95},
        {"mode": "L", "progressive": True},
        {"subsampling": "4:2:2", "optimize": True},
        {"progressive": True, "subsampling": "4:4:4"},
    )
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = SIZES[(number + label) % len(SIZES)]
                options = dict(kinds[(number + 3 * label) % len(kinds)])
                data = pillow_jpeg(
                    make_image(10 * label + number, height, width), options.pop("mode", "RGB"), **options
                )
                (root / split / name / f"{number}.jpg").write_bytes(data)
    return root


def write_odd_images(root: Path) -> Path:
    """The same, with a PNG and a CMYK JPEG in train."""
    write_images(root)
    Image.fromarray(make_image(90, 50, 60)).save(root / "train" / "ant" / "odd.png")
    (root / "train" / "cow" / "cmyk.jpg").write_bytes(pillow_jpeg(make_image(91, 45, 70), "CMYK"))
    return root


def as_ilsvrc_tars(images: Path, root: Path) -> Path:
    """The same images as ILSVRC2012's tars: a tar of class tars, a flat tar, and labels beside it."""
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for folder in sorted((images / "train").iterdir()):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for path in sorted(folder.iterdir()):
                    inner.add(path, path.name)
            entry = tarfile.TarInfo(f"{folder.name}.tar")
            entry.size = len(content.getvalue())
            content.seek(0)
            outer.addfile(entry, content)
    lines = []
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as flat:
        for number, path in enumerate(sorted((images / "val").glob("*/*"))):
            flat.add(path, f"{number:08d}{path.suffix}")
            lines.append(f"{number:08d}{path.suffix} {path.parent.name}\n")
    (root / "val.txt").write_text("".join(lines))
    return root


def as_webdataset(images: Path, root: Path) -> Path:
    """The same images as WebDataset tars of 5 samples, each an image and its label, with the names of the classes."""
    root.mkdir()
    for split in ("train", "val"):
        paths = sorted((images / split).glob("*/*"))
        for number, first in enumerate(range(0, len(paths), 5)):
            with tarfile.open(root / f"{split}-{number:04d}.tar", "w") as shard:
                for key, path in enumerate(paths[first : first + 5], first):
                    label = str(CLASSES.index(path.parent.name)).encode()
                    for suffix, content in (("jpg", path.read_bytes()), ("cls", label)):
                        entry = tarfile.TarInfo(f"{key:06d}.{suffix}")
                        entry.size = len(content)
                        shard.addfile(entry, io.BytesIO(content))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return root


def adopt_images(source: Path, out: Path, look: Look | None = None, on_bad: str = "fail") -> Manifest:
    """Indexes a folder in this process, as the command does."""
    found = scan(source, out=out)
    with Lookers(look or Look(), 0) as lookers:
        return index_images(found, os.path.basename(source), out, lookers, look, on_bad=on_bad)
