# SPDX-License-Identifier: Apache-2.0
"""``feed_forward`` on the CPU: two products over packed weights, bias and activation in the first one's epilogue.

Training saves the first product with its bias; the activation is torch's own operation then, and the backward
recomputes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import registry, torch_ops
from ..shared import linear_cpu
from ..shared.definitions import activated, gated as gate
from . import definition

_aten = torch.ops.aten


def _output(x: Tensor, weight2: Tensor) -> Tensor:
    return linear_cpu.output(x, weight2)


def _forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str,
    is_int8: bool, gated: bool, is_kept1: bool, is_kept2: bool,
) -> Tensor:  # fmt: skip
    first = linear_cpu.gated_product if gated else linear_cpu.product
    wide = first(x, weight1, bias1, activation, is_int8, is_kept1)
    return linear_cpu.product(wide, weight2, bias2, "none", is_int8, is_kept2)


def _outputs(x: Tensor, weight1: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
    return linear_cpu.output(x, weight2), linear_cpu.output(x, weight1)


def _forward_and_product(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str,
    gated: bool, is_kept1: bool, is_kept2: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    product = linear_cpu.product(x, weight1, bias1, "none", False, is_kept1)
    return linear_cpu.product(_made(product, activation, gated), weight2, bias2, "none", False, is_kept2), product


def _made(product: Tensor, activation: str, gated: bool) -> Tensor:
    return gate(product, activation) if gated else activated(product, activation)


_fwd = torch_ops.define("feed_forward_cpu_fwd", _forward, _output, "CPU")
_fwd_and_product = torch_ops.define("feed_forward_cpu_fwd_and_product", _forward_and_product, _outputs, "CPU")


def _activation_backward(grad: Tensor, product: Tensor, activation: str) -> Tensor:
    """The activation's backward; ``product`` includes the bias."""
    if activation in ("gelu", "gelu_tanh"):
        return _aten.gelu_backward(grad, product, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "relu":
        return _aten.threshold_backward(grad, product, 0)
    if activation == "silu":
        return _aten.silu_backward(grad, product)
    return _aten.tanh_backward(grad, product.tanh()) if activation == "tanh" else grad


def _gate_backward(grad: Tensor, product: Tensor, activation: str) -> Tensor:
    """The same of ``activation(a) * b``, with the product's halves a and b."""
    a, b = product.chunk(2, dim=-1)
    return torch.cat((_activation_backward(grad * b, a, activation), grad * activated(a, activation)), dim=-1)


def backward(
    grad: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor, product: Tensor, activation: str, gated: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x (rows, N_in), weight1, bias1, weight2 and bias2, None for those not ``wanted``."""
    multiply = linear_cpu.multiply
    wants_x, wants_weight1, wants_bias1, wants_weight2, wants_bias2 = wanted
    grad_weight2 = multiply(grad.t(), _made(product, activation, gated)) if wants_weight2 else None
    grad_bias2 = grad.sum(0) if wants_bias2 else None
    if not (wants_x or wants_weight1 or wants_bias1):
        return None, None, None, grad_weight2, grad_bias2
    of_activation = _gate_backward if gated else _activation_backward
    grad_product = of_activation(multiply(grad, weight2), product, activation)
    grad_x = multiply(grad_product, weight1) if wants_x else None
    grad_weight1 = multiply(grad_product.t(), x) if wants_weight1 else None
    return grad_x, grad_weight1, grad_product.sum(0) if wants_bias1 else None, grad_weight2, grad_bias2


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
        activation: str, gated: bool, is_kept1: bool, is_kept2: bool,
    ) -> Tensor:  # fmt: skip
        out, product = _fwd_and_product(x, weight1, bias1, weight2, bias2, activation, gated, is_kept1, is_kept2)
        ctx.save_for_backward(x, weight1, bias1, weight2, bias2, product)
        ctx.activation, ctx.gated = activation, gated
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, product = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:5]
        if torch_ops.needs_definition(grad):
            grads = definition.gradients(given, ctx.activation, ctx.gated, wanted, grad)
        else:
            x, weight1, _, weight2, _ = given
            grads = backward(grad, x, weight1, weight2, product, ctx.activation, ctx.gated, wanted)
        return *grads, None, None, None, None


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why products over packed weights cannot run this call."""
    x, sizes = args["x"], (args["x"].shape[-1], args["weight2"].shape[-1])
    return linear_cpu.why_not(x, sizes, args["weight_dtype"], registry.needs_grad(*args.values()))


def feed_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    weight_dtype: torch.dtype | None,
    gated: bool,
) -> Tensor:
    """See ``ctxfast.functional.feed_forward``."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    needs_grad = registry.needs_grad(x, weight1, bias1, weight2, bias2)
    are_kept = linear_cpu.is_kept(weight1, needs_grad), linear_cpu.is_kept(weight2, needs_grad)
    if needs_grad:
        out = _FeedForward.apply(rows, weight1, bias1, weight2, bias2, activation, gated, *are_kept)
    else:
        forward = _forward if torch_ops.is_direct(x, weight1, bias1, weight2, bias2) else _fwd
        out = forward(rows, weight1, bias1, weight2, bias2, activation, weight_dtype is torch.int8, gated, *are_kept)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight2.shape[0])


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    x, is_int8 = args["x"].reshape(-1, args["x"].shape[-1]), args["weight_dtype"] is torch.int8
    given, gated = (x, *(args[name] for name in ("weight1", "bias1", "weight2", "bias2", "activation"))), args["gated"]
    calls = [(_fwd, (*given, is_int8, gated, True, False))]
    return calls if is_int8 else [*calls, (_fwd_and_product, (*given, gated, False, True))]
