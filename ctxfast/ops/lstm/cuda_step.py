# SPDX-License-Identifier: Apache-2.0
"""``lstm`` on any GPU from sm_80 and of any size: one fused launch a step, both directions in it.

Weights stream from the L2 cache at every step, in an order that matrix instructions take. They are packed once and kept
by the contract of ``shared/weight_cache.py``: the host compares what it knows of them without asking the GPU (versions,
addresses, shapes), and a kernel before each call compares a sample of their bits and packs anew what has changed
behind PyTorch's back. Nobody waits for the GPU. A captured call packs in its graph, each time: a replay finds the
weights that are there then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import capability, torch_ops
from ..shared.weight_cache import WeightCache
from . import cuda_autograd
from .states import as_int64

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Streams that have packed weights of their own, at most: on a stream all is in order, between two it is not.
_MOST_STREAMS = 4

_packed = WeightCache()


def _shape(gates: Sequence[Tensor], weight_hh: Sequence[Tensor], weight_proj: Sequence[Tensor]) -> dict[str, Any]:
    batch, steps, hidden, _ = gates[0].shape
    return dict(
        batch=batch, steps=steps, hidden=hidden, size=weight_hh[0].shape[1], directions=len(gates),
        has_proj=bool(weight_proj), dtype=capability.DTYPE_NAMES[gates[0].dtype],
    )  # fmt: skip


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _pack(
    shape: Mapping[str, Any], weight_hh: Sequence[Tensor], weight_proj: Sequence[Tensor], backward: bool, stream: int
) -> Tensor:
    """The weights of all directions in the kernels' order, on this stream."""
    c, like = capability.extension(), weight_hh[0]

    def run(packed: Tensor | None) -> Tensor:
        is_known = packed is not None
        if packed is None:
            size = c.lstm_step_packed_bytes(**shape, backward=backward)
            packed = torch_ops.allocate((size,), like, torch.uint8)
        c.lstm_step_pack(
            **shape, backward=backward, weight_hh=[w.data_ptr() for w in weight_hh],
            weight_hh_strides=[w.stride() for w in weight_hh], weight_proj=[w.data_ptr() for w in weight_proj],
            weight_proj_strides=[w.stride() for w in weight_proj], is_known=is_known, packed=packed.data_ptr(),
            packed_bytes=packed.numel(), stream=stream,
        )  # fmt: skip
        return packed

    if _is_captured(like):
        return run(None)
    of_streams = _packed.get((*weight_hh, *weight_proj), backward, dict, is_read=lambda tensor: True)
    packed = of_streams[stream] = run(of_streams.get(stream))
    for other in list(of_streams)[:-_MOST_STREAMS]:
        of_streams.pop(other, None)
    return packed


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
    gates = [cuda_autograd.by_gate(gate) for gate in gates]
    lengths = as_int64(lengths)
    h_0, c_0 = (None if state is None else state.contiguous() for state in (h_0, c_0))
    workspace = _workspace(shape, False, output)
    with torch_ops.launching(output) as stream:
        packed = _pack(shape, weight_hh, weight_proj, False, stream)
        capability.extension().lstm_step_forward(
            **shape, gates=[gate.data_ptr() for gate in gates], gates_strides=[gate.stride()[:2] for gate in gates],
            packed=packed.data_ptr(), lengths=torch_ops.address(lengths),
            h_0=torch_ops.address(h_0), c_0=torch_ops.address(c_0),
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
    z = [cuda_autograd.by_gate(gates) for gates in z]
    lengths = as_int64(lengths)
    output, cells = output.contiguous(), cells.contiguous()
    grad_output = None if grad_output is None else grad_output.to(output.dtype).contiguous()
    c_0, grad_h_n, grad_c_n = (
        None if tensor is None else tensor.float().contiguous() for tensor in (c_0, grad_h_n, grad_c_n)
    )
    workspace = _workspace(shape, True, output)
    with torch_ops.launching(output) as stream:
        packed = _pack(shape, weight_hh, weight_proj, True, stream)
        capability.extension().lstm_step_backward(
            **shape, z=[gates.data_ptr() for gates in z], z_strides=[gates.stride()[:2] for gates in z],
            packed=packed.data_ptr(), lengths=torch_ops.address(lengths), c_0=torch_ops.address(c_0),
            cells=cells.data_ptr(),
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
