"""What goes wrong during a training, in the real loop: what is not finite, no memory, mistakes in how it is called."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import equal
from faulty_trainings import BAD_STEP, LAST_STEP, arguments, final, refused
from torch import nn
from trainings import metrics, stop_after

import sdpnet.train
import sdpnet.training.scoring
from sdpnet.checkpoints.model import latest_checkpoint, load_checkpoint
from sdpnet.distributed.run_directory import run_directory
from sdpnet.model.sdpnet import SdPNet
from sdpnet.optim.nonfinite import Verdict
from sdpnet.pipelines.terminal.remedy import install_extra
from sdpnet.train import main
from sdpnet.training.evaluate import Scores, evaluate
from sdpnet.training.run_state import Run

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = math.nan, math.inf
QUICK = [("loss", NAN, "fp32"), ("gradient", INF, "fp32"), ("images", NAN, "fp32"), ("images", INF, "bf16")]
QUICK += [("gradient", INF, "fp16")]


def kept(state: dict[str, Any]) -> dict[str, Any]:
    """Of a run or checkpoint: weights and batch-norm statistics, average, optimizer but for the step's rate."""
    return {name: state[name] for name in ("model", "ema", "ema_updates")} | {"optimizer": state["optimizer"]["state"]}


def copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, (list, tuple)) else value


class Stage:
    """A device stage that gives one pixel of its first image another value."""

    def __init__(self, stage: Any, value: float) -> None:
        self.stage, self.value = stage, value

    def __call__(self, batch: Any) -> Any:
        images, targets = self.stage(batch)
        images[0, 0, 0, 0] = self.value
        return images, targets


def injected(run: Run, where: str, value: float) -> Callable[[], None]:
    """Makes the next step's loss, a gradient or the images not finite; returns what mends them."""
    loss, stage = run.training_step.loss, run.training_step.stage
    if where == "gradient":
        return run.model.get_parameter("head.2.bias").register_hook(lambda g: torch.full_like(g, value)).remove
    if where == "loss":
        run.training_step.loss = lambda logits, targets: loss(logits, targets) * value
    else:
        run.training_step.stage = Stage(stage, value)  # type: ignore[assignment]

    def mend() -> None:
        run.training_step.loss, run.training_step.stage = loss, stage

    return mend


class BadSteps:
    """`take_step` with injected values in some steps; notes the run's state before and after, and its verdicts."""

    def __init__(self, where: str, value: float, steps: tuple[int, ...] = (BAD_STEP,)) -> None:
        self.where, self.value, self.steps = where, value, steps
        self.take_step = sdpnet.train.take_step
        self.before: dict[int, Any] = {}
        self.after: dict[int, Any] = {}

    def __call__(self, run: Run, *rest: Any) -> Any:
        step = run.cursor.step + 1
        self.before[step] = copied(kept(run.state()))
        mend = injected(run, self.where, self.value) if step in self.steps else None
        try:
            return self.take_step(run, *rest)
        finally:
            self.after[step] = copied(kept(run.state()))
            if mend:
                mend()


