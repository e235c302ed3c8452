"""Evaluation: every sample of a split scored exactly once, at any batch and world size."""

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
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Loader
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.terminal.readable_names import readable_names
from sdpnet.reporting.csv_cells import csv_cell

__all__ = ["Scores", "evaluate", "write_per_class"]

_BATCHES_BETWEEN_QUESTIONS = 16


@dataclass(frozen=True)
class Scores:
    """Exact results over the `num_samples` valid images: fractions in [0, 1] and the mean cross entropy.

    `counts` are int64 (num_classes, 3): of each class the images, the top-1 hits and the top-5 hits.
    """

    top1: float
    top5: float
    loss: float
    num_samples: int
    counts: np.ndarray = field(compare=False, repr=False)

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """As in `metrics.jsonl`; `prefix` is "ema_" for the averaged weights' scores."""
        return {f"{prefix}top1": self.top1, f"{prefix}top5": self.top5, f"{prefix}val_loss": self.loss}


def evaluate(
    model: nn.Module,
    loader: Loader,
    stage: DeviceStage,
    processes: Processes,
    interrupted: Callable[[], int] = lambda: 0,
) -> Scores | None:
    """Scores `model` on all batches of an evaluation loader, but for samples that are not valid.

    Returns None when `interrupted` was not 0 between two batches (several processes ask after each 16). The model is
    left in eval mode.

    Raises:
        UserError: no sample could be decoded.
    """
    model.eval()
    # Of each class: images, top-1 hits, top-5 hits. float64 is exact for them; the sum of losses is kept apart from
    # index_add_, whose order of additions CUDA leaves open.
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
            # Several processes ask each other, and wait.
            if (processes.world_size == 1 or number % _BATCHES_BETWEEN_QUESTIONS == 0) and interrupted():
                return None
    loss, *summed = sum_over_processes(torch.cat([total_loss.view(1), counts.view(-1)]), processes).tolist()
    by_class = np.array(summed).round().astype(np.int64).reshape(-1, 3)
    count, top1, top5 = by_class.sum(axis=0).tolist()
    if count == 0:
        raise UserError(f"{loader.source.reader.path}: none of its images could be decoded; copy or convert it again")
    return Scores(top1 / count, top5 / count, loss / count, count, by_class)


def write_per_class(path: Path, classes: Sequence[str], counts: np.ndarray) -> None:
    """Writes a CSV file with a row for each class: class (its number), name, samples, top1, top5.

    Args:
        path: the file.
        classes: their names.
        counts: `Scores.counts`; rows beyond the names are classes that the data has not.

    Where there are other names for people (`readable_names`: "tench" for n01440764), they are a last column "words".
    top1 and top5 are fractions in [0, 1], empty for a class without samples. Names are `csv_cell`s. The file appears
    complete.
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
