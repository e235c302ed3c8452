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
from sdpnet.config.load import load_config
from sdpnet.config.names import CONFIG_DIRECTORY
from sdpnet.config.options import Config
from sdpnet.distributed.processes import Processes
from sdpnet.execution.hardware import StepChoices
from sdpnet.execution.micro_batch import OutOfGpuMemory
from sdpnet.loading.image_loader import ImageLoader
from sdpnet.model.flops import conv_block_macs, counted_macs, forward_macs
from sdpnet.model.sdpnet import MODELS, SdPNet
from sdpnet.optim.muon import MuonAdamW
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.benchmarks.stream import RepeatedPlan
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.executors.registry import why_missing
from sdpnet.pipelines.loader import make_plan
from sdpnet.pipelines.options import ShardOptions
from sdpnet.pipelines.terminal.remedy import install_extra
from sdpnet.training.step import PARTS, make_training_step

__all__ = ["CONV_BLOCKS", "SYNTHETIC", "Entry", "PartClock", "Race", "Round", "is_peer", "recipe_of", "run_race"]

CONV_BLOCKS: Final = "conv blocks"  # a part of both forward and backward
_WITHIN: Final = {"conv forward": "forward", "conv backward": "backward"}
WARM_UP: Final = 2  # steps before a round's clock runs
SYNTHETIC: Final = "synthetic"
_ALONE_SECONDS: Final = 0.5  # the time of each measurement outside of a step


class PartClock:
    """Measures the seconds of a step's parts (`StepMarks`): on a GPU the device's time between events, on a CPU the
    wall clock.

    A part is taken to start where the part before it ended. On a GPU, "data wait" is therefore the time for which the
    device was idle before a batch was complete on it, and "augment" the time for which it was idle before that batch
    was augmented; both are done during the step before, on the side stream.
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
        """Marks the conv blocks within the forward and the backward pass: see `SdPNet.watch_conv_blocks`."""
        self.end("forward" if where == "begin" else "conv forward")
        backward = (
            "conv backward" if where == "begin" else "backward"
        )  # the backward pass runs in the opposite direction
        if x.requires_grad:
            x.register_hook(lambda _: self.end(backward))

    def seconds(self) -> dict[str, float]:
        """The total seconds of each part and of the conv blocks. The device must have finished its work."""
        totals = dict.fromkeys((*PARTS, CONV_BLOCKS), 0.0)
        for (_, began), (part, ended) in itertools.pairwise(self._marks):
            seconds = ended - began if self._stream is None else began.elapsed_time(ended) / 1000
            totals[_WITHIN.get(part, part)] += seconds
            totals[CONV_BLOCKS] += seconds if part in _WITHIN else 0
        return totals


@dataclass(frozen=True)
class Round:
    """The measurement of several steps in a row. `peak_bytes` is None on CPUs."""

    num_images: int
    seconds: float
    part_seconds: dict[str, float]
    peak_bytes: int | None

    @property
    def rate(self) -> float:
        return self.num_images / self.seconds


@dataclass
class Entry:
    """The results of a model on a feed.

    Attributes:
        macs: the multiply-accumulates of a forward pass for one image.
        conv_macs: those in the conv blocks; 0 for models that are not an SdP-Net.
        reason: why there are no results; empty if there are.
    """

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
        """The milliseconds of a part in one step, for each round."""
        return [1000 * round_.part_seconds[part] / self.num_steps for round_ in self.rounds]


@dataclass
class Race:
    """The results of all models on all feeds.

    Attributes:
        notes: lines about the choices that were made for a model.
        matmul_rates: the rate of large matrix products in FLOP/s, for each round.
        augment_seconds: the time to augment one batch outside of a step, for each round.
        copy_seconds: the time to copy one batch to the GPU outside of a step, for each round; empty on CPUs.
    """

    entries: list[Entry]
    notes: list[str] = field(default_factory=list)
    matmul_rates: list[float] = field(default_factory=list)
    augment_seconds: list[float] = field(default_factory=list)
    copy_seconds: list[float] = field(default_factory=list)

    @property
    def running(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.reason]


class _Contestant:
    """A model with the training step of its recipe, as `train` would take it."""

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
            self.macs = forward_macs(options, size, options.patch_dropout)
            self.conv_macs = conv_block_macs(options, size)
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
        """Bytes of the weights, their average and the optimizer's state.

        The peak is measured relative to the memory in use, which includes the weights of all other contestants.
        """
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
    """Batches for each feed. A loader is opened once and shared by all models; the draws follow each recipe."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes, self._device = num_classes, device
        self._loaders: dict[str, ImageLoader] = {}

    def batches(self, feed: str, recipe: Config, num_steps: int) -> Generator[Batch, None, None]:
        """Endless synthetic batches, or as many batches of a pipeline as `num_steps` steps and their warm-up need."""
        if feed == SYNTHETIC:
            return noise(recipe, self._num_classes, self._device)
        if feed not in self._loaders:
            if reason := why_missing(feed):
                raise UserError(reason)
            data = replace(recipe.data, pipeline=feed)  # type: ignore[arg-type]
            shard = ShardOptions()
            self._loaders[feed] = ImageLoader.from_options(
                data, recipe.augment, "train", shard, self._device, seed=recipe.seed
            )
        loader = self._loaders[feed]
        sizes = loader.source.reader.sizes
        plan = make_plan(recipe.data, recipe.augment, sizes, train=True, world_size=1, seed=recipe.seed)
        # The plan has more batches than are used, so that a further batch is in preparation during the last steps too.
        count = (WARM_UP + num_steps) * recipe.train.accumulate + recipe.data.prefetch[1] + 1
        loader.set_plan(RepeatedPlan(plan, count))
        return loader.batches()

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()


def is_peer(name: str) -> bool:
    """Whether this is a model of timm, because no config and no SdP-Net has the name."""
    return name not in MODELS and not (CONFIG_DIRECTORY / f"{name}.yaml").is_file()


def recipe_of(name: str, settings: Sequence[str]) -> Config:
    """The config of a contestant: that of its name or, for another SdP-Net or a model of timm, the seed recipe.

    A step that is not finite does not end a benchmark, because it may train on noise.
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
    """Times every model on every feed, by turns. The first round does not count, and the order alternates.

    Args:
        models: names of configs, of `sdpnet.model.sdpnet.MODELS` or of models of timm.
        feeds: "synthetic" or names of pipelines, which read the shard set in `settings`.
        settings: texts "section.key=value", applied to every recipe. They give all models the same size of images and
            batches.
        rounds: the number of rounds that count.
        seconds: the approximate time of a round, which has at least two steps.
        say: is called with one line of text about the progress.
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
