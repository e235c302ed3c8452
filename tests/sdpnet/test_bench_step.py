"""The benchmark of the training step: what it reports and refuses, never how fast anything is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_output import one_line
from pipeline_batches import installed

import sdpnet.benchmarks.step_race
import sdpnet.benchmarks.throughput
import sdpnet.training.setup
from sdpnet import cli, train
from sdpnet.benchmarks import step as bench_step
from sdpnet.benchmarks.step import MODELS_BY_DEFAULT
from sdpnet.benchmarks.step_race import CONV_BLOCKS, PartClock, _Contestant, recipe_of, run_race
from sdpnet.benchmarks.step_report import Page
from sdpnet.benchmarks.throughput import noise, step_rate
from sdpnet.config.load import load_config
from sdpnet.execution.hardware import Card, choose_step
from sdpnet.model.flops import conv_block_macs, forward_macs
from sdpnet.model.sdpnet import MODELS
from sdpnet.pipelines.terminal.remedy import install_extra
from sdpnet.training.step import PARTS, TrainingStep, make_training_step

pytestmark = pytest.mark.usefixtures("one_thread")

FEEDS = [name for name in ("native", "dali") if installed(name)]
SMALL = ["--image-size", "64", "--batch-size", "4", "--rounds", "2", "--seconds", "0.01", "--device", "cpu"]


def measure(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "record.json"
    status = cli.main(["bench", "step", *SMALL, *arguments, "--json", str(out)])
    return status, json.loads(out.read_text())


@pytest.mark.skipif(not FEEDS, reason="neither native nor dali")
def test_synthetic_and_real_feed(tmp_path: Path, shard_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "sdpnet_tiny", "--data", str(shard_set), "--pipelines", ",".join(FEEDS)]
    status, record = measure(tmp_path, *arguments)
    assert status == 0 and "waiting" not in capsys.readouterr().err
    assert [row["feed"] for row in record["results"]] == ["synthetic", *FEEDS]
    for row in record["results"]:
        assert row["forward_gmac"] == round(forward_macs(MODELS["sdpnet_tiny"], 64) / 1e9, 3)
        assert len(row["images_per_second"]) == 2 and row["min"] <= row["median"] <= row["max"]
        assert set(row["part_ms"]) == {*PARTS, CONV_BLOCKS}
        conv_ms = row["part_ms"].pop(CONV_BLOCKS)
        passes = [row["part_ms"][name] for name in ("forward", "backward")]
        assert conv_ms["min"] > 0 and conv_ms["max"] < sum(part["max"] for part in passes)
        share = conv_block_macs(MODELS["sdpnet_tiny"], 64) / forward_macs(MODELS["sdpnet_tiny"], 64)
        assert row["conv_blocks"]["share_of_macs"] == round(share, 4)
        assert all(0 <= part["min"] <= part["median"] <= part["max"] for part in row["part_ms"].values())
        # The parts are the step: no time is in none of them or in two.
        step_ms = 4 * 1000 / row["median"]
        assert sum(part["min"] for part in row["part_ms"].values()) <= 1000 * 4 / row["min"]
        assert sum(part["max"] for part in row["part_ms"].values()) >= 0.5 * step_ms
        ms = sorted(record["augment_ms"])  # by itself, of a batch of 4
        assert ms[0] / 1000 * row["min"] / 4 * 0.99 <= row["share_of_augment"] <= ms[-1] / 1000 * row["max"] / 4 * 1.01
        assert row["share_of_matmul"] > 0 and row["peak_bytes"] is None
    synthetic, *real = record["results"]
    assert synthetic["to_synthetic"] == 1 and all(row["to_synthetic"] > 0 for row in real)
    assert len(record["matmul_tflops"]) == len(record["augment_ms"]) == 2 and record["copy_ms"] is None
    assert {"cpu", "cores", "gpu", "driver"} <= set(record["hardware"])


def test_a_peer_of_timms(tmp_path: Path) -> None:
    _, record = measure(tmp_path, "--model", "convnext_atto,no_such_model", "--batch-size", "2")
    peer, unknown = record["results"]
    assert peer["conv_blocks"] is None and CONV_BLOCKS not in peer["part_ms"]
    assert peer["parameters"] == 3_695_520 and peer["median"] > 0  # timm's table: 3.7 M
    assert "no_such_model" in unknown["not_measured"]


def test_without_timm_a_row_has_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    status, record = measure(tmp_path, "--model", "vit_base_patch16_224")
    assert status == 1
    assert record["results"][0]["not_measured"] == f"timm is not installed: {install_extra('timm')}"


def test_parts_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = PartClock(torch.device("cpu"))
    for part in ("data wait", "forward", "conv forward", "forward", "conv backward"):
        clock.end(part)
    seconds = {"data wait": 1, "augment": 0, "forward": 9, "backward": 5, "optimizer": 0, "EMA": 0, CONV_BLOCKS: 8}
    assert clock.seconds() == seconds


def test_conv_blocks_begin_and_end_where_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which a step computes; compiled blocks do not hide it."""
    marks: list[str] = []
    monkeypatch.setattr(PartClock, "end", lambda self, part: marks.append(part))
    recipe = recipe_of("sdpnet_tiny", ["data.image_size=64", "data.batch_size_per_gpu=2"])
    device = torch.device("cpu")
    contestant = _Contestant("sdpnet_tiny", recipe, 10, device)
    passes = ["forward", "conv forward", "forward", "backward", "conv backward", "backward"]
    marks.clear()
    contestant.step(noise(recipe, 10, device), PartClock(device))
    assert marks == ["", "data wait", "augment", *passes, "optimizer", "EMA"]


