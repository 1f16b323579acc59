# SPDX-License-Identifier: Apache-2.0
"""``lstm`` on Hopper: all steps of both directions in one launch, the recurrent weights on chip.

Weights and input gates are read where they lie; nothing is packed or kept between calls. The kernels need every block
resident at once, so ``supports`` knows the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import index
from typing import Any

import torch
from torch import Tensor

from ..._core import capability, registry, torch_ops
from . import cuda_autograd, cuda_backward
from .states import as_int64

_DTYPES = (torch.float16, torch.bfloat16)
# Rows at most, without and with a projection. The kernel takes more than 32 in tiles of 32, one after another, each a
# full pass of 7 to 8 us a step with ELMo's projection and of 1.5 to 3.5 us without; cuda_step, which streams its
# weights for all rows, needs 14 to 20 us and 5 to 7. Estimated for an H100 from the machine code, not measured.
_MAX_BATCH = {False: 128, True: 32}


@lru_cache
def _facts(ordinal: int) -> tuple[int, int, int, int, bool, int]:
    """Of a CUDA device: multiprocessors, compute capability, shared memory of a block, cooperative launch, pairs."""
    return capability.extension().lstm_persistent_device(ordinal)


def _ordinal(tensor: Tensor) -> int:
    return tensor.device.index if tensor.is_cuda else 0  # tests run the kernels on the CPU


def _walkable(gates: Tensor) -> Tensor:
    """Gates (B, T, H, 4) with the cells of a gate side by side, as the kernel reads them."""
    batch_stride, step_stride, *inner = gates.stride()
    even = batch_stride % 2 == 0 and step_stride % 2 == 0 and gates.data_ptr() % 4 == 0
    if inner == [1, gates.shape[2]] and even:
        return gates
    return gates.transpose(2, 3).contiguous().transpose(2, 3)


def _dense_rows(weight: Tensor) -> Tensor:
    if weight.stride(1) == 1 and weight.stride(0) % 8 == 0 and weight.data_ptr() % 16 == 0:
        return weight
    return weight.clone(memory_format=torch.contiguous_format)


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
    batch, steps, hidden, _ = gates[0].shape
    size, facts = weight_hh[0].shape[1], _facts(_ordinal(output))
    c = capability.extension()
    plan = c.lstm_persistent_forward_plan(facts, batch, hidden, size, bool(weight_proj), len(gates))
    if plan["refusal"]:
        raise RuntimeError(f"ctxfast.lstm: impl='cuda' cannot run this call: {plan['refusal']} Leave impl out.")
    gates = [_walkable(gate) for gate in gates]
    weight_hh, weight_proj = [_dense_rows(w) for w in weight_hh], [_dense_rows(w) for w in weight_proj]
    lengths = as_int64(lengths)
    # Without gaps: the kernel is told no strides of theirs.
    h_0 = None if h_0 is None else _dense_rows(h_0.contiguous().flatten(0, 1))
    c_0 = None if c_0 is None else c_0.contiguous()
    workspace = torch_ops.allocate((plan["workspace_bytes"],), output, torch.uint8)
    with torch_ops.launching(output) as stream:
        c.lstm_persistent_forward(
            device=facts, batch=batch, steps=steps, hidden=hidden, size=size, directions=len(gates),
            has_proj=bool(weight_proj), dtype=capability.DTYPE_NAMES[output.dtype],
            gates=[gate.data_ptr() for gate in gates], gates_strides=[gate.stride()[:2] for gate in gates],
            weight_hh=[w.data_ptr() for w in weight_hh], weight_hh_stride=[w.stride(0) for w in weight_hh],
            weight_proj=[w.data_ptr() for w in weight_proj], weight_proj_stride=[w.stride(0) for w in weight_proj],
            lengths=torch_ops.address(lengths), h_0=torch_ops.address(h_0), c_0=torch_ops.address(c_0),
            output=output.data_ptr(), output_strides=output.stride()[:2], h_n=h_n.data_ptr(), c_n=c_n.data_ptr(),
            cells=cells.data_ptr() if save_cells else 0,
            workspace=workspace.data_ptr(), workspace_bytes=workspace.numel(),
            cell_clip=cell_clip, proj_clip=proj_clip, stream=stream,
        )  # fmt: skip
    return outputs


_fwd = torch_ops.define("lstm_cuda_fwd", _forward, cuda_autograd.forward_outputs, "CUDA")
_recurrence = cuda_autograd.recurrence(_fwd, cuda_backward._bwd)


@capability.constant
def _refusal(ordinal: int, hidden: int, size: int, has_proj: bool, directions: int, backward: bool) -> str | None:
    """None, or why the device cannot hold such a layer."""
    facts = _facts(ordinal)
    # What runs for one row runs for any number, if need be in smaller tiles.
    plan = capability.extension().lstm_persistent_forward_plan(facts, 1, hidden, size, has_proj, directions)
    if plan["refusal"]:
        return plan["refusal"]
    return cuda_backward.refusal(1, hidden, size, has_proj, directions, facts[0]) if backward else None


def sizes_objection(args: Mapping[str, Any]) -> str | None:
    """None, or why the kernels cannot run these sizes on the input's device."""
    x, weight_hh = args["input"][0], args["weight_hh"]
    batch, steps, _ = x.shape
    if batch == 0 or steps == 0:
        return f"it needs a row and a step and input has {batch} rows of {steps} steps."
    has_proj = args["weight_proj"] is not None
    if batch > _MAX_BATCH[has_proj]:
        kind = "with a projection" if has_proj else "without a projection"
        return f"{kind} it takes at most {_MAX_BATCH[has_proj]} rows and input has {batch}."
    # Plain numbers, also where the compiler would let a size vary.
    hidden, size = index(weight_hh[0].shape[0] // 4), index(weight_hh[0].shape[1])
    return _refusal(_ordinal(x), hidden, size, has_proj, len(weight_hh), registry.needs_grad(*args.values()))


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the persistent kernels cannot run this call."""
    return cuda_autograd.objection(args, _DTYPES, (9, 0)) or capability.why_no_cuda("90a") or sizes_objection(args)


def lstm(**args: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """See ``ctxfast.functional.lstm``."""
    return cuda_autograd.run(_fwd, _recurrence, args)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    return cuda_autograd.raw_calls(_fwd, cuda_backward._bwd, args)
