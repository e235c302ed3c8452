"""Training end to end: what a run leaves, resume to the bit, signals, several processes, golden losses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import TORCHRUN
from pipeline_batches import installed
from trainings import EPOCHS, STEPS_PER_EPOCH, arguments, metrics, same_run, weights

from sdpnet.checkpoints.model import latest_checkpoint, load_checkpoint, load_model
from sdpnet.config.load import load_config
from sdpnet.distributed.processes import Processes
from sdpnet.model.sdpnet import SdPNet
from sdpnet.pipelines.options import ShardOptions
from sdpnet.reporting.reporter import Reporter
from sdpnet.train import main
from sdpnet.training.evaluate import evaluate
from sdpnet.training.setup import prepare

# torch 2.10 and 2.11 draw a model's first weights otherwise than 2.14 and 2.15 do (2.12 and 2.13 were not tried).
OLD_DRAWS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
GOLDEN = Path(__file__).parents[1] / "assets" / ("golden_losses_torch_2_10.json" if OLD_DRAWS else "golden_losses.json")


def test_a_run_leaves_what_the_readme_says(uninterrupted: Path) -> None:
    assert {p.name for p in uninterrupted.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "per_class.csv",
        "checkpoints",
        "model.safetensors",
        "model.json",
    }
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS_PER_EPOCH * EPOCHS + 1))
    assert set(training[0]) == {
        "epoch",
        "step",
        "train_loss",
        "lr",
        "grad_norm",
        "images_per_second",
        "data_wait_fraction",
        "step_ms",
    }
    assert all(0 <= line["data_wait_fraction"] <= 1 and line["images_per_second"] > 0 for line in training)
    evaluations = [line for line in lines if "top1" in line]
    assert [line["step"] for line in evaluations] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    assert load_model(uninterrupted)[1].metrics["top1"] == evaluations[-1]["top1"]


@pytest.mark.parametrize("step", range(1, STEPS_PER_EPOCH * EPOCHS + 1))
def test_stopped_at_any_step_and_resumed_it_is_the_same_run(
    step: int, shard_set: Path, uninterrupted: Path, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    interrupt(step)
    assert main(arguments(shard_set, tmp_path)) == 128 + signal.SIGINT
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None and load_checkpoint(newest)["cursor"]["step"] == step
    assert not (tmp_path / "model.safetensors").exists()
    interrupt(-1)
    assert main(["--resume", *arguments(shard_set, tmp_path)]) == 0
    same_run(uninterrupted, tmp_path)


def test_stopped_during_evaluation(
    shard_set: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    with monkeypatch.context() as patched:
        patched.setattr("sdpnet.training.scoring.evaluate", stopping)
        assert main(arguments(shard_set, tmp_path)) == 128 + signal.SIGTERM
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, STEPS_PER_EPOCH + 1))
    assert main(["--resume", "--out", str(tmp_path)]) == 0  # the run knows its config
    same_run(uninterrupted, tmp_path)


@pytest.mark.parametrize("epoch", [1, 2])
def test_stopped_right_after_an_evaluation(
    epoch: int, shard_set: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation is neither lost nor repeated, nor are its scores when it was the last."""
    report = Reporter.evaluation

    def stopping(self: Reporter, scores: dict[str, Any], num_samples: int) -> None:
        report(self, scores, num_samples)
        if scores["epoch"] + 1 == epoch:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Reporter, "evaluation", stopping)
        assert main(arguments(shard_set, tmp_path)) == 130
    assert main(["--resume", *arguments(shard_set, tmp_path)]) == 0
    same_run(uninterrupted, tmp_path)
    assert load_model(tmp_path)[1] == load_model(uninterrupted)[1]


