"""Muon: momentum whose matrices are orthogonalised (Jordan et al., 2024)."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

__all__ = ["Muon", "MuonAdamW"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, Jordan's
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but matrices of one shape are worked on together, and
    a filter (out, in, h, w) counts as the matrix (out, in x h x w): torch's own takes no 1 x 1 convolutions.

    Updates have the root mean square of AdamW's (Liu et al., 2025): the two share a learning rate and weight decay.

    As with torch's fused optimizers, a step changes nothing where the attribute `found_inf` (a float32 scalar on the
    device) is 1, whatever the gradients are.
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
            if bad is not None:  # an average that moves towards itself stays as it is
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
    """(n, rows, columns) -> about the nearest semi-orthogonal matrices, singular values within about 0.7 to 1.2.

    Newton-Schulz iterations, in bf16 where the device has it in hardware.
    """
    a, b, c = _COEFFICIENTS
    fast = matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.to(torch.bfloat16 if fast else torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW, each for its own parameters, as one optimizer; `param_groups` are Muon's, then AdamW's."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.parts = {"muon": muon, "adamw": adamw}
        super().__init__(self._groups(), {})  # the parts' own dicts: a rate set in one is set in the other

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
