"""TensorBoard and Weights & Biases, which get the metrics of `metrics.jsonl` under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from sdpnet.config.options import LogOptions
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.terminal.remedy import install_extra

__all__ = ["Tracker", "open_trackers"]


class Tracker(Protocol):
    """A receiver of metrics. Messages refer to it by `name`."""

    name: str

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of one line of `metrics.jsonl`, for its `step`."""
        ...

    def close(self, *, failed: bool) -> None:
        """Ends the run in the tracker. `failed` says whether training ended with an error."""
        ...


def open_trackers(options: LogOptions, out: Path, *, resumed_step: int, config: Mapping[str, Any]) -> list[Tracker]:
    """Opens the trackers that the config section `log` names, for the main process.

    Args:
        out: the run's directory. TensorBoard's events go to `out/tensorboard`, the files of W&B to `out/wandb`.
        resumed_step: the step of the checkpoint that the run continues from, or 0. TensorBoard hides the events of
            later steps. W&B cannot do so; it ignores metrics of a step that it has already.
        config: the resolved config, for W&B.

    Raises:
        UserError: the package of a tracker is not installed.
    """
    trackers: list[Tracker] = []
    if options.tensorboard:
        trackers.append(_TensorBoard(out / "tensorboard", resumed_step))
    if options.wandb:
        trackers.append(_WandB(options.wandb, out, config))
    return trackers


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, directory: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("log.tensorboard = True", "tensorboard", error) from None
        self._writer = SummaryWriter(str(directory), purge_step=resumed_step + 1)

    def write(self, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, metrics["step"])
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _WandB:
    name = "Weights & Biases"

    def __init__(self, project: str, out: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing(f"log.wandb = {project!r}", "wandb", error) from None
        kept = out / "wandb_run_id"  # with the same id, a resumed run is the same run in W&B
        run_id = kept.read_text(encoding="utf-8").strip() if kept.is_file() else uuid4().hex
        kept.write_text(f"{run_id}\n", encoding="utf-8")
        self._run = wandb.init(
            project=project,
            name=out.resolve().name,
            id=run_id,
            resume="allow",
            dir=str(out),
            config=dict(config),
            settings=wandb.Settings(console="off"),  # W&B would capture the progress line, which changes all the time
        )

    def write(self, metrics: Mapping[str, Any]) -> None:
        self._run.log({name: value for name, value in metrics.items() if name != "step"}, step=metrics["step"])

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _missing(setting: str, extra: str, error: ImportError) -> UserError:
    cause = " ".join(str(error).split())
    return UserError(f"{setting}: {cause}; {install_extra(extra)} brings it, or leave the setting out")
