"""Evaluation: every sample of a split scored exactly once, at any batch and world size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pipelines.augment import DeviceStage
from pipelines.contract import Loader
from pipelines.errors import UserError
from sdpnet.distributed import Processes, sum_over_processes

__all__ = ["Scores", "evaluate"]


@dataclass(frozen=True)
class Scores:
    """Exact results over the `num_samples` valid images: fractions in [0, 1] and the mean cross entropy."""

    top1: float
    top5: float
    loss: float
    num_samples: int

    def as_dict(self) -> dict[str, float]:
        return {"top1": self.top1, "top5": self.top5, "val_loss": self.loss}


def evaluate(
    model: nn.Module,
    loader: Loader,
    stage: DeviceStage,
    processes: Processes,
    interrupted: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Scores `model` on all batches of an evaluation loader, but for samples that are not valid.

    Returns None when `interrupted` came true between two batches. The model is left in eval mode.

    Raises:
        UserError: no sample could be decoded.
    """
    model.eval()
    # top-1 hits, top-5 hits, summed loss, samples: float64 is exact for the counts
    totals = torch.zeros(4, dtype=torch.float64, device=processes.device)
    with torch.inference_mode():
        for batch in loader.batches():
            images, _ = stage(batch)
            with torch.autocast(processes.device.type, stage.dtype, enabled=stage.dtype != torch.float32):
                logits = model(images)
            logits = logits.float()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels.view(-1, 1)
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            scores = torch.stack(
                [best[:, 0].double(), best.any(dim=1).double(), losses.double(), torch.ones_like(losses)]
            )
            totals += (scores * batch.valid).sum(dim=1)
            if interrupted():
                return None
    top1, top5, loss, count = sum_over_processes(totals, processes).tolist()
    if count == 0:
        raise UserError(f"{loader.source.reader.path}: none of its images could be decoded; copy or convert it again")
    return Scores(top1 / count, top5 / count, loss / count, round(count))
