"""The race of `sdpnet bench step`: training steps of several models on several feeds, by turns, part by part."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import torch
from torch import nn

from sdpnet.benchmarks.throughput import augment_rate, copy_rate, matmul_rate, noise
from sdpnet.config.load import CONFIG_DIRECTORY, load_config
from sdpnet.config.options import Config
from sdpnet.distributed.processes import Processes
from sdpnet.execution.hardware import StepChoices
from sdpnet.execution.micro_batch import OutOfGpuMemory
from sdpnet.model.flops import conv_block_macs, counted_macs, forward_macs
from sdpnet.model.sdpnet import MODELS, SdPNet
from sdpnet.optim.muon import MuonAdamW
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.benchmarks.stream import RepeatedPlan
from sdpnet.pipelines.contract import Batch, Loader
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.executors.registry import why_missing
from sdpnet.pipelines.loader import make_loader, make_plan
from sdpnet.pipelines.options import ShardOptions
from sdpnet.pipelines.terminal.remedy import install_extra
from sdpnet.training.step import PARTS, make_training_step

__all__ = ["CONV_BLOCKS", "SYNTHETIC", "Entry", "PartClock", "Race", "Round", "is_peer", "recipe_of", "run_race"]

CONV_BLOCKS: Final = "conv blocks"  # within forward and backward
_WITHIN: Final = {"conv forward": "forward", "conv backward": "backward"}
WARM_UP: Final = 2  # steps before a round's clock runs
SYNTHETIC: Final = "synthetic"
_ALONE_SECONDS: Final = 0.5  # of what is measured by itself


class PartClock:
    """Seconds of a step's parts (`StepMarks`): on a GPU of the device's own time between events, on a CPU of the wall
    clock. A part is taken to begin where the one before it ended.

    So on a GPU "data wait" is the time in which the device had nothing to do before a batch was complete there, and
    "augment" the time before that batch was augmented, beside the step before.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._marks: list[tuple[str, Any]] = []
        self.end("")

    @contextmanager
    def mark(self, part: str) -> Iterator[None]:
        yield
        self.end(part)

    def end(self, part: str) -> None:
        """Ends `part`."""
        at = time.perf_counter() if self._stream is None else self._stream.record_event(torch.cuda.Event(True))
        self._marks.append((part, at))

    def watch_conv_blocks(self, x: torch.Tensor, where: Literal["begin", "end"]) -> None:
        """Tells the conv blocks apart in the passes forward and backward: see `SdPNet.watch_conv_blocks`."""
        self.end("forward" if where == "begin" else "conv forward")
        backward = "conv backward" if where == "begin" else "backward"  # the backward pass runs the other way
        if x.requires_grad:
            x.register_hook(lambda _: self.end(backward))

    def seconds(self) -> dict[str, float]:
        """By part, over all steps, and of the conv blocks; the device must have finished."""
        totals = dict.fromkeys((*PARTS, CONV_BLOCKS), 0.0)
        for (_, began), (part, ended) in itertools.pairwise(self._marks):
            seconds = ended - began if self._stream is None else began.elapsed_time(ended) / 1000
            totals[_WITHIN.get(part, part)] += seconds
            totals[CONV_BLOCKS] += seconds if part in _WITHIN else 0
        return totals


@dataclass(frozen=True)
class Round:
    """So many steps in a row; `peak_bytes` is None on CPUs."""

    num_images: int
    seconds: float
    part_seconds: dict[str, float]
    peak_bytes: int | None

    @property
    def rate(self) -> float:
        return self.num_images / self.seconds


@dataclass
class Entry:
    """A model on a feed: what it did, or in `reason` why it did nothing. `macs`: of a forward pass, an image, and of
    these the conv blocks'; 0 of what is no SdP-Net."""

    model: str
    feed: str
    macs: int = 0
    conv_macs: int = 0
    num_parameters: int = 0
    num_steps: int = 0
    reason: str = ""
    rounds: list[Round] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [round_.rate for round_ in self.rounds]

    def milliseconds(self, part: str) -> list[float]:
        """Of a step, by round."""
        return [1000 * round_.part_seconds[part] / self.num_steps for round_ in self.rounds]


