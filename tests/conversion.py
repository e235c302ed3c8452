"""Shards for tests: a folder converted in this process, or any bytes as samples."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.manifest import Manifest, ShardFile
from preprocess.beton import BetonWriter
from preprocess.build import encoded_images, plan_conversion
from preprocess.convert import MakeWriter, OnBad, convert
from preprocess.encode import EncodedImage, EncodeSettings
from preprocess.journal import REENCODED, Records
from preprocess.scan import Scan, scan
from preprocess.workers import Workers


def convert_folder(
    source: Path | Scan,
    out: Path,
    make_writer: Any = BetonWriter,
    settings: EncodeSettings | None = None,
    num_workers: int = 0,
    on_bad: OnBad = "fail",
) -> Manifest:
    """What the build commands do, in this process; the manifest names the folder as its source."""
    found = scan(source) if isinstance(source, Path) else source
    settings = settings or EncodeSettings()
    conversion = plan_conversion(found, source.name if isinstance(source, Path) else "source", settings)
    with Workers(settings, num_workers) as workers:
        images = encoded_images(found, workers)
        return convert(conversion, images, make_writer, {"writer": str(make_writer)}, out, on_bad)


def write_manifest(directory: Path, raw: dict[str, Any]) -> None:
    """Writes a manifest that says this, with a checksum that fits."""
    body = {key: value for key, value in raw.items() if key != "checksum"}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**body, "checksum": checksum}, indent=1, sort_keys=True) + "\n"
    (directory / "manifest.json").write_text(text)


def write_samples(
    make_writer: MakeWriter, directory: Path, split: str, images: Sequence[EncodedImage]
) -> tuple[ShardFile, ...]:
    """Writes images with the labels 0, 1, ... and without a manifest."""
    records = Records(directory / f"{split}.records", 0, 0)
    with make_writer(directory, split, len(images)) as writer:
        writer.resume([])
        for label, image in enumerate(images):
            writer.add(image.data, label)
            record = (len(image.data), zlib.crc32(image.data), label, image.height, image.width, REENCODED)
            records.append(record)
        files = writer.finish(records)
    records.close()
    records.path.unlink()
    return files
