# SPDX-License-Identifier: Apache-2.0
"""``add_layer_norm`` on the CPU: one compiled pass over each row, in float32 inside; torch's own with a gradient.

A row's bits depend on nothing but the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import capability, registry, torch_ops

MAX_SIZE = 8192  # elements of a row: the kernel keeps it on its stack


def _rows(x: Tensor) -> Tensor:
    """(..., N) -> (rows, N) with contiguous rows."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, x_bias: Tensor | None, eps: float
) -> Tensor:
    out = torch_ops.allocate(x.shape, x)
    x, weight, bias = _rows(x), weight.contiguous(), bias.contiguous()
    residual = None if residual is None else _rows(residual)
    x_bias = None if x_bias is None else x_bias.contiguous()
    sources = [(x.data_ptr(), x.stride(0), 0, 0, False)]
    if residual is not None:
        sources.append((residual.data_ptr(), residual.stride(0), 0, 0, False))
    capability.extension().layer_norm_forward(
        x.shape[0], x.shape[1], x.dtype is torch.bfloat16, sources, 0 if x_bias is None else x_bias.data_ptr(),
        weight.data_ptr(), bias.data_ptr(), eps, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _forward_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, x_bias: Tensor | None, eps: float
) -> Tensor:
    return torch_ops.allocate(x.shape, x)


_fwd = torch_ops.define(
    "add_layer_norm_cpu_fwd",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor? x_bias, float eps) -> Tensor",
    _forward, _forward_fake, "CPU",
)  # fmt: skip


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the compiled kernel cannot run this call."""
    x = args["x"]
    if x.device.type != "cpu":
        return f"it runs on the CPU and x is on {x.device}."
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16 and x is {x.dtype}."
    if x.shape[-1] > MAX_SIZE:
        return f"it takes rows of at most {MAX_SIZE} elements and x has {x.shape[-1]}."
    if args["dropout_p"] > 0:
        return "it has no dropout."
    return None if capability.extension() is not None else capability.why_no_extension()


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    eps: float,
    dropout_p: float,
) -> Tensor:
    """See ``ctxfast.functional.add_layer_norm``."""
    if registry.needs_grad(dict(x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)):
        # torch keeps each row's statistics for the way back.
        x = x if x_bias is None else x + x_bias
        x = x if residual is None else residual + x
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    forward = _forward if torch_ops.is_direct(x, residual, weight, bias, x_bias) else _fwd
    return forward(x, residual, weight, bias, x_bias, eps)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    return [(_fwd, tuple(args[name] for name in ("x", "residual", "weight", "bias", "x_bias", "eps")))]
