"""`sdpnet doctor`: what is installed, what this machine can do, and with --data what limits training on it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from rich.console import Console

from sdpnet.benchmarks.throughput import copy_rate, decode_round, reading_rates, step_rate
from sdpnet.commands.installation import installation, machine_rows, print_rows, version_rows
from sdpnet.config.load import load_config
from sdpnet.config.options import Config
from sdpnet.execution.hardware import choose_step, look_at
from sdpnet.execution.micro_batch import OutOfGpuMemory
from sdpnet.execution.threads import use_threads
from sdpnet.flags.doctor import DEFAULT_CONFIG, add_arguments
from sdpnet.pipelines.benchmarks import ceilings
from sdpnet.pipelines.benchmarks.process import ContestantError
from sdpnet.pipelines.errors import printable
from sdpnet.pipelines.executors.registry import PIPELINES, choose_pipeline, why_missing
from sdpnet.pipelines.machine import driver, usable_cores
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.terminal.next_step import next_lines, sdpnet, training
from sdpnet.pipelines.terminal.remedy import install
from sdpnet.pipelines.terminal.status_line import StatusLine
from sdpnet.reporting.output import say as print_lines

__all__ = ["add_arguments", "build_supports", "expected_rate", "run", "verdict"]

T = TypeVar("T")
UNKNOWN: Final = "not measured"
SECONDS: Final = 1.5  # the time of each measurement
CPU_BATCH: Final = 8
LOADED: Final = 0.05  # if other processes take a larger share of the time, a note says so
OLD_TORCH: Final = ("torch==2.10.*", "torchvision==0.25.*")  # the last versions with code for cards before Turing

ADVICE: Final = {
    "reading": "put the shards on a local SSD, or where they stay in memory; data.order=blocks spares slow disks",
    "decoding": "give it more cores, convert with a smaller --max-side, or train at a smaller data.image_size",
    "copying": "check whether the card has all its PCIe lanes",
    "the model step": "the data path keeps up; more or faster GPUs, or a smaller model",
}


def build_supports(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a build of torch runs on a card.

    Machine code (sm_80) runs on cards of the same major version with at least its minor version; with the suffix "a"
    (sm_90a) it runs on exactly that capability. PTX (compute_80) runs on all cards of at least its capability.

    Args:
        capability: the compute capability of the card.
        architectures: the architectures of the build, as `torch.cuda.get_arch_list()` returns them.
    """
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if found is None:
            continue
        kind, major, minor, suffix = found[1], int(found[2]), int(found[3]), found[4]
        if suffix == "a":
            fits = (major, minor) == capability
        elif kind == "sm" or suffix == "f":
            fits = major == capability[0] and minor <= capability[1]
        else:
            fits = (major, minor) <= capability
        if fits:
            return True
    return False


def expected_rate(rates: dict[str, float | None], *, one_processor: bool) -> float | None:
    """The images/s to expect of training, or None if no stage was measured.

    The stages run beside each other, so that the slowest one decides. On a machine without a GPU, decoding and the
    model's step take turns on the same cores, so that the times of an image add up.

    Args:
        rates: images/s of each stage; None if it was not measured.
        one_processor: whether the CPU both decodes and trains.
    """
    measured = [rate for rate in rates.values() if rate is not None]
    decoding, step = rates.get("decoding"), rates.get("the model step")
    if one_processor and decoding and step:
        measured.append(1 / (1 / decoding + 1 / step))
    return min(measured, default=None)


def verdict(rates: dict[str, float | None], remedies: dict[str, str], *, one_processor: bool = False) -> list[str]:
    """The lines that say what limits training, what rate to expect and what to do.

    Args:
        rates: images/s of each stage; None if it was not measured.
        remedies: how to measure a stage that was not measured.
        one_processor: see `expected_rate`.
    """
    measured = {stage: rate for stage, rate in rates.items() if rate is not None}
    unknown = [stage for stage in rates if stage not in measured]
    missing = [f"{stage}: {UNKNOWN}{f' ({remedies[stage]})' if stage in remedies else ''}" for stage in unknown]
    if not measured:
        return ["What limits training here: not measured", *missing]
    first, *others = sorted(measured, key=measured.__getitem__)
    rate = expected_rate(rates, one_processor=one_processor) or measured[first]
    expect = f"expect {'at most' if unknown else 'about'} {rate:,.0f} images/s"
    expect += " (decoding and the step share the cores)" if rate < measured[first] else ""
    next_one = f"; next comes {others[0]} with {measured[others[0]]:,.0f}" if others else ""
    return [f"What limits training here is {first}: {expect}{next_one}", f"To do: {ADVICE[first]}", *missing]


