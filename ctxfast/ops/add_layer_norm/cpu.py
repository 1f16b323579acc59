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

from ..._core import registry, torch_ops
from ..shared import layer_norm_cpu


def _output(x: Tensor) -> Tensor:
    return torch_ops.allocate(x.shape, x)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, x_bias: Tensor | None, eps: float
) -> Tensor:
    out = _output(x)
    x, residual = layer_norm_cpu.rows(x), None if residual is None else layer_norm_cpu.rows(residual)
    sources = [(rows.data_ptr(), rows.stride(0), 0, 0, False) for rows in (x, residual) if rows is not None]
    return layer_norm_cpu.layer_norm(x.shape[0], sources, x_bias, weight, bias, eps, out)


_fwd = torch_ops.define("add_layer_norm_cpu_fwd", _forward, _output, "CPU")


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the compiled kernel cannot run this call."""
    out_dtype = args["out_dtype"]
    if out_dtype is not None:
        given = [each for each in args.values() if isinstance(each, Tensor)]
        if torch.float64 in (out_dtype, *(each.dtype for each in given)):
            return "it computes in float32, and float64 is among the dtypes."
    return layer_norm_cpu.why_not("x", args["x"], args["dropout_p"], out_dtype is not None)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """See ``ctxfast.functional.add_layer_norm``."""
    if out_dtype is not None:
        dtypes = {each.dtype for each in (x, residual, weight, bias, x_bias) if each is not None}
        if dtypes != {out_dtype}:
            given = (None if each is None else each.float() for each in (x, residual, weight, bias, x_bias))
            return add_layer_norm(*given, eps, dropout_p, None).to(out_dtype)
    if registry.needs_grad(x, residual, weight, bias, x_bias):
        # torch keeps each row's statistics for the backward.
        x = x if x_bias is None else x + x_bias
        x = x if residual is None else residual + x
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    forward = _forward if torch_ops.is_direct(x, residual, weight, bias, x_bias) else _fwd
    return forward(x, residual, weight, bias, x_bias, eps)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    return [(_fwd, tuple(args[name] for name in ("x", "residual", "weight", "bias", "x_bias", "eps")))]
