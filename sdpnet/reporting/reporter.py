"""What a run says while it works: one progress line on a terminal, plain lines elsewhere, and `metrics.jsonl`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.console import Console

from sdpnet.distributed.processes import AsyncRead
from sdpnet.pipelines.errors import printable
from sdpnet.reporting.metrics_file import MetricsFile
from sdpnet.reporting.progress_line import ProgressLine
from sdpnet.reporting.trackers import Tracker

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

    A run that continues after `resumed_step` drops the lines of later steps, and where `evaluated` is False that step's
    evaluation too.

    Nothing of this ends a run: lines that a full disk refuses are kept for later, a tracker that fails is left out from
    then on, and what stdout does not take is `sdpnet.pipelines.lasting_output`'s matter.
    """

    def __init__(
        self,
        path: Path,
        *,
        is_main: bool,
        resumed_step: int,
        evaluated: bool = True,
        trackers: Sequence[Tracker] = (),
        require_own: Callable[[], object] = lambda: None,
    ) -> None:
        self._is_main = is_main
        self._trackers = list(trackers)
        self._console = Console(quiet=not is_main, highlight=False)
        self._progress: ProgressLine | None = None
        self._coming: dict[str, Any] | None = None  # metrics of a log interval, with values that may not be here yet
        self._file = MetricsFile(path, self.say, require_own)
        if is_main:
            self._file.keep_up_to(resumed_step, evaluated=evaluated)

    def __enter__(self) -> Reporter:
        if self._is_main and sys.stdout is not None and sys.stdout.isatty():
            self._progress = ProgressLine(self._console)
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(*([] if error is None else [RuntimeError])):  # the GPU's, which is being told already
            self._tell()
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        self._track(lambda tracker: tracker.close(failed=kind is not None))

    def say(self, text: str) -> None:
        """One line for the person who watches; control characters, as names of files may have them, are escaped."""
        self._console.print(printable(text), markup=False, soft_wrap=True)

    def begin_epoch(self, epoch: int, step: int, steps: int) -> None:
        if self._progress is not None:
            self._progress.begin(epoch + 1, step, steps)

    def advance(self) -> None:
        """After each step."""
        self._tell()
        if self._progress is not None:
            self._progress.step()

    def training(self, metrics: dict[str, Any]) -> None:
        """After a log interval; values may be of `AsyncRead`."""
        self._tell()
        self._coming = metrics
        if all(value.ready for value in metrics.values() if isinstance(value, AsyncRead)):
            self._tell()

    def settle(self) -> None:
        """Before a checkpoint: writes metrics that are still on their way, which a run that continues from it would not
        write again."""
        self._tell()

    def _tell(self) -> None:
        if self._coming is None:
            return
        coming, self._coming = self._coming, None
        metrics = {key: value.read() if isinstance(value, AsyncRead) else value for key, value in coming.items()}
        self._write(metrics)
        loss, rate = f"loss {metrics['train_loss']:.4f}", f"{metrics['images_per_second']:,.0f} images/s"
        lr, waiting = f"lr {metrics['lr']:.2e}", f"waiting for data {metrics['data_wait_fraction']:.0%}"
        if self._progress is not None:
            self._progress.show([rate, loss, lr, waiting])
        else:
            self.say(f"epoch {metrics['epoch'] + 1}  step {metrics['step']}  {loss}  {lr}  {rate}  {waiting}")

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
            self._file.append(metrics)
        self._track(lambda tracker: tracker.write(metrics))

    def _track(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:  # of a library: a full disk, no network, its own faults
                self._trackers.remove(tracker)
                reason = (str(error).strip().splitlines() or [""])[0]
                self.say(
                    f"{tracker.name} has failed and gets nothing from here on ({type(error).__name__}: {reason}); "
                    "metrics.jsonl has all"
                )


def _scores(metrics: Mapping[str, Any], prefix: str) -> str:
    top1, top5, loss = (metrics[f"{prefix}{name}"] for name in ("top1", "top5", "val_loss"))
    return f"top-1 {top1:.2%}  top-5 {top5:.2%}  validation loss {loss:.4f}"
