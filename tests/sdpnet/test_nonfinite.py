from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_group

from sdpnet.config.options import EmaOptions, OptimOptions, TrainOptions
from sdpnet.distributed.processes import Processes, join, leave
from sdpnet.model.sdpnet import create_model
from sdpnet.optim.ema import ModelEma
from sdpnet.optim.nonfinite import Guard, NonFinite, Verdict
from sdpnet.optim.optimizer import make_optimizer
from sdpnet.pipelines.options import ShardOptions
from sdpnet.training.update import update

ALONE = Processes(ShardOptions(0, 1), torch.device("cpu"))
FINITE, NAN, INFINITE = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def guard(scaler: torch.amp.GradScaler | None = None, **options: Any) -> Guard:
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return Guard(TrainOptions(**options), torch.nn.BatchNorm2d(3), scaler, ALONE)


def trained(bad_image: float | None, *, fp16_scale: float | None = None, late: bool = False) -> dict[str, Any]:
    """All state after four batches; with `bad_image` a fifth one between them holds a pixel of that value. With `late`
    the device leaves it out, which a fused AdamW can on a CPU too."""
    torch.manual_seed(0)
    model = create_model("sdpnet_tiny", 10)
    optimizer = make_optimizer(model, OptimOptions(), fused=late or None)
    scaler = torch.amp.GradScaler("cpu", enabled=fp16_scale is not None, init_scale=fp16_scale or 1.0)
    ema = ModelEma(model, EmaOptions(0.9))
    guards = Guard(TrainOptions(on_nonfinite="skip"), model, scaler, ALONE)
    batches = torch.randn(4, 4, 3, 16, 16).unbind()
    if bad_image is not None:
        spoilt = torch.randn(4, 3, 16, 16)
        spoilt[1, 2, 3, 4] = bad_image
        batches = (*batches[:2], spoilt, *batches[2:])
    actions = []
    for step, images in enumerate(batches, 1):
        optimizer.zero_grad()
        guards.keep()
        loss = model(images).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "guard": guards, "ema": ema}
        verdict = update(step, loss, grad_norm, **parts, late=late)  # type: ignore[arg-type]
        actions += [verdict.action] if step > 1 or not late else []
    actions += [guards.told(all_steps=True).action] if late else []
    assert actions == ["step", "step", *([] if bad_image is None else ["skip"]), "step", "step"]
    averages = {**ema.module.state_dict(), "updates": ema.num_updates}
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"], "ema": averages}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_skipped_batch_leaves_no_trace(value: float, late: bool) -> None:
    """Weights, batch-norm statistics, AdamW's moments and steps, and EMA are those of a run that never saw it.

    A pixel of 1e30 leaves loss and gradients finite: only the patch norm's variance overflows.
    """
    ours, theirs = trained(value, late=late), trained(None, late=late)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=False)


def test_late_steps_are_steps() -> None:
    torch.testing.assert_close(trained(None, late=True), trained(None), rtol=1e-4, atol=1e-6)  # fused and not


@pytest.mark.parametrize("late", [False, True])
def test_a_skipped_batch_leaves_no_trace_with_a_scaler(late: bool) -> None:
    ours, theirs = trained(float("nan"), fp16_scale=4.0, late=late), trained(None, fp16_scale=4.0, late=late)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # another scale from there on


@pytest.mark.parametrize(
    ("loss", "grad_norm", "what"),
    [
        (NAN, NAN, "loss and gradient not finite"),
        (INFINITE, FINITE, "loss not finite"),
        (FINITE, -INFINITE, "gradient not finite"),
        (FINITE, NAN, "gradient not finite"),
    ],
)
def test_what_was_not_finite(loss: torch.Tensor, grad_norm: torch.Tensor, what: str) -> None:
    with pytest.raises(NonFinite, match=f"^step 7: {what}; lower optim.lr") as caught:
        guard().check(7, loss, grad_norm)
    assert "\n" not in str(caught.value)
    for policy in ("skip", "rollback"):
        verdict = guard(on_nonfinite=policy).check(7, loss, grad_norm)
        assert verdict == Verdict(policy, f"step 7: {what}: {policy} (1 of at most 10)")  # type: ignore[arg-type]


