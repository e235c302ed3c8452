from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conversion import convert_folder

from sdpnet.pipelines.terminal.remedy import install_extra
from sdpnet.preprocess import build_ffcv

ROOT = Path(__file__).resolve().parents[2]


def test_parts_on_a_real_ray_cluster_make_the_same_shards(image_folder, tmp_path):
    """Ray itself, on this machine; relative paths are made absolute for its tasks."""
    pytest.importorskip("ray", reason="Ray is not installed (it is an optional executor)")
    source = tmp_path / image_folder.name
    source.symlink_to(image_folder)
    code = "import sys; from sdpnet.preprocess.build_ffcv import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--source", image_folder.name, "--out", "out", "--ray", "2", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "part 1/2: 17 images" in done.stderr and "24 images found, 24 converted" in done.stdout
    convert_folder(image_folder, tmp_path / "whole")
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_without_ray_one_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert build_ffcv.main(["--source", "in", "--out", str(tmp_path / "out"), "--ray", "2"]) == 2
    assert capsys.readouterr().err.endswith(f"to mend it: {install_extra('ray')}\n")
    assert build_ffcv.main(["--source", "in", "--out", str(tmp_path / "out"), "--ray", "0"]) == 2
    assert "--ray 0: must be at least 1" in capsys.readouterr().err
