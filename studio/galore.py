"""GaLore: AdamW that keeps the moments of a matrix in a few directions of its gradient.

Jiawei Zhao, Zhenyu Zhang, Beidi Chen, Zhangyang Wang, Anima Anandkumar, Yuandong Tian: GaLore: Memory-Efficient LLM
Training by Gradient Low-Rank Projection, 2024, arXiv:2403.03507.

    G = U S V',    wide:  W <- W - lr scale P adam(P' G),  P = U[:, :rank]
                   tall:  W <- W - lr scale adam(G P) P',  P = V[:, :rank]

P is taken anew from the gradient every ``every`` steps; the moments go on, as in the authors' code. A matrix o x i
holds rank * (2 max + min) numbers of state instead of 2 o i, with max, min of o and i. What has a side of ``rank`` or
less (vectors, small kernels, the thin factors of LoRA) is plain AdamW. In stacks of matrices each has a P of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class GaLore(torch.optim.Optimizer):
    """AdamW with low-rank moments.

    Args:
        groups: parameters, as of every optimiser.
        lr: learning rate.
        weight_decay: of groups that do not set their own; decoupled.
        rank: directions that are kept.
        every: steps between new directions.
        scale: factor of the projected step.
        betas: of the moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float,
        weight_decay: float,
        rank: int,
        every: int,
        scale: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        self.rank, self.every, self.scale = rank, every, scale
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Takes a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(group["lr"] * self._change(group, parameter, parameter.grad))

    def _change(self, group: dict[str, Any], parameter: Tensor, slope: Tensor) -> Tensor:
        """What is taken off a parameter, before the learning rate."""
        state = self.state[parameter]
        state["step"] = state.get("step", torch.zeros(())) + 1
        step = int(state["step"])
        low = parameter.dim() > 1 and min(parameter.shape[-2:]) > self.rank
        if low and (step - 1) % self.every == 0:
            state["directions"] = self._directions(slope)
        if low:
            slope = self._down(slope, state["directions"])
        if step == 1:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(slope), torch.zeros_like(slope)
        (beta1, beta2), first, second = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(slope, 1 - beta1)
        second.mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
        change = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + group["eps"])
        return self.scale * self._up(change, state["directions"], parameter) if low else change

    def _directions(self, slope: Tensor) -> Tensor:
        """P, (..., smaller side, rank)."""
        left, _, right = torch.linalg.svd(slope.float(), full_matrices=False)
        found = right.mT if _tall(slope) else left
        return found[..., : self.rank].to(slope.dtype).contiguous()

    def _down(self, slope: Tensor, directions: Tensor) -> Tensor:
        return slope @ directions if _tall(slope) else directions.mT @ slope

    def _up(self, change: Tensor, directions: Tensor, like: Tensor) -> Tensor:
        return change @ directions.mT if _tall(like) else directions @ change


def _tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] >= matrix.shape[-1]
