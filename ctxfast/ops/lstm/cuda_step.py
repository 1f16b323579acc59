# SPDX-License-Identifier: Apache-2.0
"""``lstm`` on any GPU from sm_80 and of any size: one fused launch a step, both directions in it.

Weights stream from the L2 cache at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import capability, torch_ops
from . import cuda_autograd
from .states import as_int64

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _fragments(matrix: Tensor) -> Tensor:
    """(rows, K) -> the kernels' order: tiles of 16 rows by pairs of k-steps, zeros where the matrix ends.

    16 bits: [tile][pair][step][8 rows][4][register][half of the rows][2], k = 32 pair + 8 (of 4) + 4 step + 2 register
    + (of 2). float32: rows as they are.
    """
    rows, k = matrix.shape
    matrix = F.pad(matrix, (0, -k % 32, 0, -rows % 16))
    if matrix.dtype == torch.float32:
        return matrix.contiguous()
    parts = matrix.unflatten(0, (-1, 2, 8)).unflatten(3, (-1, 4, 2, 2, 2))  # tile half row pair four step register two
    return parts.permute(0, 3, 5, 2, 4, 6, 1, 7).contiguous()


def _gate_tiles(weight_hh: Tensor) -> Tensor:
    """(4H, P) -> rows in tiles of 4 gates x 4 cells."""
    gates = weight_hh.unflatten(0, (4, -1))
    gates = F.pad(gates, (0, 0, 0, -gates.shape[1] % 4))
    return gates.unflatten(1, (-1, 4)).transpose(0, 1).flatten(0, 2)


_ORDERS = {
    "gates": _gate_tiles,
    "proj": lambda weight: weight,
    "gates_t": lambda weight: cuda_autograd.cell_major(weight).t(),
    "proj_t": lambda weight: weight.t(),
}


def _pack(kind: str, weights: Sequence[Tensor]) -> list[Tensor]:
    # At every call, some tens of microseconds for ELMo's layer: see cuda_autograd.input_gates.
    return [_fragments(_ORDERS[kind](weight)) for weight in weights]


def _shape(gates: Sequence[Tensor], weight_hh: Sequence[Tensor], weight_proj: Sequence[Tensor]) -> dict[str, Any]:
    batch, steps, hidden, _ = gates[0].shape
    return dict(
        batch=batch, steps=steps, hidden=hidden, size=weight_hh[0].shape[1], directions=len(gates),
        has_proj=bool(weight_proj), dtype=capability.DTYPE_NAMES[gates[0].dtype],
    )  # fmt: skip


def _workspace(shape: Mapping[str, Any], backward: bool, like: Tensor) -> Tensor:
    size = capability.extension().lstm_step_workspace_bytes(**shape, backward=backward)
    return torch_ops.allocate((size,), like, torch.uint8)


def _forward(
    gates: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    weight_proj: Sequence[Tensor],
    lengths: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    cell_clip: float,
    proj_clip: float,
    save_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = cuda_autograd.forward_outputs(gates, weight_hh, save_cells)
    output, h_n, c_n, cells = outputs
    shape = _shape(gates, weight_hh, weight_proj)
    gates = [cuda_autograd.walkable(gate) for gate in gates]
    packed_gates, packed_proj = _pack("gates", weight_hh), _pack("proj", weight_proj)
    lengths = as_int64(lengths)
    h_0, c_0 = (None if state is None else state.contiguous() for state in (h_0, c_0))
    workspace = _workspace(shape, False, output)
    with torch_ops.launching(output) as stream:
        capability.extension().lstm_step_forward(
            **shape, gates=[gate.data_ptr() for gate in gates], gates_strides=[gate.stride()[:2] for gate in gates],
            packed_gates=[weights.data_ptr() for weights in packed_gates],
            packed_proj=[weights.data_ptr() for weights in packed_proj],
            lengths=torch_ops.address(lengths), h_0=torch_ops.address(h_0), c_0=torch_ops.address(c_0),
            cell_clip=cell_clip, proj_clip=proj_clip, output=output.data_ptr(), h_n=h_n.data_ptr(),
            c_n=c_n.data_ptr(), cells=cells.data_ptr() if save_cells else 0,
            workspace=workspace.data_ptr(), workspace_bytes=workspace.numel(), stream=stream,
        )  # fmt: skip
    return outputs


def _backward(
    z: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    weight_proj: Sequence[Tensor],
    lengths: Tensor | None,
    c_0: Tensor | None,
    output: Tensor,
    cells: Tensor,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    cell_clip: float,
    proj_clip: float,
) -> list[Tensor]:
    results = cuda_autograd.backward_outputs(z, weight_hh)
    *grad_gates, grad_hidden, grad_h_0, grad_c_0 = results
    shape = _shape(z, weight_hh, weight_proj)
    z = [cuda_autograd.walkable(gates) for gates in z]
    packed_gates, packed_proj = _pack("gates_t", weight_hh), _pack("proj_t", weight_proj)
    lengths = as_int64(lengths)
    output, cells = output.contiguous(), cells.contiguous()
    grad_output = None if grad_output is None else grad_output.to(output.dtype).contiguous()
    c_0, grad_h_n, grad_c_n = (
        None if tensor is None else tensor.float().contiguous() for tensor in (c_0, grad_h_n, grad_c_n)
    )
    workspace = _workspace(shape, True, output)
    with torch_ops.launching(output) as stream:
        capability.extension().lstm_step_backward(
            **shape, z=[gates.data_ptr() for gates in z], z_strides=[gates.stride()[:2] for gates in z],
            packed_gates_t=[weights.data_ptr() for weights in packed_gates],
            packed_proj_t=[weights.data_ptr() for weights in packed_proj],
            lengths=torch_ops.address(lengths), c_0=torch_ops.address(c_0), cells=cells.data_ptr(),
            output=output.data_ptr(), grad_output=torch_ops.address(grad_output), grad_h_n=torch_ops.address(grad_h_n),
            grad_c_n=torch_ops.address(grad_c_n), cell_clip=cell_clip, proj_clip=proj_clip,
            grad_gates=[grad.data_ptr() for grad in grad_gates], grad_hidden=grad_hidden.data_ptr(),
            grad_h_0=grad_h_0.data_ptr(), grad_c_0=grad_c_0.data_ptr(),
            workspace=workspace.data_ptr(), workspace_bytes=workspace.numel(), stream=stream,
        )  # fmt: skip
    return results


_fwd = torch_ops.define("lstm_cuda_step_fwd", _forward, cuda_autograd.forward_outputs, "CUDA")
_bwd = torch_ops.define("lstm_cuda_step_bwd", _backward, cuda_autograd.backward_outputs, "CUDA")
_recurrence = cuda_autograd.recurrence(_fwd, _bwd)


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the per-step kernels cannot run this call."""
    return cuda_autograd.objection(args, _DTYPES, (8, 0))


def lstm(**args: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """See ``ctxfast.functional.lstm``."""
    return cuda_autograd.run(_fwd, _recurrence, args)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    return cuda_autograd.raw_calls(_fwd, _bwd, args)
