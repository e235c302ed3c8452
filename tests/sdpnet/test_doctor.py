"""`sdpnet doctor`: what it says of cards, pipelines and limits, and that it says so where it does not know."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_output import one_line

from sdpnet import cli
from sdpnet.benchmarks import throughput as rates
from sdpnet.commands import doctor
from sdpnet.commands.doctor import build_supports, expected_rate, verdict
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.terminal.remedy import install_extra

DEFAULT_WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # as CUDA 13 builds them


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 0), DEFAULT_WHEEL, False),  # V100
        ((7, 0), ["sm_50", "sm_60", "sm_70"], True),
        ((8, 0), DEFAULT_WHEEL, True),  # A100
        ((8, 9), DEFAULT_WHEEL, True),  # L4: the code for 8.6
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),  # H200
        ((9, 1), ["sm_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 1), ["compute_90"], True),
        ((8, 0), ["compute_90"], False),
        ((9, 0), ["gfx90a"], False),
        ((9, 0), [], False),
    ],
)
def test_which_cards_a_build_runs_on(capability: tuple[int, int], architectures: list[str], runs: bool) -> None:
    """https://docs.nvidia.com/cuda/cuda-c-programming-guide: binary and PTX compatibility."""
    assert build_supports(capability, architectures) is runs


def test_the_verdict_names_the_slowest_stage() -> None:
    rates = {"reading": 9000.0, "decoding": 1640.4, "copying": 50000.0, "the model step": 3900.0}
    limit, advice = verdict(rates, {})
    assert limit == (
        "What limits training here is decoding: expect about 1,640 images/s; next comes the model step with 3,900"
    )
    assert advice.startswith("To do: give it more cores")


def test_the_verdict_promises_nothing_that_was_not_measured() -> None:
    limit, _, missing = verdict({"reading": 100.0, "the model step": None}, {"the model step": "no GPU"})
    assert "expect at most 100 images/s" in limit and missing == "the model step: not measured (no GPU)"
    assert verdict({"reading": None}, {}) == ["What limits training here: not measured", "reading: not measured"]


def test_a_cpu_that_decodes_and_trains_does_one_after_the_other() -> None:
    rates = {"reading": 9000.0, "decoding": 600.0, "the model step": 300.0}
    assert expected_rate(rates, one_processor=False) == 300
    assert expected_rate(rates, one_processor=True) == pytest.approx(200)
    assert expected_rate({**rates, "reading": 100.0}, one_processor=True) == 100
    assert expected_rate({**rates, "decoding": None}, one_processor=True) == 300
    assert expected_rate(dict.fromkeys(rates), one_processor=True) is None
    line = verdict(rates, {}, one_processor=True)[0]
    assert line == (
        "What limits training here is the model step: expect about 200 images/s (decoding and the step share the "
        "cores); next comes decoding with 600"
    )


def examine(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["doctor", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_backend_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for loaded in [m for m in sys.modules if m.startswith("ffcv.") or m == "sdpnet.pipelines.executors.ffcv"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    facts = examine(capsys)
    assert "pipeline 'ffcv' cannot be used here" in facts["pipelines"]["ffcv"]
    assert install_extra("ffcv") in facts["pipelines"]["ffcv"]
    assert facts["pipelines"]["torchvision"] is None and facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["gpus"] == [] and facts["no_gpu"].startswith("none") and facts["usable_cores"] >= 1
    assert facts["threads"].startswith(f"threads: {torch.get_num_threads()} (")
    rates = facts["rates"]
    assert all(
        rates[name] is None for name in ("disk", "memory", "decode_one_core", "decode_all_cores", "copy", "step")
    )
    assert facts["verdict"][0] == "What limits training here: not measured"
    assert "reading: not measured (pass --data SHARDS)" in facts["verdict"]
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch's threads" in out and "pipeline ffcv" in out and out.count("not measured") >= 6


def test_a_narrow_terminal_loses_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch: {torch.__version__.split('+')[0]}" in lines and f"interpreter: {sys.executable}" in lines


@pytest.mark.slow
def test_with_shards_and_the_step(
    shard_set: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.05)
    monkeypatch.setattr(doctor, "choose_pipeline", lambda device, format: "torchvision")
    facts = examine(capsys, "--data", str(shard_set), "--config", "debug", "--step")
    rates = facts["rates"]
    assert rates["pipeline"] == "torchvision" and rates["image_size"] == 64 and rates["fits_in_memory"] is True
    assert rates["copy"] is None and rates["step_batch_size"] == 8
    measured = [
        rates["memory"]["images_per_second"],
        rates["decode_one_core"],
        rates["decode_all_cores"],
        rates["step"],
    ]
    assert all(rate > 0 for rate in measured)
    expected = min(measured[0], 1 / (1 / measured[2] + 1 / measured[3]))  # both on the same cores
    assert facts["expected_images_per_second"] == pytest.approx(expected)
    assert f"expect about {expected:,.0f} images/s" in facts["verdict"][0] and len(facts["verdict"]) == 2


def test_a_pipeline_that_ends_does_not_end_the_doctor(
    tar_set: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.05)
    monkeypatch.setattr(doctor, "choose_pipeline", lambda device, format: "no such pipeline")
    facts = examine(capsys, "--data", str(tar_set), "--config", "debug")
    assert facts["rates"]["decode_one_core"] is None and facts["rates"]["memory"]["images_per_second"] > 0
    assert any("decoding with no such pipeline" in problem for problem in facts["rates"]["problems"])
    assert "decoding: not measured" in facts["verdict"]


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_reads_each_sample_once(threads: int, tar_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    _, reader = open_split(tar_set, "train")

    def encoded(sample: int) -> Any:
        read.append(sample)
        return type(reader).encoded(reader, sample)

    monkeypatch.setattr(reader, "encoded", encoded, raising=False)
    monkeypatch.setattr(rates, "open_split", lambda *_: (open_split(tar_set, "train")[0], reader))
    _, warm = rates.reading_rates(str(tar_set), "train", threads, 60)
    assert sorted(read) == sorted(2 * list(range(24)))  # from the disk, then from memory
    assert warm.bytes_per_second / warm.images_per_second == pytest.approx(reader.nbytes.mean())


def test_mistakes(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(cli.main(["doctor", "--data", str(tmp_path)]), capsys, "manifest.json")
    one_line(cli.main(["doctor", "--data", str(shard_set), "--split", "tran"]), capsys, "no split 'tran'")
    one_line(cli.main(["doctor", "--config", "debgu"]), capsys, "did you mean 'debug'")
