"""The update at the end of a step in two passes over the weights, by Triton kernels.

    norm    reads the gradients
    update  reads weights, gradients, both moments and averages; writes all of them but the gradients

PyTorch's fused AdamW reads and writes the weights in one pass, and the average takes another one. The kernels take the
state of the optimizer and of the average as PyTorch keeps it, so checkpoints are the same with either.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from sdpnet.optim.ema import ModelEma
from sdpnet.optim.muon import MuonAdamW
from sdpnet.optim.optimizer import step_unless
from sdpnet.pipelines import triton_support
from sdpnet.pipelines.errors import UserError

__all__ = ["LAUNCH", "TritonUpdate", "runs_on"]

_LEAST_CAPABILITY = (8, 0)
# The values of a block, the blocks of a program, and the warps of a program.
LAUNCH: Final = {"BLOCK": 1024, "BLOCKS": 4, "num_warps": 4}
_ROWS: Final = 256  # the tensors in a program that prepares their rates


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on `device`: an NVIDIA GPU of compute capability 8.0 or more, with Triton installed."""
    return triton_support.runs_on(device, _LEAST_CAPABILITY, _kernels)


@functools.cache
def _kernels() -> Any:
    """The module with the kernels, or None if Triton cannot be imported."""
    modules = triton_support.import_kernels("sdpnet.optim.update_kernel")
    return None if modules is None else modules[0]


@dataclass
class _Tables:
    """What the kernels need to find the tensors. It is made anew when a tensor has moved.

    The rows are the tensors: first the parameters of AdamW that have a gradient, then the other parameters, then the
    buffers.

    Attributes:
        gradients: which of the parameters have a gradient.
        addresses: those of the tensors that stay from step to step, in the order of `TritonUpdate._fixed`.
        updated: the parameters of the first rows, with their groups.
        parameters: the parameters of the next rows.
        chunks: int32 (chunks, 2), see `update_kernel`.
        fixed: int64 (6, rows), the number of values of each tensor and the addresses of its values, its moments, its
            step count and its average; 0 where it has none.
        given: int64, renewed at each step: the addresses of the gradients, then the numbers of `prepare_kernel` as the
            bits of float64.
        rates: float32 (3, updated).
        partial: float32, the sum of each chunk of the parameters' gradients.
        with_adamw: the number of chunks that AdamW updates, the first ones.
    """

    gradients: list[bool]
    addresses: list[int]
    updated: list[tuple[nn.Parameter, dict[str, Any]]]
    parameters: list[nn.Parameter]
    chunks: torch.Tensor
    fixed: torch.Tensor
    given: torch.Tensor
    rates: torch.Tensor
    partial: torch.Tensor
    with_adamw: int


