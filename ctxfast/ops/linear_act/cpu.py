# SPDX-License-Identifier: Apache-2.0
"""``linear_act`` on the CPU: a product over packed weights with bias and activation in its epilogue.

The products are compiled ones (csrc/linear_act/linear_act.h); oneDNN's take weights that will not be met again,
which are not worth packing, and bfloat16 where they are faster. Packed weights are found again by later calls. In
float32 and int8 a row's bits do not depend on the rows beside it (torch's own float32 product takes another kernel for
few rows, and its sums another order).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..._core import capability, registry, torch_ops
from ..shared import packed_weights
from ..shared.definitions import activated

# activation -> oneDNN's post-operation and its algorithm
_POST = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "tanh": ("tanh", ""),
}


@lru_cache
def _tried(dtype: torch.dtype) -> str | None:
    """None, or why this build of torch cannot multiply by oneDNN's packed weights: the operators are torch's own."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN."
    try:
        x, weight = torch.ones(3, 4, dtype=dtype, device="cpu"), torch.eye(4, dtype=dtype, device="cpu")
        found = _product(x, torch.ops.mkldnn._reorder_linear_weight(weight, None), None, "none")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"oneDNN does not run packed products of {dtype} here ({str(error).splitlines()[0]})."
    return None if torch.equal(found, x) else f"oneDNN's packed product of {dtype} is wrong here."


@capability.constant
def _why_not(dtype: torch.dtype) -> str | None:
    return _tried(dtype)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    post, algorithm = _POST[activation]
    # One row alone takes a kernel that sums in another order.
    rows = x if x.shape[0] != 1 else x.expand(2, -1)
    return torch.ops.mkldnn._linear_pointwise(rows.contiguous(), packed, bias, post, [], algorithm)[: x.shape[0]]


def _compiled(
    x: Tensor, weight_dtype: str, packed: Tensor, scales: Tensor | None, sums: Tensor | None, bias: Tensor | None,
    activation: str, out: int,
) -> Tensor:  # fmt: skip
    """The compiled product over packed weights of "int8", "bfloat16" or "float32"."""
    x = x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch_ops.allocate((x.shape[0], out), x)
    capability.extension().linear_act_forward(
        x.shape[0], x.shape[1], out, weight_dtype, capability.DTYPE_NAMES[x.dtype], activation, x.data_ptr(),
        x.stride(0), packed.data_ptr(), 0 if scales is None else scales.data_ptr(),
        0 if sums is None else sums.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _output(x: Tensor, weight: Tensor) -> Tensor:
    return torch_ops.allocate((x.shape[0], weight.shape[0]), x)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, is_int8: bool, is_kept: bool) -> Tensor:
    if x.shape[0] == 0 or weight.shape[0] == 0:
        return _output(x, weight)
    if is_int8:
        packed, scales, sums = packed_weights.int8(weight)
        return _compiled(x, "int8", packed, scales, sums, bias, activation, weight.shape[0])
    if is_kept and x.shape[0] <= packed_weights.most_rows(x.dtype):
        packed = packed_weights.panels(weight)
        return _compiled(x, capability.DTYPE_NAMES[x.dtype], packed, None, None, bias, activation, weight.shape[0])
    # Packed for any number of rows.
    packed = weight.contiguous() if not is_kept else packed_weights.kept(weight, "oneDNN", _reordered)
    return _product(x, packed, None if bias is None else bias.contiguous(), activation)


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


_fwd = torch_ops.define("linear_act_cpu_fwd", _forward, _output, "CPU")


def _multiply_now(a: Tensor, b: Tensor) -> Tensor:
    if a.numel() == 0 or b.numel() == 0 or not torch.backends.mkldnn.is_available() or not capability.is_mkl_slow():
        return a @ b
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def _product_output(a: Tensor, b: Tensor) -> Tensor:
    return torch_ops.allocate((a.shape[0], b.shape[1]), a)


_mm = torch_ops.define("linear_act_cpu_mm", _multiply_now, _product_output, "CPU")


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``: float32 by oneDNN where torch would take MKL and MKL is slow. Other dtypes are oneDNN's already."""
    return a @ b if a.dtype is not torch.float32 or torch_ops.needs_definition(a, b) else _mm(a, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_kept: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _fwd(x, weight, bias, "none", False, is_kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_x = _multiply(grad, weight) if wants_x else None
        of_weight = _multiply(grad.t(), x) if wants_weight else None
        return of_x, of_weight, grad.sum(0) if wants_bias else None, None


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why products over packed weights cannot run this call."""
    x = args["x"]
    if x.device.type != "cpu":
        return f"it runs on the CPU and x is on {x.device}."
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16 and x is {x.dtype}."
    if x.shape[-1] == 0:
        return "there is nothing to multiply in rows without columns."
    if args["weight_dtype"] is not None and registry.needs_grad(*args.values()):
        return "its int8 product has no gradient."
    if args["weight_dtype"] is None:
        return _why_not(x.dtype)
    if x.shape[-1] > 65536:
        return f"its int8 sums take at most 65536 terms and x has {x.shape[-1]} columns."
    return None if capability.extension() is not None else capability.why_no_extension()


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, weight_dtype: torch.dtype | None
) -> Tensor:
    """See ``ctxfast.functional.linear_act``."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    needs_grad = registry.needs_grad(x, weight, bias)
    # A packed form pays from the second call on: not for a weight in training, nor for autocast's passing copy.
    is_kept = not (torch.is_autocast_enabled("cpu") or (needs_grad and weight.requires_grad))
    if needs_grad:
        out = activated(_Linear.apply(rows, weight, bias, is_kept), activation)
    else:
        forward = _forward if torch_ops.is_direct(x, weight, bias) else _fwd
        out = forward(rows, weight, bias, activation, weight_dtype is torch.int8, is_kept)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    x = args["x"].reshape(-1, args["x"].shape[-1])
    given = (x, args["weight"], args["bias"], args["activation"], args["weight_dtype"] is torch.int8)
    calls = [(_fwd, (*given, True)), (_fwd, (*given, False))]
    return calls + [(_mm, (x, args["weight"].t()))] if x.dtype is torch.float32 else calls
