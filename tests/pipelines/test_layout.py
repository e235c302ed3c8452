from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conversion import write_manifest

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards import layout
from sdpnet.pipelines.shards import manifest as manifests
from sdpnet.pipelines.shards.manifest import read_manifest
from sdpnet.preprocess.verify import verify

EMPTY = {"num_samples": 0, "bytes": 1024, "sha256": "", "sidecars": {}, "hashed_from": 0}


def test_manifest_round_trip(shard_set):
    manifest = manifests.read_manifest(shard_set)
    assert manifest.to_json() == (shard_set / manifests.MANIFEST_NAME).read_text()
    assert manifest.classes == ("ant", "bee", "cow")
    _, reader = layout.open_split(shard_set, "val")
    assert reader.num_samples == 10


def test_schema_version_2_is_read(shard_set, tmp_path):
    raw = json.loads((shard_set / manifests.MANIFEST_NAME).read_text())
    raw["schema_version"] = 2
    for split in raw["splits"].values():
        for file in split["files"]:
            assert file.pop("hashed_from") > 0
            content = (shard_set / file["name"]).read_bytes()
            (tmp_path / file["name"]).write_bytes(content)
            file["sha256"] = hashlib.sha256(content).hexdigest()
            for name in file["sidecars"]:
                (tmp_path / name).write_bytes((shard_set / name).read_bytes())
    write_manifest(tmp_path, raw)
    assert list(verify(tmp_path)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(schema_version=1), "schema version 1, but this sdpnet reads version 3"),
        (lambda raw: raw.pop("classes"), "incomplete or damaged .*classes"),
        (lambda raw: raw["splits"]["train"].update(num_samples=3), "do not add up"),
        (lambda raw: raw["splits"]["train"].update(format="zip"), "format 'zip' is not one of beton, tar"),
        (lambda raw: raw["splits"]["train"]["files"][0].update(name="../train.beton"), "lies outside the shard set"),
        (lambda raw: raw["splits"]["train"]["files"][0].update(sidecars={"/etc/x": ""}), "lies outside the shard set"),
        (
            lambda raw: raw["splits"]["train"]["files"][0].update(sidecars={"val.crc32": ""}),
            "'val.crc32' is listed twice",
        ),
        (lambda raw: raw["splits"]["train"].update(files=[], num_samples=0), "'train': 0 .beton files, but one"),
        (lambda raw: raw["splits"]["train"]["files"].append({**EMPTY, "name": "b.beton"}), "'train': 2 .beton files"),
        (lambda raw: raw["splits"]["train"]["files"][0].update(sidecars=["x"]), "incomplete or damaged"),
        (lambda raw: raw["splits"]["train"]["files"][0].update(name="other.beton"), "it is not there"),
        (lambda raw: raw["splits"]["train"]["files"][0].update(bytes=7), "not the manifest's 7"),
        (lambda raw: raw.update(classes=["ant", "bee"]), "sample 16: label 2, but there are 2 classes"),
        (lambda raw: raw["splits"].pop("train"), "no split 'train'; it has val"),
    ],
)
def test_a_wrong_manifest_is_refused(shard_set, tmp_path, change, message):
    for file in shard_set.glob("*.beton"):
        (tmp_path / file.name).symlink_to(file)
    raw = json.loads((shard_set / manifests.MANIFEST_NAME).read_text())
    change(raw)
    write_manifest(tmp_path, raw)
    with pytest.raises(ShardError, match=message):
        layout.open_split(tmp_path, "train")


def test_any_changed_bit_of_a_manifest_is_refused(shard_set, tmp_path):
    raw = json.loads((shard_set / manifests.MANIFEST_NAME).read_text())
    write_manifest(tmp_path, {**raw, "classes": ["ant", "bée", "cow"]})
    path = tmp_path / manifests.MANIFEST_NAME
    content = path.read_bytes()
    assert manifests.read_manifest(tmp_path).classes == ("ant", "bée", "cow")
    for position in range(len(content)):
        for bit in {position % 8, 5}:  # 5: small and capital letters
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            with pytest.raises(ShardError, match=r"was changed|not valid JSON|schema version"):
                manifests.read_manifest(tmp_path)
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(ShardError, match=r"was changed|not valid JSON"):
            manifests.read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"schema_version": ' + "9" * 5000 + "}", '{"schema_version": 3}', "[]"]
)
def test_a_hostile_manifest_is_refused(tmp_path, text):
    (tmp_path / manifests.MANIFEST_NAME).write_text(text)
    with pytest.raises(ShardError, match=r"manifest\.json: "):
        manifests.read_manifest(tmp_path)


def test_no_manifest(tmp_path):
    with pytest.raises(ShardError, match=r"no manifest\.json here"):
        manifests.read_manifest(tmp_path)
    (tmp_path / manifests.MANIFEST_NAME).write_bytes(b"\xff{")
    with pytest.raises(ShardError, match="not valid JSON"):
        manifests.read_manifest(tmp_path)


def test_reader_tables_are_plain_arrays(shard_set):
    _, reader = layout.open_split(shard_set, "train")
    assert (reader.labels.dtype, reader.sizes.dtype, reader.modes.dtype) == (np.int64, np.int32, np.uint8)
    assert reader.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_a_tar_named_twice_is_refused(tar_set, tmp_path):
    raw = json.loads((tar_set / manifests.MANIFEST_NAME).read_text())
    train = raw["splits"]["train"]
    train["files"].append(train["files"][0])
    train["num_samples"] += train["files"][0]["num_samples"]
    write_manifest(tmp_path, raw)
    with pytest.raises(ShardError, match=r"'train-000000\.tar' is listed twice"):
        manifests.read_manifest(tmp_path)


def test_what_is_given_instead_of_a_shard_set(tmp_path: Path) -> None:
    (tmp_path / "file.beton").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    for name, remedy in (
        ("absent", "no manifest.json here, so it is not a shard set (make one"),
        ("run", "but a run (sdpnet report shows it); give the shard set"),
        ("file.beton", "a .beton file, not a shard set; sdpnet adopt makes one of it"),
    ):
        with pytest.raises(ShardError, match=re.escape(f"{tmp_path / name}: ") + ".*" + re.escape(remedy)):
            read_manifest(tmp_path / name)
    for name in ("manifest.json", "other.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ShardError, match=re.escape(f"a file of a shard set; give its folder, {tmp_path}")):
        read_manifest(tmp_path / "file.beton")
