"""The sections of a config: frozen dataclasses, validated when they are made; see `sdpnet.config.load` for the
files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from sdpnet.model.options import MODELS, ModelOptions, Position, Stem, create_model_options
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
    """Section `model`: a model by name, and the parts of its shape that differ from that name's.

    Attributes:
        name: The model whose shape is the starting point.
        num_classes: The number of classes; null takes the shard set's.

    The other keys are those of `sdpnet.model.options.ModelOptions`; null keeps the named model's own value.
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
    stem: Stem | None = None
    qk_norm: bool | None = None
    patch_dropout: float | None = None

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            raise UserError(f"model.name = {self.name!r}: {nearest(self.name, MODELS)}")
        self.options(num_classes=self.num_classes or 1000)

    def options(self, num_classes: int) -> ModelOptions:
        overrides = {k: v for k, v in asdict(self).items() if v is not None and k not in ("name", "num_classes")}
        return create_model_options(self.name, num_classes=num_classes, **overrides)


@dataclass(frozen=True)
class OptimOptions:
    """Section `optim`: the optimizer, the learning rate and its schedule.

    Attributes:
        name: `adamw`, or `muon`: Muon for the blocks' matrices and AdamW for everything else. `nadamuon` takes timm's
            AdaMuon with Nesterov momentum (Si et al., 2025) in place of Muon, with the second of `betas`; on a GPU, the
            host then waits for the device in each step.
        lr: The peak learning rate at a global batch of `lr_reference_batch` images.
        lr_reference_batch: The global batch for which `lr` is meant. The rate in use is `lr` times the global batch
            divided by this number; 0 uses `lr` as it is.
        min_lr: The learning rate at the end of a cosine cycle.
        weight_decay: Weight decay of matrices and filters; norms, biases and tokens have none.
        betas: Adam's decay rates of the first and second moment.
        eps: Adam's term that keeps the denominator from being zero.
        clip_grad_norm: The largest norm of all gradients together; longer ones are scaled down to it. 0 is off.
        layer_decay: The learning rate of a layer as a factor of the rate of the layer above it (BEiT); 1 gives all
            layers the same rate.
        schedule: What follows the warm-up. `restarts`: cosine annealing with warm restarts (Loshchilov & Hutter, 2016).
            `cosine`: one cosine cycle to the end; the keys of the restarts have no effect. `constant`: the peak rate to
            the end.
        warmup_epochs: Epochs in which the rate rises linearly to its peak; at most `train.epochs`.
        restart_epochs: Epochs of the first cycle of `restarts`; 0 is a single cycle to the end.
        restart_factor: How many times as long as the cycle before it each further cycle is.
    """

    name: Literal["adamw", "muon", "nadamuon"] = "adamw"
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
    """Section `resolution`: the sizes of the training images, which can grow. Evaluation uses `data.image_size`.

    Attributes:
        start_size: Pixels a side of the training images at the beginning, a multiple of `multiple` and of the model's
            patch size; 0 trains at the final size from the start.
        begin_epoch: The epoch from which on the images grow, linearly; before it they have `start_size`.
        end_epoch: The epoch from which on they have the final size; at most `train.epochs`.
        multiple: The sizes in between are rounded to a multiple of so many pixels, itself a multiple of the patch size.
        end_size: Pixels a side of the training images at the end, a multiple of the patch size and at most
            `data.image_size`; 0 is `data.image_size`. Random crops show objects larger than evaluation does, so that
            training at a smaller size than evaluation costs less and can score higher (Touvron et al., 2019).
    """

    start_size: int = 0
    begin_epoch: int = 0
    end_epoch: int = 1
    multiple: int = 32
    end_size: int = 0

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
        require(self.end_size >= 0, "resolution.end_size", self.end_size, "0 (data.image_size) or more")


@dataclass(frozen=True)
class EmaOptions:
    """Section `ema`: the exponential moving average of the weights, which is evaluated beside them and is what a
    finished run publishes.

    Attributes:
        decay: The share of the average that each step keeps, such as 0.9999; 0 keeps no average.
        warmup: Whether the decay of the first steps is lower, so that the average forgets the weights' random start.
    """

    decay: float = 0.0
    warmup: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, "ema.decay", self.decay, "in [0, 1)")


