"""The race of `sdpnet bench step`: training steps of several models on several feeds, by turns, part by part."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from sdpnet.benchmarks.rates import augment_rate, copy_rate, matmul_rate
from sdpnet.config.options import Config, EmaOptions, TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.compiled import compile_blocks
from sdpnet.execution.depthwise_choice import choose_depthwise
from sdpnet.execution.hardware import StepChoices
from sdpnet.execution.side_stream import SideStream
from sdpnet.model.flops import conv_block_macs, counted_macs, forward_macs
from sdpnet.model.sdpnet import MODELS, SdPNet
from sdpnet.optim.ema import ModelEma
from sdpnet.optim.loss import soft_cross_entropy
from sdpnet.optim.nonfinite import Guard
from sdpnet.optim.optimizer import make_optimizer
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.benchmarks.stream import RepeatedPlan
from sdpnet.pipelines.contract import Batch, Loader
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.executors.registry import why_missing
from sdpnet.pipelines.loader import make_loader, make_plan
from sdpnet.pipelines.options import ShardOptions
from sdpnet.pipelines.plan import Plan
from sdpnet.pipelines.terminal.remedy import install_extra
from sdpnet.training.update import update

__all__ = ["CONV_BLOCKS", "PARTS", "SYNTHETIC", "Entry", "PartClock", "Race", "Round", "run_race"]

PARTS: Final = ("data wait", "augment", "forward", "backward", "optimizer", "EMA")
CONV_BLOCKS: Final = "conv blocks"  # within forward and backward
_WITHIN: Final = {"conv forward": "forward", "conv backward": "backward"}
WARM_UP: Final = 2  # steps before a round's clock runs
SYNTHETIC: Final = "synthetic"
_ALONE_SECONDS: Final = 0.5  # of what is measured by itself


class PartClock:
    """Seconds of a step's parts: on a GPU of the device's own time between events, on a CPU of the wall clock.

    So on a GPU "data wait" is the time it had nothing to do before a batch was complete there, and "augment" the same
    before that was augmented, beside the step before.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, part: str) -> None:
        """Ends `part`, which began with the mark before."""
        at = time.perf_counter() if self._stream is None else self._stream.record_event(torch.cuda.Event(True))
        self._marks.append((part, at))

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
    """A model and all that trains it, the seed recipe's augmentation included."""

    def __init__(self, name: str, config: Config, num_classes: int, device: torch.device, choices: StepChoices) -> None:
        self.device, self.choices = device, choices
        self._clock = PartClock(device)
        size, processes = config.data.image_size, Processes(ShardOptions(), device)
        self.conv_macs = 0
        model: nn.Module
        if name in MODELS:
            options = replace(MODELS[name], num_classes=num_classes)
            self.macs, self.conv_macs = forward_macs(options, size), conv_block_macs(options, size)
            model = SdPNet(options).to(device)
            train = replace(config.train, compile=choices.compile)
            self.notes = choose_depthwise(train, model, config.data.batch_size_per_gpu, size, choices.dtype, processes)
            self._watch(model)
        else:
            try:
                import timm
            except ImportError:
                raise UserError(f"timm is not installed: {install_extra('timm')}") from None
            sized = {"img_size": size} if name.startswith("vit_") else {}
            make = lambda: timm.create_model(name, num_classes=num_classes, **sized)  # noqa: E731
            self.macs = counted_macs(make, size)
            model, self.notes = make(), []
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.model = model.to(device).to(memory_format=torch.channels_last).train()
        self.ema = ModelEma(self.model, EmaOptions(decay=0.9999))
        if isinstance(model, SdPNet):
            self.optimizer = make_optimizer(model, config.optim)
        else:
            optim, fused = config.optim, device.type == "cuda" or None
            parameters = self.model.parameters()
            self.optimizer = torch.optim.AdamW(parameters, optim.lr, weight_decay=optim.weight_decay, fused=fused)
        if choices.compile:
            blocks = (*model.conv_blocks, *model.transformer_blocks) if isinstance(model, SdPNet) else (model,)
            compile_blocks(blocks)
        self.scaler = torch.amp.GradScaler(device.type, enabled=choices.scaler)
        # What is trained on need not make sense, so a step that is not finite is no reason to end.
        borne = TrainOptions(on_nonfinite="skip", max_nonfinite=10**9)
        self._guard, self._steps = Guard(borne, model, self.scaler, processes), 0
        self.stage = DeviceStage(config.augment, num_classes, choices.dtype, train=True)
        self._side = SideStream(device)

    def _watch(self, model: SdPNet) -> None:
        """Marks where the conv blocks begin and end, in the forward and the backward pass. Not by hooks of modules,
        which torch.compile would trace."""
        run, first, last = model._run, model.conv_blocks[0], model.conv_blocks[-1]

        def watched(block: nn.Module, x: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
            if block is first:
                self._clock.mark("forward")
                x.register_hook(lambda _: self._clock.mark("conv backward"))
            y = run(block, x, *others)
            if block is last:
                self._clock.mark("conv forward")
                y.register_hook(lambda _: self._clock.mark("backward"))
            return y

        model._run = watched  # type: ignore[method-assign, assignment]

    def step(self, batches: Iterator[Batch], clock: PartClock) -> int:
        """One training step; returns its number of images."""
        self._clock = clock
        with self._side():
            batch = next(batches)
        self._side.join()
        clock.mark("data wait")
        with self._side():
            images, targets = self.stage(batch)
            images = images.to(memory_format=torch.channels_last)
        self._side.join(images, targets)
        clock.mark("augment")
        self.optimizer.zero_grad(set_to_none=True)
        self._guard.keep()
        dtype = self.choices.dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            loss = soft_cross_entropy(self.model(images), targets)
        clock.mark("forward")
        self.scaler.scale(loss).backward()
        clock.mark("backward")
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        self._steps += 1
        update(
            self._steps,
            loss,
            grad_norm,
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            guard=self._guard,
            ema=self.ema,
            late=self.choices.late,
            mark=clock.mark,
        )
        return len(images)

    def round(self, batches: Generator[Batch, None, None], num_steps: int) -> Round:
        on_gpu = self.device.type == "cuda"
        with closing(batches):
            for _ in range(WARM_UP):
                self.step(batches, PartClock(self.device))
            self.optimizer.zero_grad(set_to_none=True)
            _finish(self.device)
            before = 0
            if on_gpu:
                before = torch.cuda.memory_allocated(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
            began, num_images, clock = time.perf_counter(), 0, PartClock(self.device)
            for _ in range(num_steps):
                num_images += self.step(batches, clock)
            _finish(self.device)
            seconds = time.perf_counter() - began
            peak = torch.cuda.max_memory_allocated(self.device) - before + self._resident() if on_gpu else None
        self.optimizer.zero_grad(set_to_none=True)
        return Round(num_images, seconds, clock.seconds(), peak)

    def _resident(self) -> int:
        """Bytes of the weights, their average and the optimizer's state: others' weights lie beside them."""
        tensors = [*self.model.state_dict().values(), *self.ema.module.state_dict().values()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _noise(config: Config, num_classes: int, device: torch.device) -> Generator[Batch, None, None]:
    """Endless batches of one noise that is on the device already, with the draws of a plan."""
    size, count = config.data.image_size, config.data.batch_size_per_gpu
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (count, size, size, 3), np.uint8)).to(device)
    labels = torch.from_numpy(generator.integers(0, num_classes, count)).to(device)
    sizes = np.full((8 * count, 2), 256, np.int32)
    plan = make_plan(config.data, config.augment, sizes, train=True, world_size=1, seed=config.seed)
    valid = torch.ones(count, dtype=torch.bool, device=device)
    for index in itertools.count():
        draws = plan.batch(0, index % len(plan))
        yield Batch(images, labels, torch.from_numpy(draws.sample_ids).to(device, non_blocking=True), valid, draws)


class _Feeds:
    """Batches by the feed's name, each loader opened once."""

    def __init__(self, config: Config, num_classes: int, device: torch.device) -> None:
        self._config, self._num_classes, self._device = config, num_classes, device
        self._loaders: dict[str, tuple[Loader, Plan]] = {}

    def batches(self, feed: str, num_steps: int) -> Generator[Batch, None, None]:
        if feed == SYNTHETIC:
            return _noise(self._config, self._num_classes, self._device)
        if feed not in self._loaders:
            if reason := why_missing(feed):
                raise UserError(reason)
            data = replace(self._config.data, pipeline=feed)  # type: ignore[arg-type]
            augment, seed = self._config.augment, self._config.seed
            loader = make_loader(data, augment, "train", ShardOptions(), self._device, seed=seed)
            self._loaders[feed] = loader, loader.source.plan
        loader, plan = self._loaders[feed]
        # More than asked for, so that the last ones are made as all others are: with the next under way.
        count = WARM_UP + num_steps + self._config.data.prefetch[1] + 1
        loader.set_plan(RepeatedPlan(plan, count))
        return loader.batches()

    def close(self) -> None:
        for loader, _ in self._loaders.values():
            loader.close()


def run_race(
    models: list[str],
    feeds: list[str],
    config: Config,
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
        models: of `sdpnet.model.sdpnet.MODELS` or timm's.
        feeds: "synthetic" or pipelines; these read `config.data.path`.
        seconds: a round, about; at least two steps.
    """
    race = Race([Entry(model, feed) for model in models for feed in feeds])
    contestants: dict[str, _Contestant] = {}
    batches = _Feeds(config, num_classes, device)
    stage = DeviceStage(config.augment, num_classes, choices.dtype, train=True)

    def attempt(entry: Entry, num_steps: int) -> Round | None:
        try:
            if entry.model not in contestants:
                contestants[entry.model] = _Contestant(entry.model, config, num_classes, device, choices)
                race.notes += [f"{entry.model}: {note}" for note in contestants[entry.model].notes]
            return contestants[entry.model].round(batches.batches(entry.feed, num_steps), num_steps)
        except torch.OutOfMemoryError:
            entry.reason = f"out of GPU memory with batches of {config.data.batch_size_per_gpu}: lower --batch-size"
        except (UserError, RuntimeError) as error:
            entry.reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if entry.model in contestants:
            contestants[entry.model].optimizer.zero_grad(set_to_none=True)
        return None

    with closing(batches):
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
                batch = next(_noise(config, num_classes, device))
                race.augment_seconds.append(len(batch.images) / augment_rate(stage, batch, _ALONE_SECONDS))
                if device.type == "cuda":
                    rate = copy_rate(config.data.image_size, device, _ALONE_SECONDS)
                    race.copy_seconds.append(len(batch.images) / rate)
    return race
