# SPDX-License-Identifier: Apache-2.0
"""The backward recurrence of ``lstm``'s persistent implementation (Hopper): all steps in one launch.

Gradients of the gates, of h (before its clip) at every step and of the initial state, zeros past a row's length; the
weights' gradients are products over all steps of what this returns. Weights are read where they lie, gates and their
gradients lie gate by gate as a product with the weights makes them: nothing is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import capability, torch_ops
from . import cuda_autograd
from .states import as_int64


def plan(batch: int, hidden: int, size: int, has_proj: bool, directions: int) -> dict[str, Any]:
    """How the kernel would lay a call out; ``refusal`` says why it cannot, or is empty."""
    return capability.extension().lstm_persistent_backward_plan(batch, hidden, size, has_proj, directions)


def refusal(batch: int, hidden: int, size: int, has_proj: bool, directions: int, multiprocessors: int) -> str | None:
    """None, or the sentence why the backward recurrence cannot run these sizes on such a device."""
    found = plan(batch, hidden, size, has_proj, directions)
    if found["refusal"]:
        return f"backwards, {found['refusal']}"
    blocks = found["blocks"] * directions
    if blocks > multiprocessors:
        return f"backwards it needs {blocks} multiprocessors at once and the device has {multiprocessors}."
    return None


def _aligned(weight: Tensor) -> Tensor:
    """Contiguous, at an address the kernel's loads can take."""
    if weight.is_contiguous() and weight.data_ptr() % 16 == 0:
        return weight
    return weight.clone(memory_format=torch.contiguous_format)


def _rows(tensor: Tensor | None) -> Tensor | None:
    """(B, T, values) with the values of a step side by side."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _backward(
    z: Sequence[Tensor],  # R of (B, T, H, 4), gates before their nonlinearity
    weight_hh: Sequence[Tensor],
    weight_proj: Sequence[Tensor],  # empty: no projection
    lengths: Tensor | None,
    c_0: Tensor | None,  # (R, B, H) float32
    output: Tensor,  # (B, T, R P)
    cells: Tensor,  # (R, B, T, H) float32
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    cell_clip: float,  # 0: off
    proj_clip: float,
) -> list[Tensor]:
    results = cuda_autograd.backward_outputs(z, weight_hh)
    *grad_gates, grad_hidden, grad_h_0, grad_c_0 = results
    batch, steps, hidden, _ = z[0].shape
    size = weight_hh[0].shape[1]
    found = plan(batch, hidden, size, bool(weight_proj), len(z))
    if found["refusal"]:
        raise RuntimeError(f"ctxfast.lstm: impl='cuda' cannot run this call: backwards, {found['refusal']}")
    weight_hh, weight_proj = [_aligned(w) for w in weight_hh], [_aligned(w) for w in weight_proj]
    z = [cuda_autograd.by_gate(gates) for gates in z]
    output, cells = _rows(output), cells.contiguous()
    grad_output = None if grad_output is None else _rows(grad_output.to(output.dtype))
    lengths = as_int64(lengths)
    c_0, grad_h_n, grad_c_n = (
        None if tensor is None else tensor.float().contiguous() for tensor in (c_0, grad_h_n, grad_c_n)
    )
    workspace = torch_ops.allocate((found["workspace_bytes"],), output, torch.uint8)
    with torch_ops.launching(output) as stream:
        capability.extension().lstm_persistent_backward(
            batch=batch, steps=steps, hidden=hidden, size=size, directions=len(z),
            has_proj=bool(weight_proj), dtype=capability.DTYPE_NAMES[output.dtype],
            weight_hh=[w.data_ptr() for w in weight_hh], weight_proj=[w.data_ptr() for w in weight_proj],
            z=[gates.data_ptr() for gates in z], z_strides=[gates.stride()[:2] for gates in z],
            cells=cells.data_ptr(), c_0=torch_ops.address(c_0),
            output=output.data_ptr(), output_strides=output.stride()[:2], grad_output=torch_ops.address(grad_output),
            grad_output_strides=(0, 0) if grad_output is None else grad_output.stride()[:2],
            grad_h_n=torch_ops.address(grad_h_n), grad_c_n=torch_ops.address(grad_c_n),
            lengths=torch_ops.address(lengths),
            grad_gates=[grad.data_ptr() for grad in grad_gates], grad_hidden=grad_hidden.data_ptr(),
            grad_h_0=grad_h_0.data_ptr(), grad_c_0=grad_c_0.data_ptr(),
            workspace=workspace.data_ptr(), workspace_bytes=workspace.numel(),
            cell_clip=cell_clip, proj_clip=proj_clip, stream=stream,
        )  # fmt: skip
    return results


_bwd = torch_ops.define("lstm_cuda_bwd", _backward, cuda_autograd.backward_outputs, "CUDA")
