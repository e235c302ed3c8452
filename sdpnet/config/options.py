"""The sections of a config: frozen dataclasses, validated when they are made; see `sdpnet.config.load` for the
files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from sdpnet.model.sdpnet import MODELS, ModelOptions, Position, create_model_options
from sdpnet.pipelines.errors import UserError, nearest, require
from sdpnet.pipelines.options import AugmentOptions, DataOptions

__all__ = [
    "Config",
    "EmaOptions",
    "LogOptions",
    "LossOptions",
    "ModelConfig",
    "OptimOptions",
    "ResolutionOptions",
    "TrainOptions",
]


@dataclass(frozen=True)
class ModelConfig:
    """Section `model`: a name from `sdpnet.model.sdpnet.MODELS` and, where set, its fields overridden.

    `num_classes` left out is the shard set's number of classes.
    """

    name: str = "sdpnet_tiny"
    num_classes: int | None = None
    conv_blocks: int | None = None
    transformer_blocks: int | None = None
    dim: int | None = None
    heads: int | None = None
    mlp_ratio: int | None = None
    patch_size: int | None = None
    kernel_size: int | None = None
    head_hidden: int | None = None
    registers: int | None = None
    dropout: float | None = None
    position: Position | None = None
    grid_size: int | None = None
    layer_scale: float | None = None
    drop_path: float | None = None
    final_norm: bool | None = None

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            raise UserError(f"model.name = {self.name!r}: {nearest(self.name, MODELS)}")
        self.options(num_classes=self.num_classes or 1000)

    def options(self, num_classes: int) -> ModelOptions:
        overrides = {k: v for k, v in asdict(self).items() if v is not None and k not in ("name", "num_classes")}
        return create_model_options(self.name, num_classes=num_classes, **overrides)


@dataclass(frozen=True)
class OptimOptions:
    """Section `optim`: AdamW, or Muon for the matrices and AdamW for the rest, and the schedule.

    `lr` is the peak learning rate at a global batch of `lr_reference_batch`; it scales with the batch (0: it does not).
    A layer's rate is `layer_decay` times that of the layer above it (1: all have the same; see
    `sdpnet.optim.optimizer`).

    Linear warm-up over `warmup_epochs`, then `schedule`:
        restarts: cosine annealing with warm restarts (Loshchilov & Hutter, 2016): cycles of `restart_epochs`, each
            `restart_factor` times as long as the one before; `restart_epochs` 0 is one cycle to the end.
        cosine: one cycle to the end, whatever the restarts' keys say.
        constant: the peak to the end.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    lr_reference_batch: int = 512
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad_norm: float = 0.0
    layer_decay: float = 1.0
    schedule: Literal["restarts", "cosine", "constant"] = "restarts"
    warmup_epochs: float = 5.0
    restart_epochs: float = 0.0
    restart_factor: float = 1.0

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "above 0")
        require(self.lr_reference_batch >= 0, "optim.lr_reference_batch", self.lr_reference_batch, "0 or more")
        require(0 <= self.min_lr <= self.lr, "optim.min_lr", self.min_lr, f"0 to optim.lr ({self.lr!r})")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "above 0")
        require(self.clip_grad_norm >= 0, "optim.clip_grad_norm", self.clip_grad_norm, "0 (off) or more")
        require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "in (0, 1]")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "0 or more")
        require(self.restart_epochs >= 0, "optim.restart_epochs", self.restart_epochs, "0 (no restarts) or more")
        require(self.restart_factor >= 1, "optim.restart_factor", self.restart_factor, "at least 1")


@dataclass(frozen=True)
class ResolutionOptions:
    """Section `resolution`: training images grow from `start_size` (0: no growing) to `data.image_size`, linearly from
    `begin_epoch` to `end_epoch`, in steps of `multiple` pixels."""

    start_size: int = 0
    begin_epoch: int = 0
    end_epoch: int = 1
    multiple: int = 32

    def __post_init__(self) -> None:
        require(self.start_size >= 0, "resolution.start_size", self.start_size, "0 (off) or more")
        require(self.begin_epoch >= 0, "resolution.begin_epoch", self.begin_epoch, "0 or more")
        require(
            self.end_epoch > self.begin_epoch,
            "resolution.end_epoch",
            self.end_epoch,
            f"above resolution.begin_epoch ({self.begin_epoch})",
        )
        require(self.multiple >= 1, "resolution.multiple", self.multiple, "at least 1")


@dataclass(frozen=True)
class EmaOptions:
    """Section `ema`: the weights' exponential moving average; `decay` 0 is none.

    With `warmup` the decay of the first updates is lower, so that the average forgets the weights' random start.
    """

    decay: float = 0.0
    warmup: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, "ema.decay", self.decay, "in [0, 1)")


@dataclass(frozen=True)
class LossOptions:
    """Section `loss`: cross entropy (`ce`), or a binary cross entropy for each class (`bce`).

    For `bce` alone: targets above `target_threshold` become 1 and the others 0, and `sum_classes` takes the sum over
    the classes in place of the mean. Label smoothing is `augment.label_smoothing`.
    """

    kind: Literal["ce", "bce"] = "ce"
    target_threshold: float | None = None
    sum_classes: bool = False

    def __post_init__(self) -> None:
        if self.target_threshold is not None:
            require(0 <= self.target_threshold < 1, "loss.target_threshold", self.target_threshold, "in [0, 1)")
        if self.kind == "ce":
            require(
                self.target_threshold is None, "loss.target_threshold", self.target_threshold, "null for loss.kind ce"
            )
            require(not self.sum_classes, "loss.sum_classes", self.sum_classes, "false for loss.kind ce")