def _gpus() -> tuple[list[dict[str, Any]], str]:
    """The facts of each GPU that torch finds and, if it finds none, the reason."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return [], "none: this torch is built without CUDA"
        return [], "none that torch can use" if driver() is None else "none that torch can use: is the driver too old?"
    architectures, cards = torch.cuda.get_arch_list(), []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        cards.append(
            {
                "name": torch.cuda.get_device_name(index),
                "compute_capability": f"{capability[0]}.{capability[1]}",
                "supported_by_this_torch": build_supports(capability, architectures),
                "bf16": bf16,
                "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            }
        )
    return cards, ""


def _attempt(measure: Callable[[], T], problems: list[str], what: str) -> T | None:
    """The result of `measure`. On an error, None and a line in `problems`, so that others are still measured."""
    try:
        return measure()
    except (ContestantError, RuntimeError, OSError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        problems.append(f"{what}: {UNKNOWN}: {reason}")
        return None


def _step(config: Config, device: torch.device) -> tuple[float, int]:
    """Measures the step that `train` would take. Returns images/s and the batch size.

    The batch size of the config is halved until the step fits into the memory of the GPU. It stays even, because MixUp
    and CutMix mix pairs.
    """
    batch_size = config.data.batch_size_per_gpu if device.type == "cuda" else CPU_BATCH
    while True:
        try:
            return step_rate(config, batch_size, device, SECONDS), batch_size
        except (torch.OutOfMemoryError, OutOfGpuMemory):
            if batch_size < 4:
                raise
            batch_size = batch_size // 4 * 2
        torch.cuda.empty_cache()


def _measure(arguments: argparse.Namespace, config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    cores, num_gpus = usable_cores(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda" if num_gpus else "cpu")
    size = config.data.image_size
    problems: list[str] = []
    rates: dict[str, Any] = dict.fromkeys(
        (
            *("disk", "memory", "pipeline", "decode_one_core", "decode_all_cores"),
            *("copy", "step", "step_batch_size", "step_compiled"),
        )
    )
    rates.update(image_size=size, config=arguments.config, gpus=num_gpus, fits_in_memory=None)
    if arguments.data:
        data, split = str(arguments.data), arguments.split
        manifest, reader = open_split(data, split)
        found = manifest.splits[split]
        total = int(reader.nbytes.sum()) if found.format == "index" else sum(file.bytes for file in found.files)
        rates["fits_in_memory"] = total < _available_memory()
        say("reading")
        read = _attempt(lambda: reading_rates(data, split, len(cores), SECONDS), problems, "reading")
        if read is not None:
            for name, reading in zip(("disk", "memory"), read, strict=True):
                rates[name] = None if reading is None else vars(reading)
        rates["pipeline"] = name = choose_pipeline(device, found.format)

        def decode(some: list[int]) -> float | None:
            what = f"decoding with {name} on {len(some)} of {len(cores)} cores"
            say(what)
            done = _attempt(lambda: decode_round(data, split, name, size, some, device, SECONDS), problems, what)
            if done is not None and (done.foreign or 0) > LOADED:
                problems.append(
                    f"{what}: other processes took {done.foreign:.0%} of the cores; without them the rate is higher"
                )
            return None if done is None else done.rate

        rates["decode_one_core"] = decode(cores[:1])
        rates["decode_all_cores"] = decode(cores) if len(cores) > 1 else rates["decode_one_core"]
    if num_gpus:
        say("copying to the GPU")
        rates["copy"] = _attempt(lambda: copy_rate(size, device, SECONDS), problems, "copying")
    if num_gpus or arguments.step:
        say(f"the step of {config.model.name}")
        step = _attempt(lambda: _step(config, device), problems, "the model step")
        rates["step"], rates["step_batch_size"] = step or (None, None)
        rates["step_compiled"] = choose_step(
            look_at(device), amp=config.train.amp, compile=config.train.compile
        ).compile
    return {**rates, "problems": problems}


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


def _stages(rates: dict[str, Any]) -> tuple[dict[str, float | None], dict[str, str]]:
    """Images/s of each stage for the whole machine, and how to measure the stages that were not measured."""
    reading = rates["memory"] if rates["fits_in_memory"] else rates["disk"]
    stages: dict[str, float | None] = {
        "reading": reading["images_per_second"] if reading else None,
        "decoding": rates["decode_all_cores"],
    }
    remedies = {} if rates["pipeline"] else dict.fromkeys(stages, "pass --data SHARDS")
    if rates["memory"] and not reading:
        remedies["reading"] = "the system kept the files in memory"
    if rates["gpus"]:
        stages["copying"] = rates["copy"] and rates["copy"] * rates["gpus"]
    else:
        remedies["the model step"] = "no GPU; --step measures it on the CPU"
    stages["the model step"] = rates["step"] and rates["step"] * max(1, rates["gpus"])
    return stages, remedies


def _examine(arguments: argparse.Namespace, config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    say("looking at what is installed")
    cards, why_none = _gpus()
    facts: dict[str, Any] = {
        **installation(),
        "gpus": cards,
        "no_gpu": why_none,
        "threads": str(use_threads()),
    }
    facts["versions"]["libjpeg-turbo (native)"] = ceilings.turbo_version() if ceilings.available() else None
    facts["pipelines"] = {name: why_missing(name) for name in PIPELINES}
    facts["rates"] = _measure(arguments, config, say)
    stages, remedies = _stages(facts["rates"])
    one_processor = not facts["rates"]["gpus"]
    facts["expected_images_per_second"] = expected_rate(stages, one_processor=one_processor)
    facts["verdict"] = verdict(stages, remedies, one_processor=one_processor)
    return facts


def _print(facts: dict[str, Any], console: Console) -> None:
    rows = version_rows(facts)

    def row(name: str = "", value: str = "") -> None:
        rows.append((name, value))

    for card in facts["gpus"]:
        supported = card["supported_by_this_torch"]
        row(
            "GPU",
            f"{card['name']}, compute capability {card['compute_capability']}, "
            f"{card['memory_bytes'] / 1e9:,.0f} GB, bf16: {'yes' if card['bf16'] else 'no, fp16 is used'}"
            + ("" if supported else f"; THIS TORCH HAS NO CODE FOR IT: {install(*OLD_TORCH)}"),
        )
    if facts["no_gpu"]:
        row("GPU", facts["no_gpu"])
    rows += machine_rows(facts)
    row("torch's threads", facts["threads"].removeprefix("threads: "))
    row()
    for name, reason in facts["pipelines"].items():
        row(f"pipeline {name}", reason or "can be used")

    rates = facts["rates"]

    def images(rate: float | None, unit: str = "images/s") -> str:
        return UNKNOWN if rate is None else f"{rate:,.0f} {unit}"

    def reading(read: dict[str, float] | None) -> str:
        return (
            UNKNOWN
            if read is None
            else f"{read['bytes_per_second'] / 1e6:,.0f} MB/s, " + images(read["images_per_second"])
        )

    row()
    row("reading, disk", reading(rates["disk"]))
    row("reading, memory", reading(rates["memory"]))
    by = f" ({rates['pipeline']}, {rates['image_size']} px)" if rates["pipeline"] else ""
    row("decoding, one core", images(rates["decode_one_core"]) + by)
    row("decoding, all cores", images(rates["decode_all_cores"]))
    row("copying to a GPU", images(rates["copy"]))
    step = f" a {'GPU' if rates['gpus'] else 'CPU'} ({rates['config']}, batch {rates['step_batch_size']})"
    compiled = ", compiled" if rates["step_compiled"] else ", not compiled"
    row("model step", images(rates["step"]) + (f"{step}{compiled}" if rates["step"] else ""))
    print_rows(rows, console)
    console.print()
    for line in (*rates["problems"], *facts["verdict"]):
        console.print(printable(line), markup=False, soft_wrap=True)


def _next(arguments: argparse.Namespace) -> list[str]:
    if arguments.data is None:
        return next_lines(*sdpnet("doctor", "--data", "SHARDS"), when="a shard set, made by sdpnet convert")
    config = None if arguments.config == DEFAULT_CONFIG else arguments.config
    words = training(arguments.data, config) or sdpnet("describe", arguments.data)
    return next_lines(*words)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command. Returns 0 if the arguments are valid, even if something is missing on this machine."""
    config = load_config(arguments.config)
    if arguments.data:
        open_split(arguments.data, arguments.split)
    with StatusLine() as say:
        facts = _examine(arguments, config, say)
    if arguments.json:
        print_lines(*json.dumps(facts, indent=1).replace("\x7f", "\\u007f").splitlines())
    else:
        console = Console(highlight=False)
        _print(facts, console)
        for line in _next(arguments):
            console.print(line, markup=False, soft_wrap=True)
    return 0
