# SPDX-License-Identifier: Apache-2.0
"""What ``lstm``'s CUDA implementations share: layouts, autograd, and the large products around the recurrence.

Gates are (B, T, H, 4) and lie gate by gate in memory, as one product with the weights as they are makes them. The
forward pass stores h (the output) and c; the backward pass makes all gates again by one product, a kernel walks the
recurrence, and the weights' gradients are products over all steps of what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import capability, registry, torch_ops
from .reference import recurrence as recurrence_definition
from .states import previous


def input_gates(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """W_ih x + b of all steps: (B, T, I) -> (B, T, H, 4), gate by gate in memory."""
    return F.linear(x, weight_ih, bias).unflatten(2, (4, -1)).transpose(2, 3)


def by_gate(gates: Tensor) -> Tensor:
    """Gates (B, T, H, 4) with the cells of a gate side by side in memory."""
    if gates.stride()[2:] == (1, gates.shape[2]):
        return gates
    return gates.transpose(2, 3).contiguous().transpose(2, 3)


def forward_outputs(
    gates: Sequence[Tensor], weight_hh: Sequence[Tensor], save_cells: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """output (B, T, R P), h_n (R, B, P), c_n (R, B, H) float32, cells (R, B, T, H) float32 or empty; uninitialised."""
    batch, steps, hidden, _ = gates[0].shape
    directions, size, like = len(gates), weight_hh[0].shape[1], gates[0]
    cells = (directions, batch, steps, hidden) if save_cells else (0,)
    return (
        torch_ops.allocate((batch, steps, directions * size), like),
        torch_ops.allocate((directions, batch, size), like),
        torch_ops.allocate((directions, batch, hidden), like, torch.float32),
        torch_ops.allocate(cells, like, torch.float32),
    )


def backward_outputs(z: Sequence[Tensor], weight_hh: Sequence[Tensor]) -> list[Tensor]:
    """R of grad_gates (B, T, H, 4), gate by gate in memory, grad_hidden (R, B, T, P), grad_h_0 and grad_c_0 in float32;
    uninitialised."""
    batch, steps, hidden, _ = z[0].shape
    directions, size, like = len(z), weight_hh[0].shape[1], z[0]
    return [
        *(torch_ops.allocate((batch, steps, 4, hidden), gates).transpose(2, 3) for gates in z),
        torch_ops.allocate((directions, batch, steps, size), like),
        torch_ops.allocate((directions, batch, size), like, torch.float32),
        torch_ops.allocate((directions, batch, hidden), like, torch.float32),
    ]


def _all_gates(gates: Tensor, h_before: Tensor, weight_hh: Tensor) -> Tensor:
    """Gates before their nonlinearity, of all steps."""
    return (gates.transpose(2, 3) + F.linear(h_before, weight_hh).unflatten(2, (4, -1))).transpose(2, 3)


def _gate_product(of_gates: Tensor, h_before: Tensor) -> Tensor:
    """The gradient of weight_hh, (4H, P), summed over rows and steps."""
    return of_gates.transpose(2, 3).flatten(2).flatten(0, 1).t() @ h_before.flatten(0, 1)


def _definition(
    directions: int, lengths: Tensor | None, clips: tuple[float, float], h_0: Tensor | None, c_0: Tensor | None,
    tensors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What ``Recurrence.forward`` computes, in plain PyTorch and float32."""
    gates, hh, proj = (tensors[i * directions : (i + 1) * directions] for i in range(3))
    found = []
    for r in range(directions):
        by_gate = gates[r].float().transpose(2, 3).flatten(2)
        h = by_gate.new_zeros(by_gate.shape[0], hh[r].shape[1]) if h_0 is None else h_0[r].float()
        c = by_gate.new_zeros(by_gate.shape[0], gates[r].shape[2]) if c_0 is None else c_0[r]
        found.append(
            recurrence_definition(
                by_gate, hh[r].float(), proj[r].float() if proj else None, lengths, h, c, r == 1,
                clips[0] or None, clips[1] or None, None,
            )
        )  # fmt: skip
    output, h_n, c_n = zip(*found)
    return torch.cat(output, dim=2), torch.stack(h_n), torch.stack(c_n)


