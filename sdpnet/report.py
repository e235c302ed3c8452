"""What a run says while it works: one progress line on a terminal, plain lines elsewhere, and `metrics.jsonl`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipelines.publish import publish_bytes
from sdpnet.distributed import Arriving
from sdpnet.trackers import Tracker

__all__ = ["Clock", "GpuGauge", "Reporter"]

T = TypeVar("T")


class Clock:
    """Images per second, time of a step and the share of the time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self.images = 0
        self._steps = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def stepped(self, images: int) -> None:
        """Counts one step and its images (of all processes)."""
        self.images += images
        self._steps += 1

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time until each arrives counts as waiting."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def read(self) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = now - self._since
        result = {"images_per_second": self.images / elapsed, "data_wait_fraction": self._waited / elapsed}
        if self._steps:
            result["step_ms"] = 1000 * elapsed / self._steps
        self.images, self._steps, self._waited, self._since = 0, 0, 0.0, now
        return result


class GpuGauge:
    """What this process's GPU does: on a CPU nothing, and without NVML (package nvidia-ml-py) no utilisation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._has_nvml = True

    def read(self) -> dict[str, float]:
        """`gpu_memory_gb`, the most that torch has held of it so far, in 10^9 bytes, and `gpu_utilisation`, the share
        of the last sampling period (under a second) in which a kernel ran, in [0, 1]."""
        if self._device.type != "cuda":
            return {}
        result = {"gpu_memory_gb": torch.cuda.max_memory_reserved(self._device) / 1e9}
        if self._has_nvml:
            try:
                result["gpu_utilisation"] = torch.cuda.utilization(self._device) / 100
            except Exception:  # no package, no library, or a card (MIG) that does not say: NVML's errors share no base
                self._has_nvml = False
        return result


class Reporter:
    """The main process's voice; in other processes it is silent.

    `metrics.jsonl` has one JSON object per line: after a log interval `epoch, step, train_loss, lr, grad_norm,
    images_per_second, data_wait_fraction, step_ms` and on a GPU `gpu_memory_gb, gpu_utilisation`; after an evaluation
    `epoch, step, top1, top5, val_loss` and with averaged weights `ema_top1, ema_top5, ema_val_loss`. The `trackers` get
    the same. Metrics whose values are still on their way from a GPU are told after the next step.
    """

    def __init__(self, path: Path, *, is_main: bool, resumed_step: int, trackers: Sequence[Tracker] = ()) -> None:
        self._path = path
        self._is_main = is_main
        self._trackers = trackers
        self._console = Console(quiet=not is_main, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._status = ""
        self._coming: dict[str, Any] | None = None  # metrics of a log interval, with values that may not be here yet
        if is_main and path.exists():  # lines from after the checkpoint that the run resumes from are told again
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= resumed_step]
            publish_bytes(path, "".join(f"{line}\n" for line in lines).encode())

    def __enter__(self) -> Reporter:
        if self._is_main and sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(*([] if error is None else [RuntimeError])):  # the GPU's, which is being told already
            self._tell()
        if self._progress is not None:
            self._progress.stop()
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        self._console.print(text, markup=False, soft_wrap=True)

    def begin_epoch(self, epoch: int, step: int, steps: int) -> None:
        if self._progress is not None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task("", total=steps, completed=step, epoch=epoch + 1, status=self._status)

    def advance(self) -> None:
        """After each step."""
        self._tell()
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)

    def training(self, metrics: dict[str, Any]) -> None:
        """After a log interval; values may be of `Arriving`."""
        self._tell()
        self._coming = metrics
        if all(value.here for value in metrics.values() if isinstance(value, Arriving)):
            self._tell()

    def _tell(self) -> None:
        if self._coming is None:
            return
        coming, self._coming = self._coming, None
        metrics = {key: value.read() if isinstance(value, Arriving) else value for key, value in coming.items()}
        self._write(metrics)
        self._status = status = (
            f"loss {metrics['train_loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"{metrics['images_per_second']:,.0f} images/s  waiting for data {metrics['data_wait_fraction']:.0%}"
        )
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, status=status)
        else:
            self.say(f"epoch {metrics['epoch'] + 1}  step {metrics['step']}  {status}")

    def evaluation(self, metrics: dict[str, Any], num_samples: int) -> None:
        self._tell()
        self._write(metrics)
        self.say(
            f"epoch {metrics['epoch'] + 1}  step {metrics['step']}  {_scores(metrics, '')}"
            f"{'  EMA: ' + _scores(metrics, 'ema_') if 'ema_top1' in metrics else ''}  ({num_samples:,} images)"
        )

    def masked(self, epoch: int, split: str, count: int) -> None:
        """Says how many images of an epoch were masked (`DataOptions.on_error`), if any."""
        if count:
            self.say(
                f"epoch {epoch + 1}: {count:,} images of split {split!r} could not be decoded and were masked; "
                "sdpnet verify names them"
            )

    def _write(self, metrics: dict[str, Any]) -> None:
        if self._is_main:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        for tracker in self._trackers:
            tracker.write(metrics)


def _scores(metrics: Mapping[str, Any], prefix: str) -> str:
    top1, top5, loss = (metrics[f"{prefix}{name}"] for name in ("top1", "top5", "val_loss"))
    return f"top-1 {top1:.2%}  top-5 {top5:.2%}  validation loss {loss:.4f}"


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a crash cut short
