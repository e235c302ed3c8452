"""Evaluation: every sample of a split is scored exactly once, with any batch size and number of processes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sdpnet.distributed.processes import Processes, sum_over_processes
from sdpnet.loading.image_loader import ImageLoader
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Loader
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.terminal.readable_names import readable_names
from sdpnet.reporting.csv_cells import csv_cell

__all__ = ["Scores", "evaluate", "write_per_class"]

_BATCHES_BETWEEN_STOP_CHECKS = 16  # with several processes, a check makes all of them wait for each other


@dataclass(frozen=True)
class Scores:
    """The exact scores over all valid images of a split.

    Attributes:
        top1, top5: the fractions, in [0, 1], of images whose class has the highest logit, or one of the five highest.
        loss: the mean cross entropy.
        num_samples: the number of valid images.
        counts: int64 (num_classes, 3): for each class the number of images, of top-1 hits and of top-5 hits.
    """

    top1: float
    top5: float
    loss: float
    num_samples: int
    counts: np.ndarray = field(compare=False, repr=False)

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """The scores by their names in `metrics.jsonl`. `prefix` is "ema_" for the averaged weights."""
        return {f"{prefix}top1": self.top1, f"{prefix}top5": self.top5, f"{prefix}val_loss": self.loss}


def evaluate(
    model: nn.Module,
    loader: Loader | ImageLoader,
    stage: DeviceStage,
    processes: Processes,
    interrupted: Callable[[], int] = lambda: 0,
) -> Scores | None:
    """Scores `model` on all valid samples of an evaluation loader. Afterwards the model is in eval mode.

    Args:
        interrupted: is called between two batches (in several processes between each 16) and stops the evaluation if it
            does not return 0.

    Returns:
        The scores, or None if the evaluation was stopped.

    Raises:
        UserError: no sample could be decoded.
    """
    model.eval()
    # Columns: images, top-1 hits, top-5 hits. Sums of whole numbers are exact in float64, so the unspecified order in
    # which index_add_ adds on CUDA does not matter. It would matter for the losses, which are summed separately.
    counts = torch.zeros(stage.num_classes, 3, dtype=torch.float64, device=processes.device)
    total_loss = torch.zeros((), dtype=torch.float64, device=processes.device)
    with torch.inference_mode():
        for number, batch in enumerate(loader.batches()):
            images, _ = stage(batch)
            with torch.autocast(processes.device.type, stage.dtype, enabled=stage.dtype != torch.float32):
                logits = model(images)
            logits = logits.float()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels.view(-1, 1)
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            total_loss += losses.where(batch.valid, 0.0).double().sum()
            hits = torch.stack([batch.valid, batch.valid & best[:, 0], batch.valid & best.any(dim=1)], dim=1)
            counts.index_add_(0, batch.labels, hits.double())
            if (processes.world_size == 1 or number % _BATCHES_BETWEEN_STOP_CHECKS == 0) and interrupted():
                return None
    loss, *summed = sum_over_processes(torch.cat([total_loss.view(1), counts.view(-1)]), processes).tolist()
    by_class = np.array(summed).round().astype(np.int64).reshape(-1, 3)
    count, top1, top5 = by_class.sum(axis=0).tolist()
    if count == 0:
        raise UserError(f"{loader.source.reader.path}: none of its images could be decoded; copy or convert it again")
    return Scores(top1 / count, top5 / count, loss / count, count, by_class)


def write_per_class(path: Path, classes: Sequence[str], counts: np.ndarray) -> None:
    """Writes a CSV file with a row for each class: class (its number), name, samples, top1, top5.

    The fractions top1 and top5 are in [0, 1], and empty for a class without samples. If the classes also have readable
    names (`readable_names`: "tench" for n01440764), there is a last column "words" with them. Names are written by
    `csv_cell`. The file gets its name when it is complete.

    Args:
        classes: the names of the classes.
        counts: `Scores.counts`. Rows without a name are outputs of the model for which the data has no class.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    readable = readable_names(classes)
    words = () if readable == tuple(classes) else readable
    rows.writerow(["class", "name", "samples", "top1", "top5", *(["words"] if words else [])])
    for label, (name, (samples, top1, top5)) in enumerate(zip(classes, counts.tolist(), strict=False)):
        shares = [top1 / samples, top5 / samples] if samples else ["", ""]
        rows.writerow([label, csv_cell(name), samples, *shares, *map(csv_cell, words[label : label + 1])])
    publish_bytes(path, text.getvalue().encode())
