# SPDX-License-Identifier: Apache-2.0
"""The backward recurrence of ``lstm``'s persistent implementation (Hopper): all steps in one launch.

Gradients of the gates, of h at every step and of the initial state; the weight gradients are products over all steps
of what this returns. Not yet run on a GPU: the kernel is run on the emulator.

Weights are packed on every call, two strided copies a direction: between two backward passes they have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import capability, torch_ops

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


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


def pack(weight_hh: Tensor, weight_proj: Tensor | None, k_groups: int, rows: int) -> Tensor:
    """One direction's weights as matrix fragments, block by block: (4H, P) and (P, H) -> (blocks, 16-bit values).

    A fragment is [lane = 4 (row of 8) + (pair of columns of 8)][half of 16 columns][half of 16 rows][2]. K goes in
    kpairs of two k-steps of 16. Block (r, k) holds ``rows`` rows of W_hh^T and the k-th part of its K: kpair 2 u + v,
    k-step w hold cells 16 u + 8 w + 4 v + (0..3), four gates each. Then, with a projection, W_proj^T of its 64 cells,
    whose K is in the order in which the blocks finish dh.
    """
    hidden, size = weight_hh.shape[0] // 4, weight_hh.shape[1]
    tiles, groups = rows // 16, size // rows
    # gate: half, odd; cell: u, w, v, lane; row: group, tile, half, lane
    hh = weight_hh.view(2, 2, hidden // 16, 2, 2, 4, groups, tiles, 2, 8).permute(6, 2, 4, 3, 7, 9, 5, 0, 8, 1)
    blocks = groups * k_groups
    parts = [hh.reshape(blocks, -1)]
    if weight_proj is not None:
        # row: group, kpair of it, k-step, odd, half, lane; cell: block, tile, half, lane
        proj = weight_proj.view(size // 64, 2, 2, 2, 2, 4, blocks, 4, 2, 8).permute(6, 0, 1, 2, 7, 9, 5, 4, 8, 3)
        parts.append(proj.reshape(blocks, -1))
    return torch.cat(parts, dim=1)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _steps_first(tensor: Tensor, multiple: int) -> Tensor:
    """``tensor`` as it is if the kernel can walk it: dense in its last dimensions, others in multiples."""
    dense = tensor.dim() == 3 or tensor.stride(2) == tensor.shape[3]
    if tensor.stride(-1) == 1 and dense and all(stride % multiple == 0 for stride in tensor.stride()[:2]):
        return tensor
    return tensor.contiguous()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


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
    batch, steps, hidden, _ = z[0].shape
    size, directions, has_proj = weight_hh[0].shape[1], len(z), bool(weight_proj)
    results = _backward_fake(
        z, weight_hh, weight_proj, lengths, c_0, output, cells, grad_output, grad_h_n, grad_c_n, cell_clip, proj_clip
    )
    *grad_gates, grad_hidden, grad_h_0, grad_c_0 = results
    found = plan(batch, hidden, size, has_proj, directions)
    if found["refusal"]:
        raise RuntimeError(f"ctxfast.lstm: backwards, {found['refusal']} Pass impl='cuda_step'.")
    packed = [
        pack(w.contiguous(), weight_proj[r].contiguous() if has_proj else None, found["k_groups"], found["rows"])
        for r, w in enumerate(weight_hh)
    ]
    z = [_steps_first(gates, 4) for gates in z]
    output, cells = _steps_first(output, 1), cells.contiguous()
    grad_output = None if grad_output is None else _steps_first(grad_output.to(z[0].dtype), 1)
    grad_h_n = None if grad_h_n is None else grad_h_n.float().contiguous()
    grad_c_n = None if grad_c_n is None else grad_c_n.float().contiguous()
    c_0 = None if c_0 is None else c_0.float().contiguous()
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    grad_output_strides = (0, 0) if grad_output is None else grad_output.stride()[:2]
    workspace = torch_ops.allocate((found["workspace_bytes"],), z[0], torch.uint8)
    capability.extension().lstm_persistent_backward(
        batch=batch, steps=steps, hidden=hidden, size=size, has_proj=has_proj, dtype=_NAMES[z[0].dtype],
        packed=[weights.data_ptr() for weights in packed],
        z=[gates.data_ptr() for gates in z], z_strides=[gates.stride()[:2] for gates in z],
        cells=cells.data_ptr(), c_0=_address(c_0),
        output=output.data_ptr(), output_strides=output.stride()[:2],
        grad_output=_address(grad_output), grad_output_strides=grad_output_strides,
        grad_h_n=_address(grad_h_n), grad_c_n=_address(grad_c_n), lengths=_address(lengths),
        grad_gates=[grad.data_ptr() for grad in grad_gates], grad_hidden=grad_hidden.data_ptr(),
        grad_h_0=grad_h_0.data_ptr(), grad_c_0=grad_c_0.data_ptr(),
        workspace=workspace.data_ptr(), workspace_bytes=found["workspace_bytes"],
        cell_clip=cell_clip, proj_clip=proj_clip, stream=_stream(z[0].device),
    )  # fmt: skip
    return results


def _backward_fake(
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
    """R of grad_gates (B, T, H, 4), grad_hidden (R, B, T, P), grad_h_0 and grad_c_0 in float32; uninitialised."""
    batch, steps, hidden, _ = z[0].shape
    directions, size = len(z), weight_hh[0].shape[1]
    return [
        *(torch_ops.allocate((batch, steps, hidden, 4), gates) for gates in z),
        torch_ops.allocate((directions, batch, steps, size), z[0]),
        torch_ops.allocate((directions, batch, size), z[0], torch.float32),
        torch_ops.allocate((directions, batch, hidden), z[0], torch.float32),
    ]


_bwd = torch_ops.define(
    "lstm_cuda_bwd",
    "(Tensor[] z, Tensor[] weight_hh, Tensor[] weight_proj, Tensor? lengths, Tensor? c_0, Tensor output, Tensor cells, "
    "Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, float cell_clip, float proj_clip) -> Tensor[]",
    _backward,
    _backward_fake,
    "CUDA",
)


def recurrence_backward(
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
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Walk the recurrence back: (R of grad_gates, grad_hidden, grad_h_0, grad_c_0).

    Args:
        z: R of (B, T, H, 4), all gates before their nonlinearity.
        weight_hh, weight_proj: as the op has them; weight_proj empty without a projection.
        lengths, c_0: as the op has them, c_0 in float32.
        output: (B, T, R*P), the op's output; cells: (R, B, T, H) in float32, after the clip.
        grad_output, grad_h_n, grad_c_n: None where the result was not used.
        cell_clip, proj_clip: 0 for none.

    Returns:
        grad_gates (B, T, H, 4) and grad_hidden (R, B, T, P), which is of h before its clip, in the weights' dtype,
        zeros past a row's length; grad_h_0 (R, B, P) and grad_c_0 (R, B, H) in float32. With them: grad W_hh =
        grad_gates^T h_before, grad m = grad_hidden W_proj, grad W_proj = grad_hidden^T m.
    """
    *grad_gates, grad_hidden, grad_h_0, grad_c_0 = _bwd(
        list(z), list(weight_hh), list(weight_proj), lengths, c_0, output, cells,
        grad_output, grad_h_n, grad_c_n, cell_clip, proj_clip,
    )  # fmt: skip
    return grad_gates, grad_hidden, grad_h_0, grad_c_0
