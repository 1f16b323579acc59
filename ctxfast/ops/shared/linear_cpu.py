# SPDX-License-Identifier: Apache-2.0
"""Products over packed weights on the CPU, bias and activation in the epilogue, for the ops that are made of them.

The products are compiled ones (csrc/linear_act/linear_act.h); oneDNN's take weights that will not be met again,
which are not worth packing, and bfloat16 where they are faster. Packed weights are found again by later calls. In
float32 and int8 a row's bits do not depend on the rows beside it (torch's own float32 product takes another kernel for
few rows, and its sums another order).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..._core import capability, torch_ops
from . import packed_weights
from .definitions import gated

# activation -> oneDNN's post-operation and its algorithm
_POST = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "tanh": ("tanh", ""),
    "silu": ("swish", ""),
}


@lru_cache
def _tried(dtype: torch.dtype) -> str | None:
    """None, or why this build of torch cannot multiply by oneDNN's packed weights: the operators are torch's own."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN."
    try:
        x, weight = torch.ones(3, 4, dtype=dtype, device="cpu"), torch.eye(4, dtype=dtype, device="cpu")
        found = _onednn(x, torch.ops.mkldnn._reorder_linear_weight(weight, None), None, "none")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"oneDNN does not run packed products of {dtype} here ({str(error).splitlines()[0]})."
    return None if torch.equal(found, x) else f"oneDNN's packed product of {dtype} is wrong here."


@capability.constant
def _why_no_onednn(dtype: torch.dtype) -> str | None:
    return _tried(dtype)


def why_not(x: Tensor, sizes: Sequence[int], weight_dtype: torch.dtype | None, needs_grad: bool) -> str | None:
    """None, or why products of rows like those of ``x``, whose sums have ``sizes`` terms, cannot run here."""
    if x.device.type != "cpu":
        return f"it runs on the CPU and x is on {x.device}."
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16 and x is {x.dtype}."
    if 0 in sizes:
        return "there is nothing to multiply in rows without columns."
    if weight_dtype is not None and needs_grad:
        return "its int8 product has no gradient."
    if weight_dtype is None:
        return _why_no_onednn(x.dtype)
    if max(sizes) > 65536:
        return f"its int8 sums take at most 65536 terms and rows have {max(sizes)} columns."
    return None if capability.extension() is not None else capability.why_no_extension()


def is_kept(weight: Tensor, needs_grad: bool) -> bool:
    """Whether a packed form pays, from the second call on: not for a weight in training, nor for autocast's passing
    copy."""
    return not (torch.is_autocast_enabled("cpu") or (needs_grad and weight.requires_grad))


def _onednn(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    post, algorithm = _POST[activation]
    # One row alone takes a kernel that sums in another order.
    rows = x if x.shape[0] != 1 else x.expand(2, -1)
    return torch.ops.mkldnn._linear_pointwise(rows.contiguous(), packed, bias, post, [], algorithm)[: x.shape[0]]


def _compiled(
    x: Tensor, weight_dtype: str, packed: Tensor, scales: Tensor | None, sums: Tensor | None, bias: Tensor | None,
    activation: str, out: int, is_gated: bool,
) -> Tensor:  # fmt: skip
    """The compiled product over packed weights of "int8", "bfloat16" or "float32"; ``out``: rows of the weight."""
    x = x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch_ops.allocate((x.shape[0], out // 2 if is_gated else out), x)
    capability.extension().linear_act_forward(
        x.shape[0], x.shape[1], out, weight_dtype, capability.DTYPE_NAMES[x.dtype], activation, is_gated,
        x.data_ptr(), x.stride(0), packed.data_ptr(), 0 if scales is None else scales.data_ptr(),
        0 if sums is None else sums.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def output(x: Tensor, weight: Tensor) -> Tensor:
    return torch_ops.allocate((x.shape[0], weight.shape[0]), x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, is_int8: bool, is_kept: bool) -> Tensor:
    """``activation(x W^T + b)`` of x (rows, N_in). ``is_kept``: the packed weight is, for later calls."""
    return _product(x, weight, bias, activation, is_int8, is_kept, False)


def gated_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, is_int8: bool, is_kept: bool
) -> Tensor:
    """``activation(x A^T + a) * (x B^T + b)``, both halves of the weight (2M, N_in) in one product."""
    return _product(x, weight, bias, activation, is_int8, is_kept, True)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, is_int8: bool, is_kept: bool, is_gated: bool
) -> Tensor:
    out = weight.shape[0]
    if x.shape[0] == 0 or out == 0:
        return torch_ops.allocate((x.shape[0], out // 2 if is_gated else out), x)
    if is_int8:
        packed, scales, sums = packed_weights.int8(weight, is_gated)
        return _compiled(x, "int8", packed, scales, sums, bias, activation, out, is_gated)
    if is_kept and x.shape[0] <= packed_weights.most_rows(x.dtype):
        packed, dtype = packed_weights.panels(weight, is_gated), capability.DTYPE_NAMES[x.dtype]
        return _compiled(x, dtype, packed, None, None, bias, activation, out, is_gated)
    # Packed for any number of rows.
    packed = weight.contiguous() if not is_kept else packed_weights.kept(weight, "oneDNN", _reordered)
    bias = None if bias is None else bias.contiguous()
    return gated(_onednn(x, packed, bias, "none"), activation) if is_gated else _onednn(x, packed, bias, activation)


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def _multiply_now(a: Tensor, b: Tensor) -> Tensor:
    if a.numel() == 0 or b.numel() == 0 or not torch.backends.mkldnn.is_available() or not capability.is_mkl_slow():
        return a @ b
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def _matrix(a: Tensor, b: Tensor) -> Tensor:
    return torch_ops.allocate((a.shape[0], b.shape[1]), a)


MULTIPLY = torch_ops.define("linear_cpu_mm", _multiply_now, _matrix, "CPU")


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``: float32 by oneDNN where torch would take MKL and MKL is slow. Other dtypes are oneDNN's already."""
    return a @ b if a.dtype is not torch.float32 or torch_ops.needs_definition(a, b) else MULTIPLY(a, b)