class TritonUpdate:
    """The update by Triton kernels, as `sdpnet.optim.update.Update`.

    Results differ from PyTorch's by rounding only: the norm is summed in another order, and AdamW's sums are float32
    where PyTorch's fused kernel takes some of them in float64. The average of equal weights is equal to the last bit to
    the one that `ModelEma` computes on a CPU. Muon's part of an optimizer is PyTorch's.

    Args:
        optimizer: of `make_optimizer`, with fused AdamW, whose step counts are on the device.
        ema: the average of `model`, or None.
        clip_grad_norm: the largest norm that the gradients keep; 0 does not clip. AdamW's gradients are clipped as they
            are read, so `.grad` keeps the values from before.
        launch: see `LAUNCH`.

    Raises:
        UserError: the tensors are not as the kernels need them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: ModelEma | None,
        clip_grad_norm: float,
        launch: dict[str, int] | None = None,
    ) -> None:
        self.ema, self.clip_grad_norm, self.launch = ema, clip_grad_norm, dict(launch or LAUNCH)
        parts: dict[str, Any] = optimizer.parts if isinstance(optimizer, MuonAdamW) else {"adamw": optimizer}
        self.adamw: Any = parts["adamw"]
        self.muon: Any = parts.get("muon")
        self._parameters = list(model.parameters())
        averaged = dict(ema.module.state_dict()) if ema is not None else {}
        self._averages = {
            id(value): averaged[name]
            for name, value in (*model.named_parameters(), *model.named_buffers())
            if name in averaged and value.is_floating_point()
        }
        persistent = model.state_dict().keys()
        buffers = [(name, value) for name, value in model.named_buffers() if name in persistent]
        self._buffers = [value for _, value in buffers if id(value) in self._averages]
        self._copied = [
            (averaged[name], value) for name, value in buffers if name in averaged and not value.is_floating_point()
        ]
        self._require_what_the_kernels_take()
        self._tables: _Tables | None = None
        device = self._parameters[0].device
        self._clip, self._weight = torch.ones((), device=device), torch.zeros((), device=device)

    def _require_what_the_kernels_take(self) -> None:
        if not isinstance(self.adamw, torch.optim.AdamW) or not self.adamw.defaults["fused"]:
            raise UserError("needs the fused AdamW of PyTorch")
        if any(self.adamw.defaults[name] for name in ("amsgrad", "maximize")):
            raise UserError("does not know AdamW's options amsgrad and maximize")
        if len({(*group["betas"], group["eps"]) for group in self.adamw.param_groups}) > 1:
            raise UserError("needs the same betas and eps for all parameters")
        for value in (*self._parameters, *self._buffers):
            average = self._averages.get(id(value), value)
            if value.dtype != torch.float32 or average.dtype != torch.float32:
                raise UserError("needs weights in float32")
            if not _dense(value) or not _same_order(value, average):
                raise UserError("needs weights and averages that lie in memory in the same order and without gaps")
            if value.data_ptr() % 16 or average.data_ptr() % 16:
                raise UserError("needs weights and averages at addresses that are multiples of 16")

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        tables = self._current()
        gradients = [parameter.grad for parameter, _ in tables.updated]
        gradients += [parameter.grad for parameter in tables.parameters]
        self._give(tables, gradients)
        sizes = tables.fixed[0]
        with torch.cuda.device_of(sizes):
            if len(tables.partial):
                _kernels().square_sum_kernel[(len(tables.partial),)](
                    tables.chunks, tables.given, sizes, tables.partial, ALIGNED=self._aligned, **self.launch
                )
        norm = tables.partial.sum(dtype=torch.float64).sqrt().float()
        if self.clip_grad_norm > 0:
            self._clip = torch.clamp(self.clip_grad_norm / (norm + 1e-6), max=1.0)  # as torch's clip_grad_norm_
            others = [gradient for gradient in gradients[len(tables.updated) :] if gradient is not None]
            if others:
                torch._foreach_mul_(others, self._clip)
        return norm

    @torch.no_grad()
    def step(self, bad: torch.Tensor) -> None:
        tables = self._tables
        assert tables is not None, "grad_norm comes first"
        if self.muon is not None:
            step_unless(self.muon, bad)
        if self.ema is not None:
            self._weight = self.ema.count(bad.device, bad)
        count = len(tables.updated)
        numbers = tables.given[tables.fixed.shape[1] :].view(torch.float64)
        if count:
            with torch.cuda.device_of(bad):
                _kernels().prepare_kernel[(-(-count // _ROWS),)](
                    tables.fixed[4], numbers, tables.rates, bad, count, BLOCK=_ROWS
                )
            self._launch(tables, bad, tables.chunks[: tables.with_adamw], adamw=True)
        if self.ema is not None:
            self._launch(tables, bad, tables.chunks[tables.with_adamw :], adamw=False)

    @torch.no_grad()
    def average(self, bad: torch.Tensor) -> None:
        """Copies what is not averaged, such as counts of batches: `step` has averaged the rest."""
        for dtype in {average.dtype for average, _ in self._copied}:
            pairs = [pair for pair in self._copied if pair[0].dtype == dtype]
            torch._foreach_copy_([average for average, _ in pairs], [value for _, value in pairs])

    def _launch(self, tables: _Tables, bad: torch.Tensor, chunks: torch.Tensor, *, adamw: bool) -> None:
        if not len(chunks):
            return
        sizes, values, firsts, seconds, _, averages = tables.fixed
        group = self.adamw.param_groups[0]
        (beta1, beta2), eps = group["betas"], group["eps"]
        with torch.cuda.device_of(bad):
            _kernels().update_kernel[(len(chunks),)](
                chunks,
                sizes,
                values,
                tables.given,
                firsts,
                seconds,
                averages,
                tables.rates,
                self._clip,
                self._weight,
                bad,
                len(tables.updated),
                float(beta1),
                1.0 - beta1,
                float(beta2),
                1.0 - beta2,
                float(eps),
                ADAMW=adamw,
                AVERAGE=self.ema is not None,
                ALIGNED=self._aligned,
                enable_fp_fusion=False,  # so the average is the one of torch's separate operations
                **self.launch,
            )

    def _fixed(self) -> list[torch.Tensor]:
        """The tensors that stay from step to step, unless a checkpoint is loaded. A parameter without moments has none
        here."""
        tensors: list[torch.Tensor] = []
        for parameter in self._parameters:
            tensors.append(parameter)
            state = self.adamw.state.get(parameter)
            if state:
                tensors += (state["exp_avg"], state["exp_avg_sq"], state["step"])
        return [*tensors, *self._buffers, *self._averages.values()]

    def _current(self) -> _Tables:
        gradients = [parameter.grad is not None for parameter in self._parameters]
        tables = self._tables
        if tables is None or tables.gradients != gradients or tables.addresses != _addresses(self._fixed()):
            tables = self._tables = self._make_tables(gradients)
        return tables

    def _make_tables(self, gradients: list[bool]) -> _Tables:
        updated = [
            (parameter, group)
            for group in self.adamw.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        known = {id(parameter) for parameter, _ in updated}
        parameters = [parameter for parameter in self._parameters if id(parameter) not in known]
        tensors = [*(parameter for parameter, _ in updated), *parameters, *self._buffers]
        for parameter, _ in updated:
            self._prepare_state(parameter)
        fixed, chunks = [], []
        per_chunk = self.launch["BLOCK"] * self.launch["BLOCKS"]
        for row, tensor in enumerate(tensors):
            state = self.adamw.state[tensor] if row < len(updated) else {}
            kept = [tensor, *(state.get(name) for name in ("exp_avg", "exp_avg_sq", "step"))]
            kept.append(self._averages.get(id(tensor)))
            fixed.append([tensor.numel(), *(0 if value is None else value.data_ptr() for value in kept)])
            chunks += [(row, number) for number in range(-(-tensor.numel() // per_chunk))]
        device = self._clip.device
        rows, count = len(tensors), len(updated)
        num_parameters = count + len(parameters)
        return _Tables(
            gradients=gradients,
            addresses=_addresses(self._fixed()),
            updated=updated,
            parameters=parameters,
            chunks=torch.tensor(chunks, dtype=torch.int32).reshape(-1, 2).to(device),
            fixed=torch.tensor(fixed, dtype=torch.int64).t().contiguous().to(device),
            given=torch.zeros(rows + 2 + 2 * count, dtype=torch.int64, device=device),
            rates=torch.zeros((3, count), device=device),
            partial=torch.zeros(sum(row < num_parameters for row, _ in chunks), device=device),
            with_adamw=sum(row < count for row, _ in chunks),
        )

    def _prepare_state(self, parameter: nn.Parameter) -> None:
        """Makes AdamW's state of a parameter as AdamW does, or lays a loaded one out as the kernels need it."""
        state = self.adamw.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for name in ("exp_avg", "exp_avg_sq"):
            if not _same_order(state[name], parameter) or state[name].data_ptr() % 16:
                state[name] = torch.empty_like(parameter).copy_(state[name])

    def _give(self, tables: _Tables, gradients: list[torch.Tensor | None]) -> None:
        """Sends this step's addresses and learning rates to the device, in one copy that the host does not wait for.

        The gradients are new tensors in each step. torch does not use the host's memory again before it is copied.
        """
        for parameter, gradient in zip(
            [*(parameter for parameter, _ in tables.updated), *tables.parameters], gradients, strict=True
        ):
            if gradient is not None and gradient.stride() != parameter.stride():
                assert _same_order(gradient, parameter), "autograd lays gradients out as their parameters"
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        self._aligned = not any(address % 16 for address in addresses)
        group = self.adamw.param_groups[0]
        numbers = [math.log2(beta) if beta > 0 else -math.inf for beta in group["betas"]]
        numbers += [group["lr"] for _, group in tables.updated]
        numbers += [group["lr"] * group["weight_decay"] for _, group in tables.updated]
        given = torch.zeros(len(tables.given), dtype=torch.int64, pin_memory=tables.given.is_cuda)
        given[: len(addresses)] = torch.tensor(addresses, dtype=torch.int64)
        given[-len(numbers) :] = torch.tensor(numbers, dtype=torch.float64).view(torch.int64)
        tables.given.copy_(given, non_blocking=True)


def _addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _same_order(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether the values of two tensors of one shape lie in memory in the same order."""
    return all(
        ours == theirs
        for size, ours, theirs in zip(first.shape, first.stride(), second.stride(), strict=True)
        if size != 1
    )


def _dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values lie in memory without gaps and overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