@dataclass
class Race:
    """All of them; by round `matmul_rates` (FLOP/s), and of a batch by itself `augment_seconds` and, on GPUs,
    `copy_seconds`; `notes` on what was chosen for a model."""

    entries: list[Entry]
    notes: list[str] = field(default_factory=list)
    matmul_rates: list[float] = field(default_factory=list)
    augment_seconds: list[float] = field(default_factory=list)
    copy_seconds: list[float] = field(default_factory=list)

    @property
    def running(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.reason]


class _Contestant:
    """A model under its recipe: the step that `train` would take."""

    def __init__(self, name: str, recipe: Config, num_classes: int, device: torch.device) -> None:
        self.recipe = recipe
        size = recipe.data.image_size
        self.conv_macs = 0
        model: nn.Module
        if is_peer(name):
            try:
                import timm
            except ImportError:
                raise UserError(f"timm is not installed: {install_extra('timm')}") from None
            sized = {"img_size": size} if name.startswith("vit_") else {}
            make = lambda: timm.create_model(name, num_classes=num_classes, **sized)  # noqa: E731
            self.macs = counted_macs(make, size)
            model = make()
        else:
            options = recipe.model.options(num_classes)
            self.macs, self.conv_macs = forward_macs(options, size), conv_block_macs(options, size)
            model = SdPNet(options)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        processes = Processes(ShardOptions(), device)
        self.training_step, self.notes = make_training_step(recipe, model.to(device), num_classes, processes)
        self.training_step.model.train()
        self._number = 0

    def step(self, batches: Iterator[Batch], clock: PartClock) -> int:
        """Takes one training step; returns its number of images."""
        model = self.training_step.model
        if isinstance(model, SdPNet):
            model.watch_conv_blocks = clock.watch_conv_blocks
        self._number += 1
        self.training_step(batches, self._number, self.recipe.optim.lr, clock)
        return self.recipe.data.batch_size_per_gpu * self.recipe.train.accumulate

    def round(self, batches: Generator[Batch, None, None], num_steps: int) -> Round:
        device = self.training_step.processes.device
        on_gpu = device.type == "cuda"
        with closing(batches):
            for _ in range(WARM_UP):
                self.step(batches, PartClock(device))
            self.free_gradients()
            _finish(device)
            before = 0
            if on_gpu:
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
            began, num_images, clock = time.perf_counter(), 0, PartClock(device)
            for _ in range(num_steps):
                num_images += self.step(batches, clock)
            _finish(device)
            seconds = time.perf_counter() - began
            peak = torch.cuda.max_memory_allocated(device) - before + self._resident() if on_gpu else None
        self.free_gradients()
        return Round(num_images, seconds, clock.seconds(), peak)

    def free_gradients(self) -> None:
        self.training_step.optimizer.zero_grad(set_to_none=True)

    def _resident(self) -> int:
        """Bytes of the weights, their average and the optimizer's state: others' weights lie beside them."""
        step = self.training_step
        tensors = [*step.model.state_dict().values(), *(step.ema.module.state_dict().values() if step.ema else ())]
        parts = step.optimizer.parts.values() if isinstance(step.optimizer, MuonAdamW) else [step.optimizer]
        for state in (state for part in parts for state in part.state.values()):
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Feeds:
    """Batches by the feed's name, each loader opened once; what is drawn for them is each recipe's."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes, self._device = num_classes, device
        self._loaders: dict[str, Loader] = {}

    def batches(self, feed: str, recipe: Config, num_steps: int) -> Generator[Batch, None, None]:
        """Endless synthetic batches, or as many of a pipeline as `num_steps` steps and their warm-up take."""
        if feed == SYNTHETIC:
            return noise(recipe, self._num_classes, self._device)
        if feed not in self._loaders:
            if reason := why_missing(feed):
                raise UserError(reason)
            data = replace(recipe.data, pipeline=feed)  # type: ignore[arg-type]
            shard = ShardOptions()
            self._loaders[feed] = make_loader(data, recipe.augment, "train", shard, self._device, seed=recipe.seed)
        loader = self._loaders[feed]
        sizes = loader.source.reader.sizes
        plan = make_plan(recipe.data, recipe.augment, sizes, train=True, world_size=1, seed=recipe.seed)
        # More than asked for, so that the last ones are made as all others are: with the next under way.
        count = (WARM_UP + num_steps) * recipe.train.accumulate + recipe.data.prefetch[1] + 1
        loader.set_plan(RepeatedPlan(plan, count))
        return loader.batches()

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()


def is_peer(name: str) -> bool:
    """Whether this is one of timm's models: no config and no SdP-Net has the name."""
    return name not in MODELS and not (CONFIG_DIRECTORY / f"{name}.yaml").is_file()