def test_stopping_leaves_the_statistics_as_they_were() -> None:
    model = torch.nn.BatchNorm2d(3)
    stopping = Guard(TrainOptions(), model, torch.amp.GradScaler("cpu", enabled=False), ALONE)
    model(torch.randn(2, 3, 4, 4))
    before = copy.deepcopy(model.state_dict())
    stopping.keep()
    model(torch.full((2, 3, 4, 4), float("nan")))
    assert not torch.isfinite(model.running_mean).any()  # type: ignore[arg-type]
    with pytest.raises(NonFinite):
        stopping.check(2, NAN, NAN)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_limit_counts_a_thousand_steps() -> None:
    judge = guard(on_nonfinite="skip", max_nonfinite=2)
    for step in (1, 500):
        assert judge.check(step, NAN, NAN).action == "skip"
    assert judge.check(501, FINITE, FINITE) == Verdict("step")
    assert judge.check(1001, NAN, NAN).action == "skip"  # step 1 is forgotten
    again = guard(on_nonfinite="skip", max_nonfinite=2)
    again.load_state_dict(judge.state_dict())
    for each in (judge, again):
        with pytest.raises(NonFinite, match=r"3 of the last 1000 steps \(train\.max_nonfinite = 2\)"):
            each.check(1499, NAN, NAN)
    with pytest.raises(NonFinite):
        guard(on_nonfinite="rollback", max_nonfinite=0).check(1, NAN, NAN)


def test_the_scalers_search_does_not_count() -> None:
    """Its overflows are skipped silently, even with `stop`, until the scale is down to 1; a bad loss counts at once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(FINITE)  # the scale exists from here on
    judge = guard(scaler)
    assert judge.check(1, FINITE, INFINITE) == Verdict("skip")
    assert judge.check(1, FINITE, NAN) == Verdict("skip")
    assert judge.check(1, FINITE, FINITE) == Verdict("step")
    with pytest.raises(NonFinite, match="step 2: loss and gradient"):
        judge.check(2, NAN, NAN)
    scaler.update(1.0)
    with pytest.raises(NonFinite, match="step 3: gradient"):
        judge.check(3, FINITE, INFINITE)


def test_what_is_told_late() -> None:
    """The words and the limit of `check`, one step later; a rollback forgets what its loading undoes."""
    judge, at_once = (guard(on_nonfinite="skip", max_nonfinite=2) for _ in range(2))
    assert judge.mark(1, FINITE, FINITE) == 0 and judge.told() == Verdict("step")
    assert judge.mark(2, NAN, INFINITE) == 1 and judge.told() == Verdict("step")
    assert judge.mark(3, FINITE, NAN) == 1 and judge.told() == at_once.check(2, NAN, INFINITE)
    assert judge.told(all_steps=True) == at_once.check(3, FINITE, NAN)
    assert judge.told(all_steps=True) == Verdict("step") and judge.state_dict() == at_once.state_dict()
    judge.mark(4, NAN, NAN)
    with pytest.raises(NonFinite, match=r"3 of the last 1000 steps"):
        judge.told(all_steps=True)
    back = guard(on_nonfinite="rollback")
    back.mark(1, NAN, NAN)
    back.mark(2, NAN, NAN)
    assert back.told().action == "rollback" and back.told(all_steps=True) == Verdict("step")
    stopping = guard()
    stopping.mark(1, NAN, NAN)
    with pytest.raises(NonFinite, match="step 1: loss and gradient not finite; lower"):
        stopping.told(all_steps=True)


def test_the_scalers_search_is_told_late_with_its_scale_then() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    judge = guard(scaler)
    judge.mark(1, FINITE, INFINITE)
    scaler.update(1.0)
    judge.mark(2, FINITE, INFINITE)
    assert judge.told() == Verdict("skip")
    with pytest.raises(NonFinite, match="step 2: gradient"):
        judge.told(all_steps=True)


def two_verdicts() -> list[Verdict]:
    processes = join("cpu")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    guard = Guard(TrainOptions(on_nonfinite="rollback"), torch.nn.BatchNorm2d(3), scaler, processes)
    only_here = float("nan") if processes.shard.rank == 1 else 1.0
    verdicts = [guard.check(5, torch.tensor(loss), FINITE) for loss in (1.0, only_here)]
    leave()
    return verdicts


def test_all_processes_agree(tmp_path: Path) -> None:
    message = "step 5: loss not finite: rollback (1 of at most 10)"
    verdicts = run_group(two_verdicts, world_size=2, scratch=tmp_path)
    assert verdicts == [[Verdict("step"), Verdict("rollback", message)]] * 2
