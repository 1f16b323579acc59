# SPDX-License-Identifier: Apache-2.0
"""``add_norm`` on the CPU: one compiled pass over each row, in float32 inside; torch's own with a gradient.

A row's bits depend on nothing but the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..._core import registry, torch_ops
from ..shared import layer_norm_cpu


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch_ops.allocate(x.shape, x), torch_ops.allocate(x.shape, x)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, x_bias: Tensor | None, norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total, out = _outputs(x)
    x, residual = layer_norm_cpu.rows(x), None if residual is None else layer_norm_cpu.rows(residual)
    sources = [(rows.data_ptr(), rows.stride(0), 0, 0, False) for rows in (x, residual) if rows is not None]
    layer_norm_cpu.layer_norm(x.shape[0], sources, x_bias, weight, bias, eps, out, total, norm == "rms")
    return total, out


_fwd = torch_ops.define("add_norm_cpu_fwd", _forward, _outputs, "CPU")


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the compiled kernel cannot run this call."""
    return layer_norm_cpu.why_not("x", args["x"], args["dropout_p"])


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    x_bias: Tensor | None,
    norm: str,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """See ``ctxfast.functional.add_norm``."""
    if not registry.needs_grad(x, residual, weight, bias, x_bias):
        forward = _forward if torch_ops.is_direct(x, residual, weight, bias, x_bias) else _fwd
        return forward(x, residual, weight, bias, x_bias, norm, eps)
    # torch keeps each row's statistics for the backward.
    total = x if x_bias is None else x + x_bias
    total = total if residual is None else residual + total
    total, shape = total.clone() if total is x else total, (x.shape[-1],)
    if norm == "layer":
        return total, F.layer_norm(total, shape, weight, bias, eps)
    normal = F.rms_norm(total, shape, weight, eps)
    return total, normal if bias is None else normal + bias


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    return [(_fwd, tuple(args[name] for name in ("x", "residual", "weight", "bias", "x_bias", "norm", "eps")))]
