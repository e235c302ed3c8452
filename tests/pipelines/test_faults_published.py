"""Files that somebody removes or changes after a conversion has given them their names, and before it has ended."""

from __future__ import annotations

import os
import signal

import pytest
from faults import Fault, command_line, contents

LAST = Fault("io.open", "quarantine")  # all files but the quarantine and the manifest have their names
BETWEEN = Fault("replace", nth=2)  # one has
FILES = {
    "beton": ["train.beton", "train.crc32", "val.beton", "val.crc32"],
    "tar": ["train-000000.tar", "train-000000.idx", "train-000001.samples", "val-000000.tar"],
}


@pytest.mark.parametrize(("format", "name"), [(format, name) for format, names in FILES.items() for name in names])
@pytest.mark.parametrize("change", ["removed", "a folder", "shorter"])
def test_the_next_run_notices(commands, tiny_folder, tmp_path, format, name, change):
    out = tmp_path / "out"
    arguments = command_line(tiny_folder, out)
    assert commands.run(format, arguments, LAST).status == -signal.SIGKILL
    path = out / name
    if change == "shorter":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
        if change == "a folder":
            path.mkdir()
    for _ in range(2):  # and each one after it
        ended = commands.run(format, arguments)
        assert ended.status == 2 and "Traceback" not in ended.stderr
        assert ended.stderr.splitlines()[-1].startswith(f"error: {path}: ")
        assert not (out / "manifest.json").exists()


def test_the_file_that_was_published_first(commands, tiny_folder, tiny_sets, tmp_path):
    out = tmp_path / "out"
    arguments = command_line(tiny_folder, out)
    assert commands.run("beton", arguments, BETWEEN).status == -signal.SIGKILL
    (name,) = (name for name in os.listdir(out) if name != ".unfinished")
    content = (out / name).read_bytes()
    (out / name).unlink()
    ended = commands.run("beton", arguments)
    assert ended.status == 2 and f"error: {out / name}: was removed after" in ended.stderr
    (out / name).write_bytes(content)  # somebody finds it again
    assert commands.run("beton", arguments).status == 0
    assert contents(out) == contents(tiny_sets["beton"])