def finite(state: Any) -> bool:
    if isinstance(state, torch.Tensor):
        return bool(state.isfinite().all())
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return all(map(finite, values))


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize(
    ("where", "value", "amp"),
    [
        pytest.param(where, value, amp, marks=[] if (where, value, amp) in QUICK else pytest.mark.slow)
        for where in ("loss", "gradient", "images")
        for value in (NAN, INF)
        for amp in ("fp32", "bf16", "fp16")
    ],
)
def test_what_is_not_finite_changes_nothing(
    where: str,
    value: float,
    amp: str,
    policy: str,
    shard_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = BadSteps(where, value)
    monkeypatch.setattr(sdpnet.train, "take_step", steps)
    settings = [f"train.amp={amp}", f"train.on_nonfinite={policy}"]
    status = main(arguments(shard_set, tmp_path, *settings))
    out, err = capsys.readouterr()
    assert equal(steps.after[BAD_STEP], steps.before[BAD_STEP])
    assert not equal(steps.after[BAD_STEP - 1], steps.before[BAD_STEP - 1]), "steps do change it"
    searching = amp == "fp16" and where == "gradient"  # how the scaler finds its scale: no bad step
    if policy == "stop" and not searching:
        assert status == 2 and err.startswith(f"error: step {BAD_STEP}: ") and err.count("\n") == 1
        assert not (tmp_path / "model.safetensors").exists()
        assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000002.pt"
        return
    assert status == 0 and err == ""
    assert ("not finite" in out) != searching
    state = final(tmp_path)
    assert state["cursor"]["step"] == LAST_STEP and finite(kept(state))
    assert state["guard"]["bad_steps"] == ([] if searching else [BAD_STEP])
    expected = steps.before[BAD_STEP]
    if policy == "rollback" and not searching:
        expected = kept(load_checkpoint(tmp_path / "checkpoints" / "step_00000002.pt"))
    assert equal(steps.before[BAD_STEP + 1], expected)


def without(step: int, checkpoint: Path | None) -> Callable[..., Any]:
    """`take_step` that takes the batch of `step` and leaves it be, or loads a checkpoint then: what is to come out."""
    take_step = sdpnet.train.take_step

    def taking(run: Run, stream: Iterator[Any], *rest: Any) -> Any:
        if run.cursor.step + 1 != step:
            return take_step(run, stream, *rest)
        next(stream)
        run.cursor.step += 1
        run.cursor.step_in_epoch += 1
        if checkpoint is not None:
            saved = torch.load(checkpoint, weights_only=True)
            run.model.load_state_dict(saved["model"])
            run.optimizer.load_state_dict(saved["optimizer"])
            assert run.ema is not None
            run.ema.module.load_state_dict(saved["ema"])
            run.ema.num_updates = saved["ema_updates"]
        return torch.zeros(()), torch.zeros(()), Verdict("step")

    return taking


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_run_with_a_bad_step_is_a_run_without_it(
    policy: str, shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps after it are those of a run that never had it; stopped behind it and resumed it ends the same."""
    settings = ["model.dropout=0.2", f"train.on_nonfinite={policy}"]
    bad, again, never = (tmp_path / name for name in ("bad", "again", "never"))
    for out, status in ((bad, 0), (again, 130)):
        with monkeypatch.context() as patched:
            patched.setattr(sdpnet.train, "take_step", BadSteps("loss", NAN))
            stop_after(BAD_STEP + 1 if out == again else 0, patched)
            assert main(arguments(shard_set, out, *settings)) == status
    assert main([*arguments(shard_set, again, *settings), "--resume"]) == 0
    assert equal(final(again), final(bad))
    assert str(metrics(again)) == str(metrics(bad))  # NaN is not equal to itself

    checkpoint = never / "checkpoints" / "step_00000002.pt" if policy == "rollback" else None
    monkeypatch.setattr(sdpnet.train, "take_step", without(BAD_STEP, checkpoint))
    assert main(arguments(shard_set, never, *settings)) == 0
    assert equal(kept(final(never)), kept(final(bad)))


def test_a_rollback_takes_the_checkpoint_before_a_damaged_one(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.on_nonfinite=rollback", "train.checkpoint_interval=1", "train.async_checkpoints=false"]
    steps = BadSteps("loss", NAN)
    damaged = tmp_path / "checkpoints" / f"step_{BAD_STEP - 1:08d}.pt"

    def spoiling(run: Run, *rest: Any) -> Any:
        if run.cursor.step + 1 == BAD_STEP:
            damaged.write_bytes(b"damaged")
        return steps(run, *rest)

    monkeypatch.setattr(sdpnet.train, "take_step", spoiling)
    assert main(arguments(shard_set, tmp_path, *settings)) == 0
    out = capsys.readouterr().out
    assert f"{damaged}: " in out and "trying the one before it" in out
    assert equal(steps.before[BAD_STEP + 1], steps.before[BAD_STEP - 1])


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_many_bad_steps_end_the_run(
    policy: str,
    shard_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The count goes on in a resumed run. The state that the limit leaves behind is good."""
    settings = [f"train.on_nonfinite={policy}", "train.max_nonfinite=2"]
    with monkeypatch.context() as patched:
        patched.setattr(sdpnet.train, "take_step", BadSteps("images", INF, (1, 3)))
        stop_after(4, patched)
        assert main(arguments(shard_set, tmp_path, *settings)) == 130
    monkeypatch.setattr(sdpnet.train, "take_step", BadSteps("gradient", INF, (5,)))
    assert main([*arguments(shard_set, tmp_path, *settings), "--resume"]) == 2
    err = capsys.readouterr().err
    assert "step 5: gradient not finite, 3 of the last 1000 steps (train.max_nonfinite = 2)" in err
    assert err.count("\n") == 1
    assert finite(kept(final(tmp_path)))


def test_out_of_memory_says_what_fits(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fake: the model claims to have no memory for more than two images; it then trains with `micro_batch` 2."""
    forward = SdPNet.forward

    def cramped(self: SdPNet, images: torch.Tensor) -> torch.Tensor:
        if self.training and len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")
        return forward(self, images)

    monkeypatch.setattr(SdPNet, "forward", cramped)
    assert main(arguments(shard_set, tmp_path)) == 2
    assert capsys.readouterr().err == (
        "error: out of GPU memory with 4 images at a time: 2 fit; set train.micro_batch=auto to keep batches of 4, "
        "or data.batch_size_per_gpu=2\n"
    )
    assert main(arguments(shard_set, tmp_path, "train.micro_batch=2")) == 0


@pytest.mark.parametrize("images", [1, 3])
def test_micro_batches_give_the_whole_batchs_losses(
    images: int, shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With batch norm held at its running statistics only the order of float32 additions differs."""
    monkeypatch.setattr(nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False))
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert main(arguments(shard_set, whole)) == 0
    assert main(arguments(shard_set, split, f"train.micro_batch={images}")) == 0
    for ours, theirs in zip(metrics(split), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.fixture(scope="module")
def finished(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(arguments(shard_set, out)) == 0
    torch.set_num_threads(threads)
    return out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.dim=32"], "is of another model: "),
        (["model.transformer_blocks=2"], "is of another model: it lacks transformer_blocks.1."),
        (["model.num_classes=7"], "is of another model: head.2.weight is (3, 64) there, (7, 64) here"),
        (["ema.decay=0"], "has an average of the weights; set ema.decay as that run had it"),
        (["optim.name=muon"], "holds the state of another optimizer"),
        (["seed=5"], "was trained with seed 0, not 5"),
        (["data.batch_size_per_gpu=6"], "with global_batch_size 4, not 6"),
    ],
)
def test_resuming_as_another_run(
    settings: list[str], message: str, finished: Path, shard_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert message in refused([*arguments(shard_set, finished, *settings), "--resume"], capsys)
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert after == before, "a refused run is left as it was"


def test_resuming_with_an_average_that_the_run_lacks(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(shard_set, tmp_path, "ema.decay=0")) == 0
    assert "has no average of the weights" in refused([*arguments(shard_set, tmp_path), "--resume"], capsys)


def test_resuming_in_another_precision(shard_set: Path, tmp_path: Path) -> None:
    """Also from a run that needed no scaler to one that does, and back."""
    for epochs, amp in ((1, "bf16"), (2, "fp16"), (3, "fp32")):
        command = arguments(shard_set, tmp_path, f"train.epochs={epochs}", f"train.amp={amp}")
        assert main([*command, "--resume"]) == 0
    assert final(tmp_path)["cursor"]["step"] == 3 * LAST_STEP


def test_a_second_run_in_the_same_place(finished: Path, shard_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds a run already; pass --resume" in refused(arguments(shard_set, finished), capsys)
    with run_directory(finished):
        line = refused([*arguments(shard_set, finished), "--resume"], capsys)
    assert f"another run (process {os.getpid()} on " in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.batch_size_per_gpu=3"], "data.batch_size_per_gpu"),
        (["train.accumulate=7"], "an epoch has only 6 batches"),
        (["train.timeout_seconds=0"], "train.timeout_seconds = 0.0: must be 1 to "),
        (["model.num_classes=2"], "must be at least 3"),
        (["optim.lr_reference_batch=512", "optim.min_lr=1e-4"], "optim.min_lr = 0.0001: must be at most 7.81e-06"),
        (["log.tensorboard=true"], install_extra("tensorboard")),
        (["log.wandb=project"], install_extra("wandb")),
    ],
)
def test_what_cannot_be_trained(
    settings: list[str],
    message: str,
    shard_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    assert message in refused(arguments(shard_set, tmp_path / "run", *settings), capsys)


@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "text", "a shard set"])
def test_starting_from_what_is_no_run(
    kind: str, shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = shard_set if kind == "a shard set" else tmp_path / kind
    if kind == "an empty folder":
        where.mkdir()
    elif kind == "text":
        where.write_text("no weights")
    line = refused(arguments(shard_set, tmp_path / "run", f"train.start_from={where}"), capsys)
    assert str(where) in line


def test_a_signal_names_the_status(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the main process scores, too: what was scored half is scored again."""

    def stopping(*of_evaluation: Any) -> Scores | None:
        os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(*of_evaluation)

    with monkeypatch.context() as patched:
        patched.setattr(sdpnet.training.scoring, "evaluate", stopping)
        assert main(arguments(shard_set, tmp_path)) == 128 + signal.SIGUSR1
    assert not any("top1" in line for line in metrics(tmp_path))
    assert main([*arguments(shard_set, tmp_path), "--resume"]) == 0
    assert any("top1" in line for line in metrics(tmp_path))
