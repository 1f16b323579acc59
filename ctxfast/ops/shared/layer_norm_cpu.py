# SPDX-License-Identifier: Apache-2.0
"""Glue of the compiled CPU kernel that sums rows and normalises them, for the ops that use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._core import capability

MAX_SIZE = 8192  # elements of a row: the kernel keeps it on its stack

Source = tuple[int, int, int, int, bool]  # LayerNormSource of csrc/layer_norm/layer_norm.h


def why_not(name: str, rows: Tensor, dropout_p: float, is_converted: bool = False) -> str | None:
    """None, or why the kernel cannot take rows like these; ``name`` is the argument they came in. ``is_converted``:
    they go to float32 first."""
    if rows.device.type != "cpu":
        return f"it runs on the CPU and {name} is on {rows.device}."
    if rows.dtype not in (torch.float32, torch.bfloat16) and not (is_converted and rows.dtype == torch.float16):
        return f"it takes float32 and bfloat16 and {name} is {rows.dtype}."
    if not 0 < rows.shape[-1] <= MAX_SIZE:
        return f"it takes rows of 1 to {MAX_SIZE} elements and {name} has {rows.shape[-1]}."
    if dropout_p > 0:
        return "it has no dropout."
    return None if capability.extension() is not None else capability.why_no_extension()


def rows(x: Tensor) -> Tensor:
    """(..., N) -> (rows, N) with contiguous rows."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def layer_norm(
    rows: int, sources: Sequence[Source], shift: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    out: Tensor, total: Tensor | None = None, is_rms: bool = False,
) -> Tensor:  # fmt: skip
    """``out`` (..., N), contiguous: the LayerNorm of the sum of ``sources`` and ``shift``, row by row, or with
    ``is_rms`` its RMSNorm. ``total``, as ``out``: the sum."""
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    shift = None if shift is None else shift.contiguous()
    capability.extension().layer_norm_forward(
        rows, out.shape[-1], capability.DTYPE_NAMES[out.dtype], len(sources), sources,
        0 if shift is None else shift.data_ptr(),
        weight.data_ptr(), 0 if bias is None else bias.data_ptr(), is_rms, eps,
        0 if total is None else total.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