BEGIN, END = "<!-- sdpnet" + " bench step -->", "<!-- end of sdpnet bench step -->"


def test_a_page_gets_the_table(tmp_path: Path) -> None:
    page = tmp_path / "docs.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nAfter\n")
    for _ in range(2):  # what it wrote, it can write again
        _, record = measure(tmp_path, "--model", "sdpnet_tiny,no_such_model", "--markdown", str(page))
    before, _, rest = page.read_text().partition(f"{BEGIN}\n")
    table, _, after = rest.partition(END)
    assert before == "# Before\n\n" and after == "\n\nAfter\n" and "old" not in table
    source, _, header, rule, tiny, unknown = table.splitlines()
    assert "CPU, 64 px, batches of 4" in source and source.endswith("[record](record.json).")
    assert header.count("|") == rule.count("|") == tiny.count("|") == unknown.count("|") == 9
    assert [cell.strip() for cell in tiny.split("|")[1:3]] == ["sdpnet_tiny", "synthetic"]
    assert abs(int(tiny.split("|")[3].split()[0].replace(",", "")) - record["results"][0]["median"]) <= 0.6  # roundings
    assert "no_such_model" in unknown.split("|")[3]


def test_the_documents_have_a_place_for_it() -> None:
    page = Path(__file__).parents[2] / "docs" / "benchmarks" / "index.md"
    Page(page)
    lines = page.read_text().splitlines()
    for model in MODELS_BY_DEFAULT:  # a row for each, measured or not
        for feed in ("synthetic", "native", "dali"):
            assert sum(line.startswith(f"| {model} | {feed} |") for line in lines) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "sdpnet_x"], ["--model", "sdpnet_xl"]),
        (["--batch-size", "3"], ["--batch-size", "even"]),
        (["--rounds", "0"], ["--rounds", "at least 1"]),
        (["--seconds", "0"], ["--seconds"]),
        (["--image-size", "65"], ["data.image_size", "multiple"]),
        (["--json", "/no/such/directory/x.json"], ["--json", "directory"]),
        (["--markdown", "/no/such/page.md"], ["--markdown", "No such file"]),
        (["--markdown", __file__], ["--markdown", "has no line"]),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    one_line(bench_step.main([*SMALL, *arguments]), capsys, *words)


def test_mistakes_with_data(shard_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--model", "sdpnet_tiny", "--data", str(shard_set)]
    one_line(bench_step.main([*SMALL, *data, "--pipelines", "natif"]), capsys, "--pipelines", "native")
    one_line(bench_step.main([*SMALL, *data, "--batch-size", "26"]), capsys, "--batch-size", "at most 24")


def test_it_times_the_step_that_training_takes(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train`, `bench step` and `doctor` make the same object of the same recipe, and call it."""
    made: list[TrainingStep] = []
    called: list[TrainingStep] = []
    take = TrainingStep.__call__

    def make(*arguments: Any) -> Any:
        step, notes = make_training_step(*arguments)
        made.append(step)
        return step, notes

    def noting(self: TrainingStep, *arguments: Any, **options: Any) -> Any:
        called.append(self)
        return take(self, *arguments, **options)

    for module in (sdpnet.training.setup, sdpnet.benchmarks.step_race, sdpnet.benchmarks.throughput):
        monkeypatch.setattr(module, "make_training_step", make)
    monkeypatch.setattr(TrainingStep, "__call__", noting)
    recipe = ["model.dropout=0.3", "model.drop_path=0.1", "model.layer_scale=0.1", "optim.clip_grad_norm=1"]
    recipe += ["train.accumulate=2", "ema.decay=0.9", "data.batch_size_per_gpu=2", "train.device=cpu"]
    settings = [*recipe, f"data.path={shard_set}"]
    command = [word for setting in settings for word in ("--set", setting)]
    assert train.main(["--config", "debug", "--out", str(tmp_path / "run"), *command, "--set", "train.epochs=1"]) == 0
    run_race(["debug"], ["synthetic"], settings, 3, torch.device("cpu"), choose_step(Card()), rounds=1, seconds=0.01)
    step_rate(load_config("debug", settings), 2, torch.device("cpu"), 0.01)

    of_train, of_bench, of_doctor = made
    assert {id(step) for step in called} == {id(step) for step in made}
    for step in (of_bench, of_doctor):
        assert type(step) is type(of_train) and step.choices == of_train.choices
        assert str(step.model).partition("head")[0] == str(of_train.model).partition("head")[0]  # classes may differ
        assert str(step.optimizer).count("Parameter Group") == str(of_train.optimizer).count("Parameter Group")
        assert step.config.optim == of_train.config.optim and step.config.train.accumulate == 2
        assert step.ema is not None and step.ema.options == of_train.ema.options  # type: ignore[union-attr]
        assert step.memory_format == of_train.memory_format and step.micro_batch == of_train.micro_batch
