from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_group

from sdpnet.config.options import EmaOptions, OptimOptions, TrainOptions
from sdpnet.distributed.processes import Processes, join_group, leave_group
from sdpnet.model.sdpnet import create_model
from sdpnet.optim.ema import ModelEma
from sdpnet.optim.nonfinite import Guard, NonFinite, Verdict
from sdpnet.optim.optimizer import make_optimizer, step_unless
from sdpnet.pipelines.options import ShardOptions

ALONE = Processes(ShardOptions(0, 1), torch.device("cpu"))
FINITE, NAN, INFINITE = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def guard(scaler: torch.amp.GradScaler | None = None, *, asynchronous: bool = False, **options: Any) -> Guard:
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return Guard(TrainOptions(**options), torch.nn.BatchNorm2d(3), scaler, ALONE, asynchronous=asynchronous)


def check(judge: Guard, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> Verdict:
    """A step with these values, and its verdict."""
    judge.find_bad(step, loss, grad_norm)
    return judge.verdict()


def trained(
    bad_image: float | None, *, fp16_scale: float | None = None, late: bool = False, optimizer_name: str = "adamw"
) -> dict[str, Any]:
    """All state after four batches; with `bad_image` a fifth one between them holds a pixel of that value. With `late`
    the device leaves it out, which a fused AdamW can on a CPU too."""
    torch.manual_seed(0)
    model = create_model("sdpnet_tiny", 10)
    optimizer = make_optimizer(model, OptimOptions(name=optimizer_name), fused=late or None)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cpu", enabled=fp16_scale is not None, init_scale=fp16_scale or 1.0)
    ema = ModelEma(model, EmaOptions(0.9))
    guards = Guard(TrainOptions(on_nonfinite="skip"), model, scaler, ALONE, asynchronous=late)
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
        bad = guards.find_bad(step, loss, grad_norm)
        step_unless(optimizer, bad)
        scaler.update()
        ema.update(model, bad)
        actions += [guards.verdict().action] if step > 1 or not late else []
    actions += [guards.verdict(all_steps=True).action] if late else []
    assert actions == ["step", "step", *([] if bad_image is None else ["skip"]), "step", "step"]
    averages = {**ema.module.state_dict(), "updates": ema.num_updates}
    states = optimizer.state_dict()
    parts = {"adamw": states} if optimizer_name == "adamw" else states
    state = {name: part["state"] for name, part in parts.items()}
    return {"model": model.state_dict(), "optimizer": state, "ema": averages}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_skipped_batch_leaves_no_trace(value: float, late: bool) -> None:
    """Weights, batch-norm statistics, AdamW's moments and steps, and EMA are those of a run that never saw it.

    A pixel of 1e30 leaves loss and gradients finite: only the patch norm's variance overflows.
    """
    ours, theirs = trained(value, late=late), trained(None, late=late)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=False)


@pytest.mark.parametrize("late", [False, True])
def test_muon_skips_a_batch_too(late: bool) -> None:
    ours, theirs = (trained(value, late=late, optimizer_name="muon") for value in (float("nan"), None))
    assert ours["optimizer"].keys() == {"muon", "adamw"}
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=False)