def recurrence(fwd: Callable[..., Any], bwd: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The differentiable recurrence of a pair of raw operators."""

    class Recurrence(torch.autograd.Function):
        """Tensors come flat: R gates, R weight_hh, R weight_proj (or none)."""

        @staticmethod
        def forward(
            ctx: Any,
            directions: int,
            lengths: Tensor | None,
            clips: tuple[float, float],
            h_0: Tensor | None,
            c_0: Tensor | None,
            *tensors: Tensor,
        ) -> tuple[Tensor, Tensor, Tensor]:
            gates, hh, proj = (list(tensors[i * directions : (i + 1) * directions]) for i in range(3))
            output, h_n, c_n, cells = fwd(gates, hh, proj, lengths, h_0, c_0, *clips, True)
            ctx.save_for_backward(lengths, h_0, c_0, output, cells, *tensors)
            ctx.facts = (directions, clips)
            return output, h_n, c_n

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            lengths, h_0, c_0, output, cells, *tensors = ctx.saved_tensors
            directions, clips = ctx.facts
            gates, hh, proj = (list(tensors[i * directions : (i + 1) * directions]) for i in range(3))
            if torch_ops.needs_definition(*grads):
                found = torch_ops.definition_gradients(
                    lambda h_0, c_0, *tensors: _definition(directions, lengths, clips, h_0, c_0, tensors),
                    (h_0, c_0, *tensors), ctx.needs_input_grad[3:], grads,
                )  # fmt: skip
                return None, None, None, *found
            size = hh[0].shape[1]
            before, z = [], []
            for r in range(directions):
                initial = None if h_0 is None else h_0[r]
                h = previous(output[:, :, r * size : (r + 1) * size], initial, lengths, r == 1)
                before.append(h)
                z.append(_all_gates(gates[r], h, hh[r]))
            *of_gates, of_hidden, of_h_0, of_c_0 = bwd(
                z, hh, proj, lengths, c_0, output, cells, grads[0], grads[1].float(), grads[2], *clips
            )
            of_hh = [_gate_product(of_gates[r], before[r]) for r in range(directions)]
            of_proj = []
            for r in range(len(proj)):
                m = (torch.sigmoid(z[r][..., 3].float()) * torch.tanh(cells[r])).to(output.dtype)
                of_proj.append(of_hidden[r].flatten(0, 1).t() @ m.flatten(0, 1))
            states = (None if h_0 is None else of_h_0.to(h_0.dtype), None if c_0 is None else of_c_0)
            return (None, None, None, *states, *of_gates, *of_hh, *of_proj)

    return Recurrence.apply


def run(
    fwd: Callable[..., Any],
    differentiable: Callable[..., tuple[Tensor, Tensor, Tensor]],
    args: Mapping[str, Any],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One call of ``lstm`` by these operators."""
    gates, hh, proj, h_0, c_0, clips = flat(args)
    if registry.needs_grad(gates, hh, proj, h_0, c_0):
        output, h_n, c_n = differentiable(len(gates), args["lengths"], clips, h_0, c_0, *gates, *hh, *proj)
    else:
        output, h_n, c_n, _ = fwd(gates, hh, proj, args["lengths"], h_0, c_0, *clips, False)
    return output, (h_n, c_n.to(output.dtype))


def flat(
    args: Mapping[str, Any],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor | None, Tensor | None, tuple[float, float]]:
    """gates, weight_hh, weight_proj (empty without), h_0, c_0 (float32), clips (0: off) of a call's arguments."""
    bias = args["bias"]
    gates = [
        input_gates(x, args["weight_ih"][r], None if bias is None else bias[r]) for r, x in enumerate(args["input"])
    ]
    h_0, c_0 = args["initial_state"] if args["initial_state"] is not None else (None, None)
    clips = (args["cell_clip"] or 0.0, args["proj_clip"] or 0.0)
    c_0 = None if c_0 is None else c_0.float()
    return gates, list(args["weight_hh"]), list(args["weight_proj"] or ()), h_0, c_0, clips


def raw_calls(fwd: Any, bwd: Any, args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    gates, hh, proj, h_0, c_0, clips = flat(args)
    output, h_n, c_n, cells = fwd(gates, hh, proj, args["lengths"], h_0, c_0, *clips, True)
    grads = (torch.randn_like(output), torch.randn_like(h_n).float(), torch.randn_like(c_n))
    return [
        (fwd, (gates, hh, proj, args["lengths"], h_0, c_0, *clips, False)),
        (bwd, (gates, hh, proj, args["lengths"], c_0, output, cells, *grads, *clips)),
    ]


def objection(args: Mapping[str, Any], dtypes: Sequence[torch.dtype], capability_needed: tuple[int, int]) -> str | None:
    """None, or why no CUDA kernel of these dtypes and capability can run this call."""
    x = args["input"][0]
    if x.device.type != "cuda":
        return f"it runs on a CUDA GPU and input is on {x.device}."
    if x.dtype not in dtypes:
        names = ", ".join(capability.DTYPE_NAMES[dtype] for dtype in dtypes)
        return f"it takes {names} and input is {x.dtype}."
    if args["weight_dtype"] is not None:
        return "weight_dtype is an option of the CPU implementation; cast the module to that dtype instead."
    found = torch.cuda.get_device_capability(x.device)
    if found < capability_needed:
        wanted = "".join(map(str, capability_needed))
        return f"it needs a GPU of compute capability sm_{wanted} and {x.device} has sm_{found[0]}{found[1]}."
    return capability.why_no_cuda()
