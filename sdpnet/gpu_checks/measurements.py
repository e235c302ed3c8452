"""The parts of `./dev gpu` that measure, each with a command of this project, and the conversion that they need."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

from sdpnet.gpu_checks.checks import installed
from sdpnet.gpu_checks.part import Part, Settings
from sdpnet.pipelines.machine import usable_cores

__all__ = ["CONVERSION", "MEASUREMENTS"]

_SEED: Final = "sdpnet_xl"
_MODERN: Final = "modern/sdpnet_xl"
_SMALL: Final = "tiny_imagenet/fast40"


def _sizes(settings: Settings) -> list[str]:
    return ["--image-size", str(settings.image_size), "--batch-size", str(settings.batch_size)]


def _step(settings: Settings, seconds: float) -> list[str]:
    models = {
        "tiny": "debug",
        "short": f"{_SEED},{_MODERN}",
        "medium": f"{_SEED},{_MODERN}",
        "long": f"{_SEED},{_MODERN},sdpnet_l,sdpnet_xxl,vit_base_patch16_224",
    }[settings.size]
    feeds = ",".join(installed("native", *(["dali"] if settings.size in ("medium", "long") else [])))
    words = ["--model", models, "--data", str(settings.data), "--pipelines", feeds, *_sizes(settings)]
    words += ["--json", str(settings.file("step"))]
    rounds = ["--rounds", "1", "--seconds", "0.05"] if settings.tiny else ["--rounds", "2", "--seconds", "1"]
    return ["-m", "sdpnet.cli", "bench", "step", *words, *rounds, "--device", settings.device]


def _step_figures(result: Mapping[str, Any]) -> str:
    rows = [row for row in result["results"] if row["feed"] == "synthetic"]
    figures = [
        f"{row['model']} {row['median']:,.0f}/s ({row['share_of_matmul']:.0%} of matmul)"
        for row in rows
        if "median" in row
    ]
    ratios = [
        f"{row['feed']} {row['to_synthetic']:.2f}"
        for row in result["results"]
        if row.get("to_synthetic") and row["feed"] != "synthetic" and row["model"] == rows[0]["model"]
    ]
    return f"{', '.join(figures[:2])}; {', '.join(ratios)} of synthetic"


def _kernels(settings: Settings, seconds: float) -> list[str]:
    words = ["--config", "debug" if settings.tiny else _SEED, "--device", settings.device]
    words += _sizes(settings)
    return ["-m", "sdpnet.gpu_checks.programs.kernels", *words, "--json", str(settings.file("kernels"))]


def _host(settings: Settings, seconds: float) -> list[str]:
    size, batch_size = ("32", "4") if settings.tiny else ("64", "512")
    words = ["--config", _SMALL, "--device", settings.device, "--image-size", size, "--batch-size", batch_size]
    tiny = [f"--set=model.{key}" for key in ("dim=24", "heads=2", "head_hidden=24")] if settings.tiny else []
    tiny += [f"--set=resolution.{key}=0" for key in ("start_size", "end_size")] if settings.tiny else []
    return ["-m", "sdpnet.gpu_checks.programs.kernels", *words, *tiny, "--json", str(settings.file("host"))]


def _host_figures(result: Mapping[str, Any]) -> str:
    launches = result["launches"]
    return (
        f"{result['config']}: a step of {result['step_ms']:,.1f} ms, {result['kernel_ms']:,.1f} of kernels, which the "
        f"processor starts in {result['host_ms']:,.1f}; {launches['calls']:,.0f} starts of {launches['us']:,.1f} us"
    )


def _kernels_figures(result: Mapping[str, Any]) -> str:
    parts = [f"{name} {row['share']:.0%}" for name, row in list(result["parts"].items())[:3]]
    step = f"{result['kernel_ms']:,.1f} ms of kernels in a step of {result['step_ms']:,.1f}"
    return f"{step}, started in {result['host_ms']:,.1f}: {', '.join(parts)}"


def _prediction(settings: Settings, seconds: float) -> list[str]:
    batch_size = 8 if settings.tiny else settings.batch_size  # doctor takes batches of 8 on a CPU
    sizes = ["--image-size", str(settings.image_size), "--batch-size", str(batch_size)]
    tiny = ["--config", "debug", "--log-interval", "1", "--epochs", "2"] if settings.tiny else []
    where = ["--data", str(settings.data), "--work", str(settings.out / "prediction-run")]
    where += ["--json", str(settings.file("prediction"))]
    return ["-m", "sdpnet.gpu_checks.programs.prediction", *where, *sizes, *tiny]


def _prediction_figures(result: Mapping[str, Any]) -> str:
    return (
        f"doctor {result['expected_images_per_second']:,.0f}/s, train {result['trained_images_per_second']:,.0f}/s: "
        f"{result['ratio']:.2f}; waiting {result['reported_waiting']:.1%} (implied {result['implied_waiting']:.1%})"
    )


def _data_path(settings: Settings, seconds: float) -> list[str]:
    cores = len(usable_cores())
    counts = {1} if settings.tiny else {1, min(4, cores), cores} if settings.size == "long" else {1, cores}
    raw = ["ffcv_raw"] if installed("ffcv") and settings.size != "short" else []
    names = installed("native") if settings.tiny else [*installed("native", "ffcv", "dali"), *raw, "torchvision_gpu"]
    words = ["--cores", ",".join(map(str, sorted(counts))), *_sizes(settings), "--device", settings.device]
    words += ["--rounds", "1", "--seconds", "0.05"] if settings.tiny else ["--rounds", "2", "--seconds", "1.2"]
    where = ["--data", str(settings.data), "--pipelines", ",".join(names)]
    return [
        "-m",
        "sdpnet.gpu_checks.programs.data_path",
        *where,
        "--",
        *words,
        "--json",
        str(settings.file("data_path")),
    ]


def _data_path_figures(result: Mapping[str, Any]) -> str:
    figures = []
    for race in result["races"]:
        rates = [f"{row['contestant']} {row['median']:,.0f}" for row in race["results"] if "median" in row]
        count = len(race["cores"])
        figures.append(f"{count} core{'s' if count > 1 else ''}: {', '.join(rates) or 'none'}")
    return "; ".join(figures) + " images/s"


def _augment(settings: Settings, seconds: float) -> list[str]:
    tiny = ["--batch", "4", "--size", "32", "--rounds", "1", "--threads", "1"]
    words = tiny if settings.tiny else ["--rounds", "2"]
    return ["-m", "sdpnet.pipelines.benchmarks.augment", *words, "--json", str(settings.file("augment"))]


def _augment_figures(result: Mapping[str, Any]) -> str:
    gpu = result["gpu"]
    if isinstance(gpu, str):
        return f"CPU {result['stage'][0]['median_ms']:,.1f} ms a batch of {result['batch_size']}"
    rows = {name: min(values) * 1e3 for name, values in gpu["seconds_per_batch"].items()}
    name = next(iter(rows))
    copy = f", {gpu['times_copy']:.1f} times a copy" if "times_copy" in gpu else ""
    return f"{name} {rows[name]:.2f} ms a batch of {result['batch_size']}{copy}"


def _depthwise(settings: Settings, seconds: float) -> list[str]:
    words = ["--batch", "2", "--rounds", "1"] if settings.tiny else ["--rounds", "10"]
    return ["-m", "sdpnet.benchmarks.depthwise", *words, "--json", str(settings.file("depthwise"))]


def _depthwise_figures(result: Mapping[str, Any]) -> str:
    if isinstance(result["results"], str):
        return result["results"]
    both = result["results"]["bf16"]["forward and backward"]
    return "bf16: " + ", ".join(f"{name} {row['median_ms']:.2f} ms" for name, row in both.items())


def _accuracy(settings: Settings, seconds: float) -> list[str]:
    recipes = ",".join(f"{name}={path}" for name, path in settings.recipes.items())
    seconds = 30 if settings.tiny else 0.95 * seconds
    words = ["--recipes", recipes, "--seconds", f"{seconds:.0f}", "--work", str(settings.out / "accuracy-runs")]
    small = "data.batch_size_per_gpu=4,data.image_size=32,resolution.start_size=0,resolution.end_size=0"
    tiny = ["--settings", f"{small},train.compile=false"] if settings.tiny else []
    where = ["--device", settings.device, "--json", str(settings.file("accuracy"))]
    return ["-m", "sdpnet.gpu_checks.programs.accuracy", *words, *tiny, *where]


def _accuracy_figures(result: Mapping[str, Any]) -> str:
    figures = []
    for row in result["recipes"]:
        if "not_measured" in row:
            figures.append(f"{row['recipe']}: {row['not_measured']}")
            continue
        top1 = max(row["last"]["top1"], row["last"].get("ema_top1", 0.0))
        figures.append(f"{row['recipe']} {top1:.1%} top-1 after {row['epochs']} epochs")
    return "; ".join(figures)


def _no_recipes(settings: Settings) -> str:
    return "" if settings.recipes else "no --recipes"


def _shards(settings: Settings, seconds: float) -> list[str]:
    at_least = 24 if settings.tiny else 10_000
    words = ["--images", str(settings.images), "--out", str(settings.data), "--at-least", str(at_least)]
    return ["-m", "sdpnet.gpu_checks.programs.shards", *words]


def _shards_result(settings: Settings) -> Mapping[str, Any]:
    splits = json.loads((settings.data / "manifest.json").read_text(encoding="utf-8"))["splits"]
    size = sum(os.path.getsize(path) for path in settings.data.iterdir())
    return {"images": {name: split["num_samples"] for name, split in splits.items()}, "bytes": size}


def _shards_figures(result: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{name} {count:,}" for name, count in result["images"].items())
    return f"{counts} images, {result['bytes'] / 1e6:,.0f} MB"


CONVERSION: Final = Part(
    name="shards",
    what="makes a shard set of the images, for all other parts",
    is_check=False,
    rank=0,
    seconds=(20, 20, 20),
    command=_shards,
    figures=_shards_figures,
    collect=_shards_result,
)
MEASUREMENTS: Final[tuple[Part, ...]] = (
    Part(
        name="step",
        what="bench step: seed and modern recipes, synthetic and real feeds, parts of a step, memory",
        is_check=False,
        rank=3,
        seconds=(70, 110, 300),
        command=_step,
        figures=_step_figures,
    ),
    Part(
        name="kernels",
        what="a step by kernels: matrix products, attention, GELU, norms, copies, optimizer, augmentation",
        is_check=False,
        rank=5,
        seconds=(40, 40, 40),
        command=_kernels,
        figures=_kernels_figures,
    ),
    Part(
        name="prediction",
        what="what doctor expects beside what train does, and the time that train reports waiting for data",
        is_check=False,
        rank=8,
        seconds=(75, 75, 75),
        command=_prediction,
        figures=_prediction_figures,
    ),
    Part(
        name="data_path",
        what="bench: the pipelines on one core and on all",
        is_check=False,
        rank=9,
        seconds=(60, 60, 150),
        command=_data_path,
        figures=_data_path_figures,
    ),
    Part(
        name="host",
        what="a small model's step: how long the processor takes to start its kernels, and with what",
        is_check=False,
        rank=10,
        seconds=(40, 40, 40),
        command=_host,
        figures=_host_figures,
    ),
    Part(
        name="augment",
        what="the augmentation alone, beside torchvision's",
        is_check=False,
        rank=11,
        seconds=(45, 45, 45),
        command=_augment,
        figures=_augment_figures,
    ),
    Part(
        name="depthwise",
        what="the depthwise convolution alone: torch's and ours",
        is_check=False,
        rank=12,
        seconds=(20, 20, 20),
        command=_depthwise,
        figures=_depthwise_figures,
    ),
    Part(
        name="accuracy",
        what="trains each of --recipes for the epochs that fit into the time that is left",
        is_check=False,
        rank=13,
        seconds=(60, 120, 600),
        command=_accuracy,
        figures=_accuracy_figures,
        obstacle=_no_recipes,
        takes_rest=True,
    ),
)
