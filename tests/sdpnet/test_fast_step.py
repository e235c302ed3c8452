"""The step as on a GPU (compiled, fused, never waiting) trains like the plain one: losses over 50 steps."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sdpnet.training.step
from sdpnet.config.load import load_config
from sdpnet.distributed.processes import Processes
from sdpnet.execution.hardware import StepChoices, choose_step, look_at
from sdpnet.optim.optimizer import make_optimizer
from sdpnet.pipelines.options import ShardOptions
from sdpnet.reporting.step_profile import StepProfile
from sdpnet.train import take_step
from sdpnet.training.setup import prepare

pytestmark = pytest.mark.gpu

STEPS = 50
RECIPE = [  # no dropout, which draws differently when it is compiled for a GPU
    *("data.pipeline=synthetic", "data.batch_size_per_gpu=8", "train.epochs=20", "augment.fused=off"),
    *("optim.lr=1e-3", "optim.warmup_epochs=1", "optim.clip_grad_norm=1", "ema.decay=0.9"),
    *("model.dropout=0", "model.position=rope", "model.layer_scale=1", "model.final_norm=true"),
]
PLAIN = [
    *("train.compile=false", "train.memory_format=contiguous", "train.patch=convolution", "train.update=torch"),
    *("train.depthwise=torch", "train.conv_block=torch", "train.attention=torch", "train.mlp=torch"),
]
FAST = ["train.compile=true", "train.memory_format=channels_last"]
OURS = ["train.patch=product", "train.conv_block=triton", "train.mlp=triton", "train.update=triton"]  # on a GPU


def losses(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *settings: str, device: str, late: bool
) -> list[float]:
    """Of `STEPS` steps; those with `late` have a fused AdamW too."""

    def choose(*args: Any, **options: Any) -> StepChoices:
        return replace(choose_step(*args, **options), asynchronous=late)

    def optimizer(*args: Any, **_: Any) -> torch.optim.Optimizer:
        return make_optimizer(*args, fused=late)

    with monkeypatch.context() as patched:
        patched.setattr(sdpnet.training.step, "choose_step", choose)
        patched.setattr(sdpnet.training.step, "make_optimizer", optimizer)
        config = load_config("debug", [*RECIPE, f"data.path={data}", *settings])
        run = prepare(config, Processes(ShardOptions(), torch.device(device)))
    values, profile = [], StepProfile(out / "trace.json", (0, 0), torch.device(device))
    with contextlib.closing(run.train_loader), contextlib.closing(run.val_loader):
        run.training_step.network.train()
        while len(values) < STEPS:
            with contextlib.closing(run.train_loader.batches(run.cursor.epoch)) as batches:
                for _ in range(run.steps_per_epoch):
                    values.append(take_step(run, batches, profile)[0])
            run.cursor.epoch += 1
    return torch.stack(values[:STEPS]).tolist()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch.compile's
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("amp", "within"), [("fp32", 1e-5), pytest.param("bf16", 1e-3, marks=pytest.mark.slow)], ids=["fp32", "bf16"]
)
def test_losses_over_50_steps(
    amp: str, within: float, device: str, shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if not look_at(torch.device(device)).has_compiler:
        pytest.skip("no C compiler, which torch.compile needs")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions as exact as matrix products
    ours = [*FAST, *(OURS if device == "cuda" else [])]
    ours += ["train.attention=triton"] if device == "cuda" and amp == "bf16" else []
    plain, fast, other = (
        losses(shard_set, tmp_path, monkeypatch, f"train.amp={amp}", *settings, device=device, late=late)
        for settings, late in ((PLAIN, False), (ours, True), ([*PLAIN, "optim.lr=1.2e-3"], False))
    )
    assert fast == pytest.approx(plain, rel=within)
    assert other != pytest.approx(plain, rel=within)  # so steps that are a little different would be seen