def test_muons_late_steps_are_its_steps() -> None:
    ours, theirs = (trained(None, late=late, optimizer_name="muon") for late in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # AdamW's part is fused, or not


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
        check(guard(), 7, loss, grad_norm)
    assert "\n" not in str(caught.value)
    for policy in ("skip", "rollback"):
        verdict = check(guard(on_nonfinite=policy), 7, loss, grad_norm)
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
        check(stopping, 2, NAN, NAN)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_limit_counts_a_thousand_steps() -> None:
    judge = guard(on_nonfinite="skip", max_nonfinite=2)
    for step in (1, 500):
        assert check(judge, step, NAN, NAN).action == "skip"
    assert check(judge, 501, FINITE, FINITE) == Verdict("step")
    assert check(judge, 1001, NAN, NAN).action == "skip"  # step 1 is forgotten
    again = guard(on_nonfinite="skip", max_nonfinite=2)
    again.load_state_dict(judge.state_dict())
    for each in (judge, again):
        with pytest.raises(NonFinite, match=r"3 of the last 1000 steps \(train\.max_nonfinite = 2\)"):
            check(each, 1499, NAN, NAN)
    with pytest.raises(NonFinite):
        check(guard(on_nonfinite="rollback", max_nonfinite=0), 1, NAN, NAN)


def test_the_scalers_search_does_not_count() -> None:
    """Its overflows are skipped silently, even with `stop`, until the scale is down to 1; a bad loss counts at once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(FINITE)  # the scale exists from here on
    judge = guard(scaler)
    assert check(judge, 1, FINITE, INFINITE) == Verdict("skip")
    assert check(judge, 1, FINITE, NAN) == Verdict("skip")
    assert check(judge, 1, FINITE, FINITE) == Verdict("step")
    with pytest.raises(NonFinite, match="step 2: loss and gradient"):
        check(judge, 2, NAN, NAN)
    scaler.update(1.0)
    with pytest.raises(NonFinite, match="step 3: gradient"):
        check(judge, 3, FINITE, INFINITE)


def test_what_is_told_late() -> None:
    """The words and the limit of an immediate verdict, one step later; a rollback forgets what its loading undoes."""
    judge, at_once = (
        guard(on_nonfinite="skip", max_nonfinite=2, asynchronous=asynchronous) for asynchronous in (True, False)
    )
    assert judge.find_bad(1, FINITE, FINITE) == 0 and judge.verdict() == Verdict("step")
    assert judge.find_bad(2, NAN, INFINITE) == 1 and judge.verdict() == Verdict("step")
    assert judge.find_bad(3, FINITE, NAN) == 1 and judge.verdict() == check(at_once, 2, NAN, INFINITE)
    assert judge.verdict(all_steps=True) == check(at_once, 3, FINITE, NAN)
    assert judge.verdict(all_steps=True) == Verdict("step") and judge.state_dict() == at_once.state_dict()
    judge.find_bad(4, NAN, NAN)
    with pytest.raises(NonFinite, match=r"3 of the last 1000 steps"):
        judge.verdict(all_steps=True)
    back = guard(on_nonfinite="rollback", asynchronous=True)
    back.find_bad(1, NAN, NAN)
    back.find_bad(2, NAN, NAN)
    assert back.verdict().action == "rollback" and back.verdict(all_steps=True) == Verdict("step")
    stopping = guard(asynchronous=True)
    stopping.find_bad(1, NAN, NAN)
    with pytest.raises(NonFinite, match="step 1: loss and gradient not finite; lower"):
        stopping.verdict(all_steps=True)


def test_the_scalers_search_is_told_late_with_its_scale_then() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    judge = guard(scaler, asynchronous=True)
    judge.find_bad(1, FINITE, INFINITE)
    scaler.update(1.0)
    judge.find_bad(2, FINITE, INFINITE)
    assert judge.verdict() == Verdict("skip")
    with pytest.raises(NonFinite, match="step 2: gradient"):
        judge.verdict(all_steps=True)


def two_verdicts() -> list[Verdict]:
    processes = join_group("cpu")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    guard = Guard(TrainOptions(on_nonfinite="rollback"), torch.nn.BatchNorm2d(3), scaler, processes)
    only_here = float("nan") if processes.shard.rank == 1 else 1.0
    verdicts = [check(guard, 5, torch.tensor(loss), FINITE) for loss in (1.0, only_here)]
    leave_group()
    return verdicts


def test_all_processes_agree(tmp_path: Path) -> None:
    message = "step 5: loss not finite: rollback (1 of at most 10)"
    verdicts = run_group(two_verdicts, world_size=2, scratch=tmp_path)
    assert verdicts == [[Verdict("step"), Verdict("rollback", message)]] * 2
