# SPDX-License-Identifier: Apache-2.0
"""``linear_act`` on the CPU: a product over packed weights with bias and activation in its epilogue.

In training the activation is torch's own operation, which saves its input or its result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core import registry, torch_ops
from ..shared import linear_cpu
from ..shared.definitions import activated

_fwd = torch_ops.define("linear_act_cpu_fwd", linear_cpu.product, linear_cpu.output, "CPU")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_kept: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _fwd(x, weight, bias, "none", False, is_kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_x = linear_cpu.multiply(grad, weight) if wants_x else None
        of_weight = linear_cpu.multiply(grad.t(), x) if wants_weight else None
        return of_x, of_weight, grad.sum(0) if wants_bias else None, None


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why products over packed weights cannot run this call."""
    x, needs_grad = args["x"], registry.needs_grad(*args.values())
    return linear_cpu.why_not(x, x.shape[-1:], args["weight_dtype"], needs_grad)


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, weight_dtype: torch.dtype | None
) -> Tensor:
    """See ``ctxfast.functional.linear_act``."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    needs_grad = registry.needs_grad(x, weight, bias)
    is_kept = linear_cpu.is_kept(weight, needs_grad)
    if needs_grad:
        out = activated(_Linear.apply(rows, weight, bias, is_kept), activation)
    else:
        forward = linear_cpu.product if torch_ops.is_direct(x, weight, bias) else _fwd
        out = forward(rows, weight, bias, activation, weight_dtype is torch.int8, is_kept)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    x = args["x"].reshape(-1, args["x"].shape[-1])
    given = (x, args["weight"], args["bias"], args["activation"], args["weight_dtype"] is torch.int8)
    calls = [(_fwd, (*given, True)), (_fwd, (*given, False))]
    return calls + [(linear_cpu.MULTIPLY, (x, args["weight"].t()))] if x.dtype is torch.float32 else calls
