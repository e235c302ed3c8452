"""The fault matrix (`./dev faults`): many seeded trials of damage, kills and hostile input, counted by how they ended.

Each kind of trial is a row. Its modules list their rows in `KINDS`. The exit status is 0 if every trial ended well.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PLACES = [str(folder) for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "support", Path(__file__).parent)]
sys.path[:0] = PLACES
os.environ["PYTHONPATH"] = os.pathsep.join([*PLACES, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("OMP_NUM_THREADS", "1")

from trial import VERDICTS, Kind, run_kind  # noqa: E402 - after the path is set

MODULES = (
    "shard_mutations",
    "run_mutations",
    "conversion_kills",
    "conversion_sources",
    "conversion_limits",
    "hostile_tars",
    "hostile_containers",
    "training_kills",
    "training_faults",
)
_SHOWN = 3  # trials of a kind that ended badly, and are printed


def kinds(chosen: str) -> list[Kind]:
    """The kinds of all modules whose name contains one of the comma-separated parts in `chosen`."""
    found = [kind for name in MODULES for kind in importlib.import_module(name).KINDS]
    return [kind for kind in found if any(part in kind.name for part in chosen.split(","))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev faults", description=__doc__)
    add = parser.add_argument
    add("--kinds", default="", metavar="A,B", help="only the kinds with one of these in their names (default: all)")
    add("--share", type=float, default=1.0, metavar="X", help="of each kind's trials (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the first trial of each kind (default: %(default)s)")
    add("--jobs", type=int, default=2, metavar="N", help="trials side by side (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the matrix to a file")
    add("--list", action="store_true", help="print the kinds and how many trials each has")
    arguments = parser.parse_args(argv)
    selected = kinds(arguments.kinds)
    if arguments.list:
        for kind in selected:
            print(f"{kind.trials:>7,}  {kind.name}")
        return 0
    rows: list[dict[str, Any]] = []
    width = max((len(kind.name) for kind in selected), default=0)
    print(f"{'':{width}}  {'tried':>7}" + "".join(f"  {verdict:>7}" for verdict in VERDICTS) + f"  {'seconds':>7}")
    for kind in selected:
        trials = max(1, round(kind.trials * arguments.share))
        started, counts, groups, bad = time.monotonic(), Counter[str](), Counter[str](), list[str]()
        for seed, outcome in run_kind(kind, trials, arguments.seed, arguments.jobs):
            counts[outcome.verdict] += 1
            groups[outcome.group] += 1
            if outcome.verdict != "ok":
                bad.append(f"seed {seed}: {outcome.verdict}: {outcome.what}")
        seconds = round(time.monotonic() - started, 1)
        numbers = {verdict: counts[verdict] for verdict in VERDICTS}
        print(f"{kind.name:{width}}  {trials:>7,}" + "".join(f"  {n:>7,}" for n in numbers.values()), end="")
        print(f"  {seconds:>7,.0f}", flush=True)
        for line in bad[:_SHOWN]:
            print(f"    {line}", flush=True)
        row = {"kind": kind.name, "tried": trials, "first_seed": arguments.seed, **numbers, "seconds": seconds}
        rows.append({**row, "groups": dict(groups.most_common()), "bad": bad})
        if arguments.json is not None:
            about = {"machine": platform.machine(), "python": platform.python_version(), "cores": os.cpu_count()}
            arguments.json.write_text(json.dumps({**about, "matrix": rows}, indent=1) + "\n")
    total = {verdict: sum(row[verdict] for row in rows) for verdict in VERDICTS}
    print(f"{'all':{width}}  {sum(row['tried'] for row in rows):>7,}", end="")
    print("".join(f"  {n:>7,}" for n in total.values()))
    return int(any(count for verdict, count in total.items() if verdict != "ok"))


if __name__ == "__main__":
    sys.exit(main())