@dataclass(frozen=True)
class LossOptions:
    """Section `loss`: what is minimised. Label smoothing is `augment.label_smoothing`.

    Attributes:
        kind: `ce`: cross entropy over the classes. `bce`: a binary cross entropy for each class.
        target_threshold: For `bce` only: targets above it become 1 and the others 0. Null keeps soft targets.
        sum_classes: For `bce` only: take the sum over the classes instead of their mean.
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
    """Section `train`: the training loop, its checkpoints, and how a step is computed.

    Attributes:
        epochs: Passes over the training split.
        full_patch_epochs: The last epochs of the training, in which `model.patch_dropout` is off, so that the encoder
            learns from as many patches as it gets in evaluation; at most `epochs`.
        start_from: The weights that a new run begins with: another run, a checkpoint of it or a `model.safetensors`
            (see `sdpnet.training.finetune`). Empty starts from random weights.
        other_classes: What happens when the shard set's classes, by name and order, are not those that a resumed run or
            `start_from` was trained on. `refuse` is an error. `keep` keeps the head, so that class 3 stays class 3
            whatever its name. `new_head` (for `start_from` only) starts the head's last layer anew, which also happens
            whenever the number of classes differs.
        accumulate: Batches whose gradients are added up before the optimizer takes a step.
        micro_batch: Images of one forward and backward pass; a batch is split into passes of at most this size. Null
            takes the whole batch, and `auto` what fits into the GPU's memory.
        on_nonfinite: What follows a step whose loss or gradient is not finite. The model never takes such a step.
            `stop` ends the run, `skip` goes on with the next batch, and `rollback` loads the newest checkpoint and
            goes on with the next batch.
        max_nonfinite: The number of bad steps within 1,000 that `skip` and `rollback` tolerate; one more ends the run.
        sync_batch_norm: Whether batch norm computes its statistics over the images of all processes.
        checkpoint_activations: Keep only the blocks' inputs for the backward pass and compute the rest again: less
            memory, more time.
        compile: Whether torch.compile compiles the blocks; `auto` does on GPUs of compute capability 8.0 and more.
        memory_format: The layout of images and convolutions; `probe` times both at the start and takes the faster one.
        depthwise: Whose depthwise convolution the conv blocks use. `auto` times PyTorch's and our Triton kernel once on
            a GPU and takes the faster one; elsewhere it is PyTorch's.
        conv_block: Who computes batch norm, GELU and the residual sum of the conv blocks in training. `auto` times
            PyTorch's and our Triton kernels, which include the depthwise convolution, once on a GPU and takes the
            faster one; elsewhere it is PyTorch's.
        patch: How the patch embedding is computed: as a convolution, or as a copy and one matrix product. `auto` times
            both once on a GPU and takes the faster one; elsewhere it is the convolution.
        attention: Whose attention the transformer blocks use. `auto` times PyTorch's and our Triton kernel once on a
            GPU and takes the faster one; elsewhere it is PyTorch's. Our kernel is for bf16 or fp16, at most 256 tokens
            and heads of at most 64 channels; images with more tokens take PyTorch's.
        mlp: How the feed-forward parts of the transformer blocks are computed. `torch`: by PyTorch. `triton`: bias,
            GELU and dropout are one kernel of ours. `auto` times both once on a GPU and takes the faster one; elsewhere
            it is PyTorch's.
        update: Who updates weights and average. `triton` clips, steps and averages in one pass over the weights. `auto`
            times it and PyTorch's update once on a GPU and takes the faster one; elsewhere it is PyTorch's.
        fp8: Whether the linear layers of the transformer blocks multiply in float8, by torchao. `off` keeps `amp`'s
            arithmetic. `tensorwise` has one scale for each tensor, `rowwise` one for each row. `auto` times a block
            with each of them on GPUs of compute capability 8.9 and more and takes the fastest. Evaluation and the
            average do not use float8.
        device: Where to train; `auto` is the GPU where there is one.
        amp: The arithmetic of mixed precision. `auto` is bf16 on GPUs that compute it, fp16 with a gradient scaler on
            older ones, and fp32 on the CPU.
        log_interval: Steps between two log lines.
        eval_interval: Epochs between two evaluations. The last epoch is always evaluated.
        checkpoint_interval: Steps between two checkpoints, besides the one at the end of each epoch; 0 writes only
            those.
        keep_checkpoints: The number of newest checkpoints that are kept.
        keep_best: Whether the checkpoint with the best top-1 is kept as well (the average's top-1 where `ema` is on).
        async_checkpoints: Whether a thread writes the checkpoints while training goes on.
        timeout_seconds: Seconds after which a process that waits for the others ends with an error. It must be longer
            than writing a checkpoint takes, because the other processes may have to wait for that.
    """

    epochs: int = 10
    full_patch_epochs: int = 0
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
    conv_block: Literal["auto", "torch", "triton"] = "auto"
    patch: Literal["auto", "convolution", "product"] = "auto"
    attention: Literal["auto", "torch", "triton"] = "auto"
    mlp: Literal["auto", "torch", "triton"] = "auto"
    update: Literal["auto", "torch", "triton"] = "auto"
    fp8: Literal["off", "auto", "tensorwise", "rowwise"] = "off"
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
        most = f"0 to train.epochs ({self.epochs})"
        require(0 <= self.full_patch_epochs <= self.epochs, "train.full_patch_epochs", self.full_patch_epochs, most)
        allowed = self.micro_batch is None or self.micro_batch == "auto" or self.micro_batch >= 1
        require(allowed, "train.micro_batch", self.micro_batch, "auto, null or at least 1")
        longest = 10_000_000  # about 116 days; torch counts in a fixed number of bits
        require(1 <= self.timeout_seconds <= longest, "train.timeout_seconds", self.timeout_seconds, f"1 to {longest}")
        require(self.max_nonfinite >= 0, "train.max_nonfinite", self.max_nonfinite, "0 or more")
        require(
            self.checkpoint_interval >= 0,
            "train.checkpoint_interval",
            self.checkpoint_interval,
            "0 (epochs' ends) or more",
        )


@dataclass(frozen=True)
class LogOptions:
    """Section `log`: what a run writes in addition to `metrics.jsonl`.

    Attributes:
        tensorboard: Whether to write TensorBoard events to RUN/tensorboard.
        wandb: The name of a Weights & Biases project; empty is off. With WANDB_MODE=offline in the environment, the
            figures stay on this machine.
        profile: The first step and the number of steps of which a trace is written to RUN/trace.json; [0, 0] is off.
            Steps count from 1 at the start of the process; the step before the first one warms the profiler up.
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
    """One training run, resolved: its sections, and the seed.

    Attributes:
        seed: Decides the weights' random start and every draw of the plan.
    """

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
        full = growing.end_size or self.data.image_size
        largest = f"a multiple of the patch size {patch}, at most data.image_size ({self.data.image_size})"
        fits = full % patch == 0 and full <= self.data.image_size
        require(fits, "resolution.end_size", growing.end_size, largest)
        if growing.start_size:
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
