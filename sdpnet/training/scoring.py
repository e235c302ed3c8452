"""The evaluation of a run between two epochs: of its model and, if there is one, of its average."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdpnet.distributed.processes import count_over_processes, same_weights
from sdpnet.reporting.reporter import Reporter
from sdpnet.training.evaluate import evaluate, write_per_class
from sdpnet.training.run_state import Run

__all__ = ["score_run"]


def score_run(
    run: Run, reporter: Reporter, stopped: Callable[[], int], out: Path, require_own: Callable[[], object]
) -> float | None:
    """Evaluates the run's models, reports their scores and writes `per_class.csv`.

    Args:
        stopped: returns the number of the signal that stops the run, or 0.
        require_own: raises `OSError` if another process has taken over `out`.

    Returns:
        The top-1 accuracy by which the best checkpoint is chosen, which is that of the average if there is one. None if
        `stopped` did not return 0; nothing is reported then.
    """
    evaluation: dict[str, float] = {}
    for prefix, model in run.models.items():
        same_weights(model, run.processes)
        result = evaluate(model, run.val_loader, run.val_loader.stage, run.processes, stopped)
        if result is None:
            return None
        scores, evaluation = result, {**evaluation, **result.as_dict(prefix)}
    masked = count_over_processes(len(run.val_loader.masked), run.processes)
    reporter.masked(run.cursor.epoch, run.config.data.val_split, masked)
    run.evaluation = evaluation
    if run.processes.is_main:
        try:
            require_own()
            write_per_class(out / "per_class.csv", run.train_loader.manifest.classes, scores.counts)
        except OSError as error:  # a full disk must not prevent the report of the scores
            reporter.say(f"{out / 'per_class.csv'}: cannot be written ({error.strerror})")
    reporter.evaluation({"epoch": run.cursor.epoch, "step": run.cursor.step, **evaluation}, scores.num_samples)
    return evaluation.get("ema_top1", evaluation["top1"])