@dataclass(frozen=True)
class TrainOptions:
    """Section `train`: the loop. Intervals are in steps for logs and checkpoints, in epochs for evaluations.

    `start_from`: another run, or a model.safetensors or checkpoint of it, whose weights a new run begins with (see
    `sdpnet.training.finetune`). `other_classes` is what follows when the shard set's classes, by name and order, are
    not those that a resumed run or `start_from` was trained on: `refuse` is an error; `keep` keeps the head, so that
    class 3 stays class 3 whatever its name; `new_head` (for `start_from`) starts the head's last layer anew, as is done
    in any case where the number of classes differs.

    `sync_batch_norm`: batch norm sees the samples of all processes. `checkpoint_activations` keeps only the blocks'
    inputs for the backward pass and computes the rest again. `compile` compiles the blocks with torch.compile (auto: on
    GPUs of compute capability 8.0 and more). `memory_format`: `probe` tries both at the start. `depthwise`: whose
    convolutions; `auto` times torch's and Triton's once on a GPU, and is torch elsewhere (see
    `sdpnet.execution.depthwise_choice`). `keep_checkpoints` are kept, and with `keep_best` the one of the best top-1
    (the average's where there is one); `async_checkpoints` writes them beside the training.

    `micro_batch`: the images of one forward and backward pass: null is the whole batch, `auto` what fits into the GPU
    (see `sdpnet.execution.micro_batch`). `on_nonfinite` is what a step with a loss or gradient that is not finite leads
    to, and `max_nonfinite` how many of them within 1,000 steps are not yet the end (see `sdpnet.optim.nonfinite`).

    `timeout_seconds`: how long a process waits for the others before it takes them for lost and ends. It must be longer
    than writing a checkpoint takes, for which the others may have to wait.
    """

    epochs: int = 10
    start_from: str = ""
    other_classes: Literal["refuse", "keep", "new_head"] = "refuse"
    accumulate: int = 1
    micro_batch: Literal["auto"] | int | None = None
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    max_nonfinite: int = 10
    sync_batch_norm: bool = False
    checkpoint_activations: bool = False
    compile: Literal["auto"] | bool = "auto"
    memory_format: Literal["channels_last", "contiguous", "probe"] = "channels_last"
    depthwise: Literal["auto", "torch", "triton"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    log_interval: int = 50
    eval_interval: int = 1
    checkpoint_interval: int = 0
    keep_checkpoints: int = 3
    keep_best: bool = True
    async_checkpoints: bool = True
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate", "log_interval", "eval_interval", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        allowed = self.micro_batch is None or self.micro_batch == "auto" or self.micro_batch >= 1
        require(allowed, "train.micro_batch", self.micro_batch, "auto, null or at least 1")
        most = 10_000_000  # about 116 days; torch counts in a fixed number of bits
        require(1 <= self.timeout_seconds <= most, "train.timeout_seconds", self.timeout_seconds, f"1 to {most}")
        require(self.max_nonfinite >= 0, "train.max_nonfinite", self.max_nonfinite, "0 or more")
        require(
            self.checkpoint_interval >= 0,
            "train.checkpoint_interval",
            self.checkpoint_interval,
            "0 (epochs' ends) or more",
        )


@dataclass(frozen=True)
class LogOptions:
    """Section `log`: what a run writes beside `metrics.jsonl`.

    `tensorboard` writes events to RUN/tensorboard; `wandb` is the name of a Weights & Biases project (empty: off), and
    WANDB_MODE=offline keeps it on this machine. `profile` (first, count) writes a trace of `count` steps, from the
    `first` on, to RUN/trace.json; (0, 0) is off. Steps count from 1 at the start of the process, and the one before
    `first` warms the profiler up.
    """

    tensorboard: bool = False
    wandb: str = ""
    profile: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        first, count = self.profile
        ok = self.profile == (0, 0) or (first >= 2 and count >= 1)
        require(ok, "log.profile", self.profile, "[first step, from 2; number of steps, from 1], or [0, 0] (off)")


@dataclass(frozen=True)
class Config:
    """One training run, resolved. `seed` decides the weights' start and every draw of the plan."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataOptions = field(default_factory=DataOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    resolution: ResolutionOptions = field(default_factory=ResolutionOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    log: LogOptions = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        patch = self.model.options(num_classes=1).patch_size
        require(
            self.data.image_size % patch == 0,
            "data.image_size",
            self.data.image_size,
            f"a multiple of the patch size {patch}",
        )
        growing = self.resolution
        if growing.start_size:
            full = self.data.image_size
            for name in ("start_size", "multiple"):
                fits = getattr(growing, name) % patch == 0
                require(fits, f"resolution.{name}", getattr(growing, name), f"a multiple of the patch size {patch}")
            whole = growing.start_size % growing.multiple == 0
            step = f"a multiple of resolution.multiple ({growing.multiple})"
            require(whole, "resolution.start_size", growing.start_size, step)
            require(growing.start_size <= full, "resolution.start_size", growing.start_size, f"at most {full} px")
            ends = f"at most train.epochs ({self.train.epochs})"
            require(growing.end_epoch <= self.train.epochs, "resolution.end_epoch", growing.end_epoch, ends)
        threshold, smoothing = self.loss.target_threshold, self.augment.label_smoothing
        if threshold is not None:
            # Where the data tells the number of classes it is unknown here: any threshold above 0 may do.
            share = smoothing / self.model.num_classes if self.model.num_classes else 0.0
            above = "above augment.label_smoothing / model.num_classes, which smoothing gives to every class"
            require(not smoothing or threshold > share, "loss.target_threshold", threshold, above)
        require(
            self.optim.warmup_epochs <= self.train.epochs,
            "optim.warmup_epochs",
            self.optim.warmup_epochs,
            f"at most train.epochs ({self.train.epochs})",
        )
