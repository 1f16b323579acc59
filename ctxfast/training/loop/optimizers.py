# SPDX-License-Identifier: Apache-2.0
"""Optimisers that BERT was trained with and torch does not have, and the learning rate's course.

torch.optim.AdamW (fused on GPUs) is the optimiser wherever bias correction is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_ENDLESS = 2.0**60


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of a model as two groups: decayed, and not decayed (biases and normalisation).

    As in BERT's optimiser: parameters whose name holds "bias", "LayerNorm" or "layer_norm" are not decayed.
    """
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_free = any(text in name for text in ("bias", "LayerNorm", "layer_norm"))
            (free if is_free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


class _Moments(torch.optim.Optimizer):
    """First and second moment of each gradient, and an update made of them, over whole lists of tensors."""

    def __init__(
        self, params: Iterable, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        who = f"ctxfast.training.{type(self).__name__}"
        for name, value, low, high in (
            ("lr", lr, 0.0, float("inf")),
            ("betas[0]", betas[0], 0.0, 1.0),
            ("betas[1]", betas[1], 0.0, 1.0),
            ("eps", eps, 0.0, float("inf")),
            ("weight_decay", weight_decay, 0.0, float("inf")),
        ):
            if not low <= value <= high or (name.startswith("betas") and value == high):
                raise ValueError(f"{who}: {name} is {value}; expected {low} up to {high}.")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update. Gradients are float32 or lower; moments have the parameters' dtype."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            for parameter in params:
                if not self.state[parameter]:
                    self.state[parameter]["step"] = 0
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
                self.state[parameter]["step"] += 1
            grads = [parameter.grad.to(parameter.dtype) for parameter in params]
            first = [self.state[parameter]["exp_avg"] for parameter in params]
            second = [self.state[parameter]["exp_avg_sq"] for parameter in params]
            if _can_fuse(params, grads, first, second):
                self._step_fused(group, params, grads, first, second)
                continue
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            updates = self._updates(group, params, first, second)
            if group["weight_decay"]:
                torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            self._apply(group, params, updates)
        return loss

    def _step_fused(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], first: list[Tensor],
        second: list[Tensor],
    ) -> None:  # fmt: skip
        """The same by torch's kernel of AdamW, in one pass over all tensors of a group."""
        raise NotImplementedError

    def _updates(
        self, group: dict[str, Any], params: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> list[Tensor]:
        scale = torch._foreach_sqrt(second)
        torch._foreach_add_(scale, group["eps"])
        return list(torch._foreach_div(first, scale))

    def _apply(self, group: dict[str, Any], params: list[Tensor], updates: list[Tensor]) -> None:
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def _can_fuse(params: list[Tensor], *others: list[Tensor]) -> bool:
    """Whether torch's kernel takes these lists: on a GPU, where passes over memory are what a step takes. On a CPU the
    passes stay, and with them the bits."""
    if not params[0].is_cuda:
        return False
    kinds = {(type(each) in (Tensor, nn.Parameter), each.device, each.dtype) for each in params}
    same = all(
        type(each) in (Tensor, nn.Parameter) and each.stride() == own.stride() and each.dtype == own.dtype
        for tensors in others
        for each, own in zip(tensors, params)
    )
    return len(kinds) == 1 and kinds.pop()[0] and same


def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[float],
    lr: float,
    group: dict[str, Any],
    weight_decay: float,
) -> None:
    """AdamW's update of parameters and moments; ``steps``: each tensor's, for the correction of its bias."""
    at = {step: torch.full((), step, dtype=torch.float32, device=params[0].device) for step in set(steps)}
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        params, grads, first, second, [], [at[step] for step in steps],
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=group["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip


class BertAdam(_Moments):
    """AdamW without bias correction: ``w -= lr (m / (sqrt(v) + eps) + weight_decay w)``.

    The first updates are larger than AdamW's, which a warm-up makes up for. Use it where a published BERT recipe is to
    be repeated; newer recipes correct the bias (Zhang et al. 2021 found fine-tuning steadier with it).

    Args:
        params: parameters or groups, as ``parameter_groups`` makes them.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added outside the root.
        weight_decay: decoupled.

    Raises:
        ValueError: values out of range.

    Reference: Devlin et al. 2019, appendix A.2; google-research/bert, optimization.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def _step_fused(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], first: list[Tensor],
        second: list[Tensor],
    ) -> None:  # fmt: skip
        # After as many steps as these there is no bias left to correct.
        steps = [_ENDLESS] * len(params)
        _adamw(params, grads, first, second, steps, group["lr"], group, group["weight_decay"])


class Lamb(_Moments):
    """AdamW with a trust ratio per tensor, for large batches: ``w -= lr |w| / |u| u``, u as in Adam plus decay.

    Args:
        params, lr, betas, eps, weight_decay: as ``BertAdam``; moments are bias corrected.

    The ratio is 1 for a tensor whose weights or update are all zero, and for groups without weight decay (biases,
    normalisation), as in the original's release.

    Reference: You et al. 2020, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def _updates(
        self, group: dict[str, Any], params: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> list[Tensor]:
        steps = [self.state[parameter]["step"] for parameter in params]
        beta1, beta2 = group["betas"]
        scale = torch._foreach_sqrt(torch._foreach_div(second, [1 - beta2**step for step in steps]))
        torch._foreach_add_(scale, group["eps"])
        return list(torch._foreach_div(torch._foreach_div(first, [1 - beta1**step for step in steps]), scale))

    def _step_fused(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], first: list[Tensor],
        second: list[Tensor],
    ) -> None:  # fmt: skip
        steps = [float(self.state[parameter]["step"]) for parameter in params]
        # At a rate of -1, what AdamW makes of zeros is the update itself.
        updates = [torch.zeros_like(parameter) for parameter in params]
        _adamw(updates, grads, first, second, steps, -1.0, group, 0.0)
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        self._apply(group, params, updates)

    def _apply(self, group: dict[str, Any], params: list[Tensor], updates: list[Tensor]) -> None:
        if group["weight_decay"]:
            for update, own, change in zip(updates, torch._foreach_norm(params), torch._foreach_norm(updates)):
                # No wait for the device: the choice is made there.
                update.mul_(torch.where((own > 0) & (change > 0), own / change, torch.ones_like(own)))
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def share_of_rate(schedule: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Share of the learning rate at each step: up from 0 over the warm-up, then as ``schedule`` says.

    Args:
        schedule: "linear" or "cosine" (down to 0 at ``total_steps``) or "constant".
        warmup_steps: steps of the way up.
        total_steps: steps in all.

    The way down is measured from the warm-up's end, so there is no jump (Google's BERT measures it from step 0).

    Raises:
        ValueError: an unknown schedule, a warm-up longer than the run.
    """
    who = "ctxfast.training.share_of_rate"
    if schedule not in ("linear", "cosine", "constant"):
        raise ValueError(f"{who}: schedule is {schedule!r}; expected linear, cosine or constant.")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"{who}: warmup_steps is {warmup_steps}; expected 0 to total_steps = {total_steps}.")

    def share(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if schedule == "constant":
            return 1.0
        left = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
        return left if schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))

    return share
