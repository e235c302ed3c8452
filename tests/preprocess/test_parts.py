from __future__ import annotations

import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from conversion import convert_folder

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess import build_dali, build_ffcv
from sdpnet.preprocess.conversion.command import encoded_images, plan_conversion
from sdpnet.preprocess.conversion.parts import Part, convert_part, merge
from sdpnet.preprocess.conversion.writers.beton import BetonWriter
from sdpnet.preprocess.conversion.writers.tar import TarWriter
from sdpnet.preprocess.encoding.encode import EncodeSettings
from sdpnet.preprocess.sources.scan import scan
from sdpnet.preprocess.workers.pool import Workers

TARS = partial(TarWriter, shard_bytes=60_000)
WRITERS = [pytest.param(BetonWriter, id="beton"), pytest.param(TARS, id="tar")]


class Stop(Exception):
    """What ends a conversion in these tests."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run_part(source: Path, out: Path, number: int, count: int, settings: EncodeSettings | None = None) -> int:
    found, part, settings = scan(source), Part(number, count), settings or EncodeSettings()
    images = encoded_images(found, Workers(settings, 0), part)
    return convert_part(plan_conversion(found, source.name, settings), images, part, out, "skip")


def run_merge(out: Path, make_writer) -> None:
    merge(make_writer, {"writer": str(make_writer)}, out)


@pytest.mark.parametrize("make_writer", WRITERS)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])  # 40: more parts than a split has images
def test_parts_merge_into_what_one_machine_makes(image_folder, tmp_path, make_writer, count):
    convert_folder(image_folder, tmp_path / "whole", make_writer)
    total = sum(run_part(image_folder, tmp_path / "out", number, count) for number in range(count, 0, -1))
    assert total == 34
    run_merge(tmp_path / "out", make_writer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_bad_images_of_all_parts_are_listed_once(image_folder, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(image_folder, source)
    for name in ("train/ant/000.JPEG", "train/bee/000.JPEG", "val/cow/zzz.JPEG"):
        (source / name).write_text("no image")
    convert_folder(source, tmp_path / "whole", on_bad="skip")
    for number in (1, 2, 3):
        run_part(source, tmp_path / "out", number, 3)
    run_merge(tmp_path / "out", BetonWriter)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (tmp_path / "out" / "quarantine.jsonl").read_text().count("\n") == 3


def test_a_finished_part_is_not_done_again(image_folder, tmp_path, monkeypatch):
    run_part(image_folder, tmp_path, 2, 3)
    monkeypatch.setattr("sdpnet.preprocess.workers.child.encode_image", None)
    assert run_part(image_folder, tmp_path, 2, 3) == 11
    run = tmp_path / ".unfinished" / "part-2-of-3"
    assert {path.name for path in run.iterdir()} >= {"train.spool", "val.spool", "journal.jsonl"}


def test_an_interrupted_part_goes_on(image_folder, tmp_path, monkeypatch):
    convert_folder(image_folder, tmp_path / "whole")
    run_part(image_folder, tmp_path / "out", 1, 2)
    found, part = scan(image_folder), Part(2, 2)
    conversion = plan_conversion(found, image_folder.name, EncodeSettings())

    def images(split: str, first: int):
        for index, image in enumerate(encoded_images(found, Workers(EncodeSettings(), 0), part)(split, first)):
            if index == 4:
                raise Stop
            yield image

    for _ in range(3):
        with pytest.raises(Stop):
            convert_part(conversion, images, part, tmp_path / "out")
    with pytest.raises(UserError, match=r"part-2-of-2: is not finished; run --part 2/2 again"):
        run_merge(tmp_path / "out", BetonWriter)
    run_part(image_folder, tmp_path / "out", 2, 2)
    run_merge(tmp_path / "out", BetonWriter)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_part_that_lost_images_does_not_go_on(image_folder, tmp_path):
    found, part = scan(image_folder), Part(1, 2)
    conversion = plan_conversion(found, image_folder.name, EncodeSettings())

    def images(split: str, first: int):
        for index, image in enumerate(encoded_images(found, Workers(EncodeSettings(), 0), part)(split, first)):
            if index == 4:
                raise Stop
            yield image

    with pytest.raises(Stop):
        convert_part(conversion, images, part, tmp_path)
    spool = tmp_path / ".unfinished" / "part-1-of-2" / "train.spool"
    os.truncate(spool, spool.stat().st_size - 1)
    with pytest.raises(UserError, match=r"train\.spool: .* bytes, but the journal beside it counts images to byte"):
        run_part(image_folder, tmp_path, 1, 2)


def test_merging_says_what_is_amiss(image_folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no parts are here to merge"):
        run_merge(out, BetonWriter)
    for number in (1, 3, 5):
        run_part(image_folder, out, number, 5)
    with pytest.raises(UserError, match="2 of 5 parts are missing: 2/5, 4/5"):
        run_merge(out, BetonWriter)
    with pytest.raises(UserError, match="has part-1-of-5, so this cannot be 2/4"):
        run_part(image_folder, out, 2, 4)
    run_part(image_folder, out, 2, 5, EncodeSettings(quality=50))
    run_part(image_folder, out, 4, 5)
    with pytest.raises(UserError, match=r"part-2-of-5: was made from other images, with other settings"):
        run_merge(out, BetonWriter)
    with pytest.raises(UserError, match="an unfinished conversion with other settings lies here"):
        run_part(image_folder, out, 2, 5)
    shutil.rmtree(out / ".unfinished" / "part-2-of-5")
    run_part(image_folder, out, 2, 5)
    with pytest.raises(UserError, match="parts lie here"):
        convert_folder(image_folder, out)
    run_merge(out, BetonWriter)
    with pytest.raises(UserError, match="already holds a shard set"):
        run_part(image_folder, out, 1, 5)
    with pytest.raises(UserError, match="already holds a shard set"):
        run_merge(out, BetonWriter)


def test_a_part_that_has_changed_on_the_way_is_found(image_folder, tmp_path):
    for number in (1, 2):
        run_part(image_folder, tmp_path, number, 2)
    spool = tmp_path / ".unfinished" / "part-2-of-2" / "train.spool"
    content = bytearray(spool.read_bytes())
    content[len(content) // 2] ^= 1
    spool.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.spool: image \d+ has changed \(CRC-32\); remove .*part-2-of-2 and"):
        run_merge(tmp_path, BetonWriter)
    shutil.rmtree(spool.parent)
    run_part(image_folder, tmp_path, 2, 2)
    run_merge(tmp_path, BetonWriter)
    convert_folder(image_folder, tmp_path / "whole")
    assert {name: data for name, data in contents_of_files(tmp_path).items()} == contents(tmp_path / "whole")


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("text", ["3", "0/3", "4/3", "a/b", "1/0", "-1/2", "1/2/3", "1 / 2"])
def test_a_wrong_part_is_one_line(text, capsys, tmp_path):
    assert build_ffcv.main(["--source", "in", "--out", str(tmp_path / "out"), f"--part={text}"]) == 2
    assert re.match(
        r"error: part .*: (must be a number and a count|parts are numbered from 1)", capsys.readouterr().err
    )


def test_the_commands(image_folder, tmp_path, capsys):
    """Parts of either command can be merged into either format."""
    out = tmp_path / "out"
    for number, command in ((2, build_ffcv), (1, build_dali)):
        arguments = ["--source", str(image_folder), "--out", str(out), "--part", f"{number}/2", "--workers", "1"]
        assert command.main(arguments) == 0
        assert f"part {number}/2 is finished, 17 images" in capsys.readouterr().out
    assert build_dali.main(["--out", str(out), "--merge", "--source", str(image_folder)]) == 2
    assert "--source with --merge" in capsys.readouterr().err
    assert build_dali.main(["--out", str(out), "--merge"]) == 0
    assert "24 images found, 24 converted" in capsys.readouterr().out
    assert build_dali.main(["--source", str(image_folder), "--out", str(tmp_path / "whole"), "--workers", "1"]) == 0
    assert contents(out) == contents(tmp_path / "whole")
