"""The output of a run while it trains: a progress line on a terminal, plain lines elsewhere, and `metrics.jsonl`."""

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
from sdpnet.pipelines.terminal.quiet import is_quiet
from sdpnet.reporting.metrics_file import MetricsFile
from sdpnet.reporting.progress_line import ProgressLine
from sdpnet.reporting.trackers import Tracker

__all__ = ["Clock", "GpuGauge", "Reporter"]

T = TypeVar("T")


class Clock:
    """Measures images per second, the time of a step and the fraction of time spent waiting for data.

    Args:
        device_waits: returns the fraction of the time since its last call for which the device waited for data, or None
            where the host's waiting is the device's, as on a CPU.
    """

    def __init__(self, device_waits: Callable[[], float | None] = lambda: None) -> None:
        self._device_waits = device_waits
        self.images = 0
        self._steps = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def stepped(self, images: int) -> None:
        """Counts one step and the images of all processes in it."""
        self.images += images
        self._steps += 1

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yields the same batches and measures the time that the host spends waiting for them."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def read(self) -> dict[str, float]:
        """The metrics since the last call, by their names in `metrics.jsonl`."""
        now = time.perf_counter()
        elapsed = now - self._since
        waits = self._device_waits()
        fraction = self._waited / elapsed if waits is None else waits
        result = {"images_per_second": self.images / elapsed, "data_wait_fraction": fraction}
        if self._steps:
            result["step_ms"] = 1000 * elapsed / self._steps
        self.images, self._steps, self._waited, self._since = 0, 0, 0.0, now
        return result


class GpuGauge:
    """Memory and utilisation of this process's GPU. Utilisation needs NVML (package nvidia-ml-py)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._has_nvml = True

    def read(self) -> dict[str, float]:
        """The metrics by their names in `metrics.jsonl`; none on a CPU.

        `gpu_memory_gb` is the largest amount of memory that torch has reserved so far, in 10^9 bytes. `gpu_utilisation`
        is the fraction, in [0, 1], of NVML's last sampling period (under a second) in which a kernel ran.
        """
        if self._device.type != "cuda":
            return {}
        result = {"gpu_memory_gb": torch.cuda.max_memory_reserved(self._device) / 1e9}
        if self._has_nvml:
            try:
                result["gpu_utilisation"] = torch.cuda.utilization(self._device) / 100
            except Exception:  # NVML or its package is missing, or a MIG card does not report it; no common base class
                self._has_nvml = False
        return result


class Reporter:
    """Reports metrics and messages, in the main process only.

    `metrics.jsonl` has one JSON object per line: after a log interval `epoch, step, train_loss, lr, grad_norm,
    images_per_second, data_wait_fraction, step_ms` and on a GPU `gpu_memory_gb, gpu_utilisation`; after an evaluation
    `epoch, step, top1, top5, val_loss` and with averaged weights `ema_top1, ema_top5, ema_val_loss`. The trackers get
    the same metrics. `data_wait_fraction` is the device's (`sdpnet.execution.data_wait`). Metrics whose values are
    still being copied from a GPU are reported after the next step.

    With `--quiet`, metrics are written but not printed.

    No failure of the output ends a run: lines that a full disk refuses are kept for later, a tracker that fails gets no
    more metrics, and `sdpnet.pipelines.lasting_output` handles a stdout that cannot be written.

    Args:
        path: `metrics.jsonl`.
        resumed_step: the step of the checkpoint that the run continues from, or 0. Lines of later steps are removed.
        evaluated: whether the checkpoint was saved after the evaluation of that step. If not, its scores are removed
            too.
        require_own: raises `OSError` where the file would be written into another run's directory.
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
        # Metrics of a log interval whose values may still be on their way from the GPU. Waiting for them here would
        # stop the host from running ahead of the device.
        self._pending: dict[str, Any] | None = None
        self._file = MetricsFile(path, self.say, require_own)
        if is_main:
            self._file.keep_up_to(resumed_step, evaluated=evaluated)

    def __enter__(self) -> Reporter:
        if self._is_main and not is_quiet() and sys.stdout is not None and sys.stdout.isatty():
            self._progress = ProgressLine(self._console)
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # After another error, an error of the GPU on reading the values would hide the first one.
        with contextlib.suppress(*([] if error is None else [RuntimeError])):
            self._report_pending()
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        self._track(lambda tracker: tracker.close(failed=kind is not None))

    def say(self, text: str) -> None:
        """Prints one line. Control characters, which names of files may contain, are escaped."""
        self._console.print(printable(text), markup=False, soft_wrap=True)

    def begin_epoch(self, epoch: int, step: int, steps: int) -> None:
        if self._progress is not None:
            self._progress.begin(epoch + 1, step, steps)

    def advance(self) -> None:
        """Moves the progress line on by one step. To be called after each step."""
        self._report_pending()
        if self._progress is not None:
            self._progress.step()

    def training(self, metrics: dict[str, Any]) -> None:
        """Reports the metrics of a log interval. Values may be of type `AsyncRead`."""
        self._report_pending()
        self._pending = metrics
        if all(value.ready for value in metrics.values() if isinstance(value, AsyncRead)):
            self._report_pending()

    def settle(self) -> None:
        """Waits for the values of pending metrics and reports them. To be called before a checkpoint is saved.

        A run that continues from the checkpoint does not train the steps before it again, so it would not write their
        metrics.
        """
        self._report_pending()

    def _report_pending(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        metrics = {key: value.read() if isinstance(value, AsyncRead) else value for key, value in pending.items()}
        self._write(metrics)
        loss, rate = f"loss {metrics['train_loss']:.4f}", f"{metrics['images_per_second']:,.0f} images/s"
        lr, waiting = f"lr {metrics['lr']:.2e}", f"waiting for data {metrics['data_wait_fraction']:.0%}"
        if self._progress is not None:
            self._progress.show([rate, loss, lr, waiting])
        elif not is_quiet():
            self.say(f"epoch {metrics['epoch'] + 1}  step {metrics['step']}  {loss}  {lr}  {rate}  {waiting}")

    def evaluation(self, metrics: dict[str, Any], num_samples: int) -> None:
        self._report_pending()
        self._write(metrics)
        if is_quiet():
            return
        self.say(
            f"epoch {metrics['epoch'] + 1}  step {metrics['step']}  {_scores(metrics, '')}"
            f"{'  EMA: ' + _scores(metrics, 'ema_') if 'ema_top1' in metrics else ''}  ({num_samples:,} images)"
        )

    def masked(self, epoch: int, split: str, count: int) -> None:
        """Reports the number of images of an epoch that were masked (`DataOptions.on_error`), unless it is 0."""
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
            except Exception as error:  # the library may fail by a full disk, a lost network or a fault of its own
                self._trackers.remove(tracker)
                reason = (str(error).strip().splitlines() or [""])[0]
                self.say(
                    f"{tracker.name} has failed and gets no more metrics ({type(error).__name__}: {reason}); "
                    "metrics.jsonl has all of them"
                )


def _scores(metrics: Mapping[str, Any], prefix: str) -> str:
    top1, top5, loss = (metrics[f"{prefix}{name}"] for name in ("top1", "top5", "val_loss"))
    return f"top-1 {top1:.2%}  top-5 {top5:.2%}  validation loss {loss:.4f}"
