"""Trains the seed recipe, the modern recipe, and the seed recipe with one change at a time.

    python tests/support/recipe_evidence.py --data SHARDS

The model is narrower than that of configs/cifar10.yaml, so that a CPU can train it. All variants take the same number
of steps, and each is compared with the seed recipe of the same seed. Trainings that are in --out already are not
repeated. `--only` selects variants by name; `--jobs 2` runs two trainings at a time, with one core each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdpnet.pipelines.machine import commit, cpu_name, installed_versions

SIZE = ["model.dim=64", "model.head_hidden=64"]
# As in configs/sdpnet_l.yaml, at the size of configs/cifar10.yaml.
SEED = [
    "model.dropout=0.2",
    "augment.randaugment.num_ops=2",
    "augment.randaugment.magnitude=9",
    "augment.erase.probability=0.25",
    "augment.mix.mixup_alpha=0.8",
    "augment.mix.probability=1",
    "augment.label_smoothing=0",
    "optim.clip_grad_norm=0",
]
# As in configs/modern/sdpnet_l.yaml, except for the length; the decay of the average suits a short training.
SWITCHES = {
    "no dropout": ["model.dropout=0"],
    "sincos position": ["model.position=sincos"],
    "rope position": ["model.position=rope"],
    "final norm": ["model.final_norm=true"],
    "layer scale": ["model.layer_scale=1e-4"],
    "drop path": ["model.drop_path=0.1"],
    "increasing": ["augment.randaugment.policy=increasing"],
    "pixel erasing": ["augment.erase.mode=pixel"],
    "label smoothing": ["augment.label_smoothing=0.1"],
    "clipping": ["optim.clip_grad_norm=1"],
    "EMA": ["ema.decay=0.99"],
    "half the lr": ["optim.lr=1.5e-3"],  # these three, so that Muon is compared with AdamW at its best rate
    "twice the lr": ["optim.lr=6e-3"],
    "4 times the lr": ["optim.lr=12e-3"],
    "muon": ["optim.name=muon"],
    "no mixing": ["augment.mix.mixup_alpha=0", "augment.mix.cutmix_alpha=0"],
    "no RandAugment": ["augment.randaugment.policy=none"],
}
NOT_MODERN = (
    *("rope position", "half the lr", "twice the lr", "4 times the lr", "muon"),
    *("no mixing", "no RandAugment"),
)
MODERN = [name for name in SWITCHES if name not in NOT_MODERN]


def variants() -> dict[str, list[str]]:
    """The settings by name: "seed", "modern", "modern - layer scale", and "seed + SWITCH" for each switch."""
    seed = [*SIZE, *SEED]
    modern = [setting for name in MODERN for setting in SWITCHES[name]]
    single = {f"seed + {name}": [*seed, *settings] for name, settings in SWITCHES.items()}
    large = [*seed, *modern, "model.layer_scale=0"]
    return {"seed": seed, "modern": [*seed, *modern], **single, "modern - layer scale": large}


def train(settings: list[str], out: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The last evaluation of a training, which runs unless its results exist already."""
    data, epochs, batch = arguments.data, arguments.epochs, arguments.batch
    common = [f"seed={seed}", f"train.epochs={epochs}", f"data.batch_size_per_gpu={batch}", "train.log_interval=20"]
    common += ["train.keep_checkpoints=1", "train.keep_best=false", f"train.eval_interval={epochs}"]
    if not (out / "model.json").exists():
        command = [sys.executable, "-m", "sdpnet.train", "--config", "cifar10", "--data", str(data), "--out", str(out)]
        command += [part for setting in (*settings, *common) for part in ("--set", setting)]
        command += ["--pipeline", "native", "--set", "data.num_workers=1"]
        command += ["--resume"] if (out / "checkpoints").exists() else []
        alone = {"OMP_NUM_THREADS": "1"} if arguments.jobs > 1 else {}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **alone})
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    return {**[line for line in lines if "top1" in line][-1], "train_loss": statistics.fmean(losses[-3:])}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains recipes at equal steps, one switch at a time.")
    parser.add_argument("--data", type=Path, required=True, metavar="SHARDS", help="CIFAR-10 or the like")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the trainings")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: %(default)s)")
    parser.add_argument("--only", help="names, with commas")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    chosen = variants()
    if arguments.only:
        chosen = {name: chosen[name] for name in arguments.only.split(",")}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    console = Console(highlight=False)

    def one(work: tuple[int, str]) -> dict[str, Any]:
        seed, name = work
        result = train(chosen[name], arguments.out / f"{name.replace(' ', '-')}-{seed}", seed, arguments)
        averaged = f", average {result['ema_top1']:.2%}" if "ema_top1" in result else ""
        console.print(f"seed {seed}: {name}: top-1 {result['top1']:.2%}{averaged}")
        return result

    # The seed is the outer loop, so that an interrupted run has all variants equally often.
    work = [(seed, name) for seed in range(arguments.seeds) for name in chosen]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (_, name), result in zip(work, pool.map(one, work), strict=True):
            results[name].append(result)
    table = Table("variant", "top-1 (mean)", "lowest", "highest", "to the seed recipe", "seeds in which better")
    summary = {}
    for name, runs in results.items():
        scores = [run.get("ema_top1", run["top1"]) for run in runs]
        base = [run["top1"] for run in results.get("seed", runs)]
        differences = [score - other for score, other in zip(scores, base, strict=True)]
        better = sum(difference > 0 for difference in differences)
        mean = statistics.fmean(differences)
        table.add_row(
            name,
            f"{statistics.fmean(scores):.2%}",
            f"{min(scores):.2%}",
            f"{max(scores):.2%}",
            "" if name == "seed" else f"{100 * mean:+.2f} points",
            "" if name == "seed" else f"{better} of {len(runs)}",
        )
        summary[name] = {"settings": chosen[name], "top1": scores, "difference": differences, "runs": runs}
    console.print(table)
    if arguments.json:
        facts = {"commit": commit(), "cpu": cpu_name(), "versions": installed_versions()}
        facts |= {"epochs": arguments.epochs, "batch": arguments.batch}
        arguments.json.write_text(json.dumps({**facts, "variants": summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
