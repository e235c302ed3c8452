from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

from sdpnet.benchmarks import depthwise as bench_depthwise
from sdpnet.benchmarks.depthwise import DTYPES, add_arguments, main, measure, run
from sdpnet.execution.variants.choice import Measured, Variants
from sdpnet.execution.variants.conv_block import CANDIDATES
from sdpnet.pipelines.errors import UserError

CPU = torch.device("cpu")


def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    record = measure(CPU, 256, 20)
    assert record["input"] == [256, 768, 14, 14] and record["kernel_size"] == 7
    assert record["results"].startswith("not measured") and record["device"] is None
    if not torch.cuda.is_available():
        assert main(["--json", str(tmp_path / "record.json")]) == 0
        assert json.loads((tmp_path / "record.json").read_text())["results"] == record["results"]


def test_every_dtype_and_contestant_is_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def race(variants: Variants, device: torch.device, *, rounds: int) -> dict[str, Measured]:
        assert rounds == 3 and variants.tolerance == float("inf")
        halves = "float32" not in variants.what
        times = Measured([0.003, 0.002 if halves else 0.004, 0.001])
        return {**dict.fromkeys(CANDIDATES, times), "triton": Measured(reason="out of GPU memory")}

    monkeypatch.setattr(bench_depthwise, "runs_on", lambda device: True)
    monkeypatch.setattr(bench_depthwise, "race", race)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    record = json.loads(json.dumps(measure(CPU, 8, 3)))
    assert list(record["results"]) == list(DTYPES)
    for passes in record["results"].values():
        assert list(passes) == ["forward", "forward and backward"]
        assert all(list(figures) == list(CANDIDATES) for figures in passes.values())
    fp32 = record["results"]["fp32"]["forward and backward"]
    assert fp32["depthwise"] == {"median_ms": 3.0, "min_ms": 1.0, "max_ms": 4.0}
    assert record["results"]["bf16"]["forward"]["torch"]["median_ms"] == 2.0
    assert fp32["triton"] == "out of GPU memory"


def test_impossible_numbers() -> None:
    parser = ArgumentParser()
    add_arguments(parser)
    with pytest.raises(UserError, match=r"^--rounds = 0: must be at least 1$"):
        run(parser.parse_args(["--rounds", "0"]))
