"""Muon: momentum with orthogonalised matrices (Jordan et al., 2024)."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

__all__ = ["Muon", "MuonAdamW"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients of the quintic iteration
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, and two differences.

    Matrices of one shape are orthogonalised together, in one batched product instead of many small ones. A filter
    (out, in, h, w) is treated as the matrix (out, in x h x w), because torch's Muon does not accept 1 x 1 convolutions.

    Updates have the same root mean square as those of AdamW (Liu et al., 2025), so the two share a learning rate and a
    weight decay.

    As in torch's fused optimizers, a step changes nothing if the attribute `found_inf` (a float32 scalar on the device)
    is 1, whatever the gradients are. The host does not wait for this value.
    """

    found_inf: torch.Tensor | None = None

    def __init__(self, params: Any, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            gradients = [p.grad for p in parameters]
            averages = [self.state[p]["momentum"] for p in parameters]
            bad = None if self.found_inf is None else self.found_inf.bool()
            # A bad step must not change any state, and the host does not know yet whether this step is bad. So the
            # arithmetic always runs, on values that have no effect: an average that moves towards itself stays as it
            # is, a decay factor of 1 and an update of 0 change no parameter. Multiplying by 0 would not do, because NaN
            # times 0 is NaN.
            if bad is not None:
                gradients = [torch.where(bad, average, g) for g, average in zip(gradients, averages, strict=True)]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov's
            decay = 1 - group["lr"] * group["weight_decay"]
            torch._foreach_mul_(parameters, decay if bad is None else torch.where(bad, 1.0, decay))
            alike: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
            for parameter, update in zip(parameters, updates, strict=True):
                matrix = update.flatten(1)
                alike[matrix.shape].append((parameter, matrix))
            for shape, pairs in alike.items():
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                matrices = orthogonalize(torch.stack([matrix for _, matrix in pairs]))
                if bad is not None:
                    matrices = torch.where(bad, torch.zeros_like(matrices), matrices)
                for (parameter, _), matrix in zip(pairs, matrices, strict=True):
                    parameter.add_(matrix.view(parameter.shape), alpha=-rate)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Approximates the nearest semi-orthogonal matrices: (n, rows, columns) -> the same shape and dtype.

    The singular values of the result are within about 0.7 to 1.2. Newton-Schulz iterations need products only; they are
    computed in bfloat16 if the device has it in hardware, else in float32.
    """
    a, b, c = _COEFFICIENTS
    fast = matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.to(torch.bfloat16 if fast else torch.float32)
    tall = x.shape[1] > x.shape[2]  # the Gram matrix of the shorter side is the smaller one
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW for different parameters, as one optimizer. `param_groups` lists Muon's groups, then AdamW's."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.AdamW) -> None:
        self.parts = {"muon": muon, "adamw": adamw}
        super().__init__(self._groups(), {})  # the dicts are shared, so a learning rate set here is set in the part

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = self._groups()
