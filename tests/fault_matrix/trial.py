"""What a trial is, what can come of it, and how many of them are run in processes of their own."""

from __future__ import annotations

import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

__all__ = ["VERDICTS", "Kind", "Outcome", "run_kind"]

VERDICTS = ("ok", "lost", "crashed", "hung", "wrong")


@dataclass(frozen=True)
class Outcome:
    """How one trial ended.

    Attributes:
        verdict: "ok": the right result, or a refusal in one line; "lost": a good image, sample or checkpoint is gone;
            "crashed": a signal, a traceback or too much memory; "hung": longer than allowed; "wrong": other bytes,
            weights or answers than without the fault, or a fault that was taken for good.
        what: For a verdict other than "ok": what was done and what came of it, in one line.
        group: What the trial is counted under within its kind, such as the ending that it had ("refused", "opened").
    """

    verdict: str
    what: str = ""
    group: str = ""


@dataclass(frozen=True)
class Kind:
    """One row of the matrix.

    Attributes:
        name: Of the row, such as "shard set: manifest.json".
        trials: How many are run unless the command line says otherwise.
        prepare: Called once with an empty folder; what it returns (it can be pickled) is given to each `run`.
        run: Called with what was prepared, the seeds of some trials and an empty folder for them; yields an outcome
            for each seed, in their order. A trial depends on its seed alone.
        batch: How many trials one call of `run` gets at most.
        alone: No other trial runs beside it, because it needs the machine's speed to be where it is meant to be.
    """

    name: str
    trials: int
    prepare: Callable[[Path], Any]
    run: Callable[[Any, Sequence[int], Path], Iterable[Outcome]]
    batch: int = 1
    alone: bool = False


def run_kind(kind: Kind, trials: int, first_seed: int, jobs: int) -> Iterator[tuple[int, Outcome]]:
    """Yields the seed and the outcome of `trials` trials, as they come; the seeds follow each other."""
    with tempfile.TemporaryDirectory(prefix="sdpnet-faults-") as name:
        scratch = Path(name)
        prepared_in = scratch / "prepared"
        prepared_in.mkdir()
        prepared = kind.prepare(prepared_in)
        seeds = range(first_seed, first_seed + trials)
        batches = [seeds[start : start + kind.batch] for start in range(0, trials, kind.batch)]
        with ProcessPoolExecutor(1 if kind.alone else jobs, mp_context=get_context("spawn")) as pool:
            waiting = {
                pool.submit(_run_batch, kind, prepared, batch, scratch / f"batch{batch[0]}"): batch for batch in batches
            }
            for done in as_completed(waiting):
                yield from zip(waiting[done], done.result(), strict=True)


def _run_batch(kind: Kind, prepared: Any, seeds: Sequence[int], scratch: Path) -> list[Outcome]:
    scratch.mkdir()
    try:
        return list(kind.run(prepared, seeds, scratch))
    except Exception:  # a fault of the harness, which must not look like a trial that went well
        return [Outcome("wrong", f"the harness failed: {traceback.format_exc(limit=-3)}")] * len(seeds)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