@pytest.mark.parametrize(
    "pipeline",
    [pytest.param(p, marks=pytest.mark.skipif(not installed(p), reason=p)) for p in ("native", "dali", "ffcv")],
)
def test_resume_is_exact_on_the_other_pipelines(
    pipeline: str, shard_set: Path, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(arguments(shard_set, whole, pipeline=pipeline)) == 0
    interrupt(8)
    assert main(arguments(shard_set, parts, pipeline=pipeline)) == 128 + signal.SIGINT
    interrupt(-1)
    assert main(["--resume", *arguments(shard_set, parts, pipeline=pipeline)]) == 0
    same_run(whole, parts)


def test_accumulation_equals_the_larger_batch_but_for_batch_norm(shard_set: Path, tmp_path: Path) -> None:
    """Without conv blocks only the patch norm sees batches; in eval-like steps losses agree closely, steps exactly."""
    settings = ["train.accumulate=2", "train.epochs=1"]
    assert main(arguments(shard_set, tmp_path / "a", *settings, "data.batch_size_per_gpu=2")) == 0
    assert main(arguments(shard_set, tmp_path / "b", "train.epochs=1")) == 0
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert [m["step"] for m in a] == [m["step"] for m in b]
    assert [m.get("lr") for m in a] == [m.get("lr") for m in b]
    assert a[0]["train_loss"] == pytest.approx(b[0]["train_loss"], rel=0.05)


def test_resume_after_a_kill_repeats_no_line(shard_set: Path, uninterrupted: Path, tmp_path: Path) -> None:
    assert main(arguments(shard_set, tmp_path, "train.checkpoint_interval=4", "train.keep_checkpoints=9")) == 0
    for name in ("step_00000012.pt", "step_00000008.pt", "step_00000006.pt"):  # as if killed after step 5
        (tmp_path / "checkpoints" / name).unlink()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "step": 13, "train_lo')
    assert main(["--resume", *arguments(shard_set, tmp_path)]) == 0
    same_run(uninterrupted, tmp_path)


def test_golden_losses(shard_set: Path, tmp_path: Path) -> None:
    """A change that should not alter training does not: noise images, so nothing but the plan and the loop counts."""
    plain = "augment.randaugment.policy=none"  # the losses are older than RandAugment
    assert main(arguments(shard_set, tmp_path, plain, pipeline="synthetic")) == 0
    losses = [m["train_loss"] for m in metrics(tmp_path) if "train_loss" in m]
    if os.environ.get("SDPNET_WRITE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    # CPUs differ in the last bits of a sum; a changed draw or rate differs in the third digit.
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=2e-4)


def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


@pytest.mark.parametrize(
    "pipeline",
    ["torchvision", pytest.param("native", marks=pytest.mark.skipif(not installed("native"), reason="native"))],
)
def test_ctrl_c_from_a_terminal(pipeline: str, shard_set: Path, tmp_path: Path) -> None:
    """The whole process group gets SIGINT, decoding workers too; none is left and nothing but our lines is printed."""
    settings = ["train.epochs=1000", "optim.warmup_epochs=0", "data.num_workers=2"]
    command = arguments(shard_set, tmp_path, *settings, pipeline=pipeline)
    process = start([sys.executable, "-m", "sdpnet.train", *command], start_new_session=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "step 8 " in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "stopped after step" in rest and "Traceback" not in rest
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_two_processes_train_and_score_as_one(shard_set: Path, tmp_path: Path) -> None:
    """Same samples and rate on two ranks as on one; batch norm sees half batches, so losses agree only closely."""
    torchrun = [*TORCHRUN, "--nproc_per_node=2", "-m"]
    settings = ["data.batch_size_per_gpu=2", "train.device=cpu", "train.epochs=1"]
    command = [*torchrun, "sdpnet.train", *arguments(shard_set, tmp_path / "two", *settings)]
    process = start(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert main(arguments(shard_set, tmp_path / "one", "train.epochs=1")) == 0
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [m["step"] for m in one] == [m["step"] for m in two] and one[0]["lr"] == two[0]["lr"]
    assert output.count("(10 images)") == 1


SWITCHES = [
    "model.position=rope",
    "model.layer_scale=0.1",
    "model.drop_path=0.3",
    "model.final_norm=true",
    "augment.label_smoothing=0.1",
    "optim.name=muon",
    "optim.layer_decay=0.8",
    "optim.schedule=cosine",
    "optim.clip_grad_norm=1",
    "ema.decay=0.9",
    "loss.kind=bce",
    "resolution.start_size=32",
    "resolution.multiple=16",
    "train.micro_batch=2",
    "train.on_nonfinite=rollback",
    "train.checkpoint_activations=true",
    "train.memory_format=contiguous",
]


def test_with_every_switch_on_resume_is_exact(
    shard_set: Path, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(arguments(shard_set, whole, *SWITCHES)) == 0
    interrupt(3)
    assert main(arguments(shard_set, parts, *SWITCHES)) == 128 + signal.SIGINT
    interrupt(-1)
    assert main(["--resume", "--out", str(parts)]) == 0
    same_run(whole, parts)
    lines = metrics(whole)
    scores = [line for line in lines if "top1" in line]
    assert len(scores) == EPOCHS and all({"ema_top1", "ema_top5", "ema_val_loss"} <= set(line) for line in scores)
    averaged, raw = load_model(whole)[0].state_dict(), load_model(whole, weights="raw")[0].state_dict()
    assert load_model(whole)[1].weights == "ema" and any(not torch.equal(averaged[k], raw[k]) for k in averaged)


def test_images_grow(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    forward = SdPNet.forward

    def watched(self: SdPNet, images: torch.Tensor) -> torch.Tensor:
        seen.append((int(self.training), images.shape[-1]))
        return forward(self, images)

    monkeypatch.setattr(SdPNet, "forward", watched)
    growing = ["resolution.start_size=32", "resolution.multiple=16", "resolution.end_epoch=2", "train.epochs=3"]
    assert main(arguments(shard_set, tmp_path, *growing)) == 0
    assert [size for training, size in seen if training] == [32] * 6 + [48] * 6 + [64] * 6
    assert {size for training, size in seen if not training} == {64}


def test_fine_tuning_starts_from_another_run(
    shard_set: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = [f"train.start_from={uninterrupted}", "train.epochs=1", "optim.lr=1e-9", "data.image_size=32"]
    assert main(arguments(shard_set, tmp_path, *begin)) == 0
    assert f"weights taken from {uninterrupted}" in capsys.readouterr().out
    before, after = weights(uninterrupted), weights(tmp_path)
    learned = [name for name in before if "norm" not in name]  # batch norm's statistics move in any case
    assert learned and all(torch.allclose(before[name], after[name], atol=1e-6) for name in learned)


def test_what_continues_needs_nothing_of_where_it_started(
    shard_set: Path, uninterrupted: Path, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    source = shutil.copytree(uninterrupted, tmp_path / "source")
    command = arguments(shard_set, tmp_path / "run", f"train.start_from={source}", "train.epochs=1")
    interrupt(2)
    assert main(command) == 128 + signal.SIGINT
    interrupt(-1)
    shutil.rmtree(source)
    assert main(["--resume", *command]) == 0


def test_a_shard_set_whose_name_reads_like_a_date(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "2026-11-23").symlink_to(shard_set)
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(Path("2026-11-23"), tmp_path / "run"), "--set", "train.epochs=1"]) == 0


def test_the_average_has_the_models_strides(shard_set: Path) -> None:
    """Else every tensor is averaged by itself."""
    for memory_format in ("channels_last", "contiguous"):
        settings = [f"data.path={shard_set}", "data.pipeline=synthetic", "ema.decay=0.9"]
        config = load_config("debug", [*settings, f"train.memory_format={memory_format}"])
        prepared = prepare(config, Processes(ShardOptions(), torch.device("cpu")))
        assert prepared.ema is not None
        pairs = zip(prepared.model.state_dict().values(), prepared.ema.module.state_dict().values(), strict=True)
        assert all(ours.stride() == theirs.stride() for ours, theirs in pairs)