def recipe_of(name: str, settings: Sequence[str]) -> Config:
    """What a contestant trains with: the config of that name; the seed recipe for another SdP-Net or a model of timm's.

    A step that is not finite does not end a benchmark: what it trains on need not make sense.
    """
    settings = [*settings, "train.on_nonfinite=skip", f"train.max_nonfinite={10**9}"]
    if (CONFIG_DIRECTORY / f"{name}.yaml").is_file():
        return load_config(name, settings)
    return load_config("sdpnet_xl", [*settings, *([f"model.name={name}"] if name in MODELS else [])])


def run_race(
    models: Sequence[str],
    feeds: Sequence[str],
    settings: Sequence[str],
    num_classes: int,
    device: torch.device,
    choices: StepChoices,
    *,
    rounds: int,
    seconds: float,
    say: Callable[[str], None] = lambda text: None,
) -> Race:
    """Every model on every feed, by turns; the first round does not count, and the order turns from round to round.

    Args:
        models: names of configs, of `sdpnet.model.sdpnet.MODELS` or of timm's models.
        feeds: "synthetic" or pipelines; these read the shard set in `settings`.
        settings: "section.key=value", applied to every recipe; images and batches are of the same size for all.
        seconds: a round, about; at least two steps.
    """
    race = Race([Entry(model, feed) for model in models for feed in feeds])
    contestants: dict[str, _Contestant] = {}
    feeds_by_name = _Feeds(num_classes, device)
    seed_recipe = recipe_of("sdpnet_xl", settings)
    batch_size = seed_recipe.data.batch_size_per_gpu
    stage = DeviceStage(seed_recipe.augment, num_classes, choices.dtype, train=True)

    def attempt(entry: Entry, num_steps: int) -> Round | None:
        try:
            if entry.model not in contestants:
                recipe = recipe_of(entry.model, settings)
                contestants[entry.model] = _Contestant(entry.model, recipe, num_classes, device)
                race.notes += [f"{entry.model}: {note}" for note in contestants[entry.model].notes]
            contestant = contestants[entry.model]
            return contestant.round(feeds_by_name.batches(entry.feed, contestant.recipe, num_steps), num_steps)
        except (torch.OutOfMemoryError, OutOfGpuMemory):
            entry.reason = f"out of GPU memory with batches of {batch_size}: lower --batch-size"
        except (UserError, RuntimeError) as error:
            entry.reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if entry.model in contestants:
            contestants[entry.model].free_gradients()
        return None

    with closing(feeds_by_name):
        for entry in race.entries:
            say(f"{entry.model}, {entry.feed}: starting")
            first = attempt(entry, 2)
            if first is not None:
                entry.macs = contestants[entry.model].macs
                entry.conv_macs = contestants[entry.model].conv_macs
                entry.num_parameters = contestants[entry.model].num_parameters
                entry.num_steps = max(2, round(2 * seconds / first.seconds))
        for number in range(rounds + 1):
            for entry in race.running if number % 2 else reversed(race.running):
                say(f"{f'round {number} of {rounds}' if number else 'warm-up'}: {entry.model}, {entry.feed}")
                measured = attempt(entry, entry.num_steps)
                if number and measured is not None:
                    entry.rounds.append(measured)
            if number and race.running:
                race.matmul_rates.append(matmul_rate(choices.dtype, device, _ALONE_SECONDS))
                batch = next(noise(seed_recipe, num_classes, device))
                race.augment_seconds.append(batch_size / augment_rate(stage, batch, _ALONE_SECONDS))
                if device.type == "cuda":
                    rate = copy_rate(seed_recipe.data.image_size, device, _ALONE_SECONDS)
                    race.copy_seconds.append(batch_size / rate)
    return race
