# SPDX-License-Identifier: Apache-2.0
"""``lstm`` on the CPU: one call of the compiled kernel for all directions and steps.

Products run as ``weight_dtype`` says; bfloat16 inputs mean bfloat16 products, float16 inputs float32 ones. Gates and
states are float32 inside. Weights are packed once per parameter and found again by later calls. When a gradient is
needed the input product of all steps is a call of its own, and the kernel also stores the cell states; the backward
pass recomputes all gates by one matrix product and walks
the recurrence in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import capability, registry, torch_ops
from ..._core.rounding import rounded_rows
from ..._core.weight_cache import WeightCache

_packed = WeightCache()
# The kernel's word for how factors are held -> what the backward pass rounds to.
_ROUNDING = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}


def _room(size: int) -> Tensor:
    """``size`` bytes that begin on a cache line."""
    memory = torch.empty(size + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + size]


def _pack(weight_hh: Tensor, weight_proj: Tensor | None, kind: str) -> Tensor:
    """The kernel's layout of one direction's recurrent and projection weights, from the cache if they are known."""
    c = capability.extension()

    def pack() -> Tensor:
        hh = weight_hh.detach().float()
        proj = None if weight_proj is None else weight_proj.detach().float()
        hidden, size = hh.shape[0] // 4, hh.shape[1]
        packed = _room(c.lstm_packed_bytes(hidden, size, proj is not None, kind))
        c.lstm_pack(
            hidden, size, hh.data_ptr(), 0 if proj is None else proj.data_ptr(), packed.data_ptr(), kind,
            hh.stride(), None if proj is None else proj.stride(),
        )  # fmt: skip
        return packed

    sources = (weight_hh,) if weight_proj is None else (weight_hh, weight_proj)
    return _packed.get(sources, kind, pack)


def _pack_input(weight_ih: Tensor, kind: str) -> Tensor:
    """The same for one direction's input weights."""
    c = capability.extension()

    def pack() -> Tensor:
        weight = weight_ih.detach().float()
        hidden, size = weight.shape[0] // 4, weight.shape[1]
        packed = _room(c.lstm_input_packed_bytes(hidden, size, kind))
        c.lstm_pack_input(hidden, size, weight.data_ptr(), packed.data_ptr(), kind, weight.stride())
        return packed

    return _packed.get((weight_ih,), f"input {kind}", pack)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _input(x: Tensor, weight_ih: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    gates = _input_fake(x, weight_ih, bias, kind)
    rows = x.flatten(0, 1)
    if rows.stride(1) != 1 or rows.stride(0) < rows.shape[1]:
        rows = rows.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    capability.extension().lstm_input(
        rows=rows.shape[0], input=rows.shape[1], hidden=weight_ih.shape[0] // 4, x=rows.data_ptr(),
        x_stride=rows.stride(0), packed=_pack_input(weight_ih, kind).data_ptr(), dtype=kind, bias=_address(bias),
        gates=gates.data_ptr(), threads=torch.get_num_threads(),
    )  # fmt: skip
    return gates


def _input_fake(x: Tensor, weight_ih: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return torch_ops.allocate((x.shape[0], x.shape[1], weight_ih.shape[0]), x)


def _recurrence(
    gates: Sequence[Tensor],  # R of (B, T, 4H), W_ih x + b; or of x (B, T, I), with `from_x`
    weight_hh: Sequence[Tensor],
    weight_proj: Sequence[Tensor],  # empty: no projection
    lengths: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    cell_clip: float,  # 0: off
    proj_clip: float,
    kind: str,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],  # output, h_n, c_n, cells (empty: not wanted)
    **from_x: Any,
) -> None:
    output, h_n, c_n, cells = outputs
    batch, steps, _ = gates[0].shape
    hidden, size = weight_hh[0].shape[0] // 4, weight_hh[0].shape[1]
    gates = [gate if gate.stride(2) == 1 else gate.contiguous() for gate in gates]
    packed = [_pack(w, weight_proj[r] if weight_proj else None, kind) for r, w in enumerate(weight_hh)]
    rows = None if lengths is None else lengths.to(torch.int64).contiguous()
    h_0 = None if h_0 is None else h_0.contiguous()
    c_0 = None if c_0 is None else c_0.contiguous()
    capability.extension().lstm_forward(
        batch=batch, steps=steps, hidden=hidden, proj_size=size, has_proj=bool(weight_proj),
        gates=[gate.data_ptr() for gate in gates], gates_strides=[gate.stride()[:2] for gate in gates],
        packed=[weights.data_ptr() for weights in packed], dtype=kind,
        lengths=_address(rows), h_0=_address(h_0), c_0=_address(c_0),
        output=output.data_ptr(), output_strides=output.stride()[:2], h_n=h_n.data_ptr(), c_n=c_n.data_ptr(),
        cells=cells.data_ptr(), cell_clip=cell_clip, proj_clip=proj_clip, threads=torch.get_num_threads(), **from_x,
    )  # fmt: skip


def _forward(
    gates: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    weight_proj: Sequence[Tensor],
    lengths: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    cell_clip: float,
    proj_clip: float,
    kind: str,
    save_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (gates, weight_hh, weight_proj, lengths, h_0, c_0, cell_clip, proj_clip, kind)
    outputs = _forward_fake(*args, save_cells)
    _recurrence(*args, outputs)
    return outputs


def _forward_fake(
    gates: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    weight_proj: Sequence[Tensor],
    lengths: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    cell_clip: float,
    proj_clip: float,
    kind: str,
    save_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four outputs, uninitialised: output, h_n, c_n, and the cell states of every step (empty unless wanted)."""
    batch, steps, _ = gates[0].shape
    directions, hidden, size = len(gates), weight_hh[0].shape[0] // 4, weight_hh[0].shape[1]
    return (
        torch_ops.allocate((batch, steps, directions * size), gates[0]),
        torch_ops.allocate((directions, batch, size), gates[0]),
        torch_ops.allocate((directions, batch, hidden), gates[0]),
        torch_ops.allocate((directions, batch, steps, hidden) if save_cells else (0,), gates[0]),
    )


def _whole(
    x: Sequence[Tensor],  # R of (B, T, I)
    weight_ih: Sequence[Tensor],
    bias: Sequence[Tensor],  # empty: none
    weight_hh: Sequence[Tensor],
    weight_proj: Sequence[Tensor],
    lengths: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    cell_clip: float,
    proj_clip: float,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _forward_fake(x, weight_hh, weight_proj, lengths, h_0, c_0, cell_clip, proj_clip, kind, False)
    packed = [_pack_input(weight, kind) for weight in weight_ih]
    biases = [b.float().contiguous() for b in bias]
    _recurrence(
        x, weight_hh, weight_proj, lengths, h_0, c_0, cell_clip, proj_clip, kind, outputs,
        input=x[0].shape[2], packed_input=[weight.data_ptr() for weight in packed],
        bias=[b.data_ptr() for b in biases] or [0] * len(packed),
    )  # fmt: skip
    return outputs[:3]


def _whole_fake(
    x: Sequence[Tensor],
    weight_ih: Sequence[Tensor],
    bias: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    weight_proj: Sequence[Tensor],
    lengths: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    cell_clip: float,
    proj_clip: float,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_fake(x, weight_hh, weight_proj, lengths, h_0, c_0, cell_clip, proj_clip, kind, False)[:3]


def _previous(states: Tensor, initial: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The state before each step of (B, T, size), in the direction's own order; ``initial`` (B, size) comes first."""
    if states.shape[1] == 0:
        return states
    if not reverse:
        return torch.cat((initial[:, None], states[:, :-1]), dim=1)
    shifted = torch.cat((states[:, 1:], initial[:, None]), dim=1)
    if lengths is None:
        return shifted
    last = torch.arange(states.shape[1]) == lengths[:, None] - 1
    return torch.where(last[:, :, None], initial[:, None], shifted)


def _backward_direction(
    grad_output: Tensor,  # (B, T, P)
    grad_h: Tensor,  # (B, P), then carried from step to step
    grad_c: Tensor,  # (B, H)
    gates: Tensor,  # (B, T, 4H)
    weight_hh: Tensor,
    weight_proj: Tensor | None,
    lengths: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    output: Tensor,  # (B, T, P)
    cells: Tensor,  # (B, T, H)
    cell_clip: float,
    proj_clip: float,
    reverse: bool,
    rounding: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of gates, weight_hh, weight_proj, h_0 and c_0 of one direction."""
    steps = gates.shape[1]
    h_before = _previous(output, h_0, lengths, reverse)
    c_before = _previous(cells, c_0, lengths, reverse)
    h_before = rounded_rows(h_before, rounding)
    i, f, g, o = (gates + F.linear(h_before, weight_hh)).chunk(4, dim=2)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    tanh_c = torch.tanh(cells)
    # What each gate's own nonlinearity and its partner in the cell contribute, for all steps at once.
    slope_c = o * (1 - tanh_c * tanh_c)
    slope = torch.cat((g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)), dim=2)
    # A clipped value passes no gradient on.
    open_c = cells.abs() < cell_clip if cell_clip > 0 else None
    open_h = output.abs() < proj_clip if proj_clip > 0 else None
    grad_gates = torch.zeros_like(gates)
    grad_hidden = torch.zeros_like(output)  # with respect to h before its clip
    for t in range(steps) if reverse else reversed(range(steps)):
        active = None if lengths is None else (t < lengths)[:, None]
        d_h = grad_output[:, t] + grad_h
        if open_h is not None:
            d_h = d_h * open_h[:, t]
        if active is not None:
            d_h = d_h * active
        grad_hidden[:, t] = d_h
        d_m = d_h if weight_proj is None else d_h @ weight_proj
        d_c = grad_c + d_m * slope_c[:, t]
        if open_c is not None:
            d_c = d_c * open_c[:, t]
        d_gates = torch.cat((d_c, d_c, d_c, d_m), dim=1) * slope[:, t]
        if active is None:
            grad_gates[:, t] = d_gates
            grad_h, grad_c = d_gates @ weight_hh, d_c * f[:, t]
        else:
            d_gates = d_gates * active
            grad_gates[:, t] = d_gates
            grad_h = torch.where(active, d_gates @ weight_hh, grad_h)
            grad_c = torch.where(active, d_c * f[:, t], grad_c)
    flat = grad_gates.flatten(0, 1)
    grad_weight_hh = flat.t() @ h_before.flatten(0, 1)
    grad_weight_proj = None
    if weight_proj is not None:
        grad_weight_proj = grad_hidden.flatten(0, 1).t() @ rounded_rows(o * tanh_c, rounding).flatten(0, 1)
    return grad_gates, grad_weight_hh, grad_weight_proj, grad_h, grad_c


def _backward(
    grads: Sequence[Tensor],  # of output, h_n, c_n
    gates: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    weight_proj: Sequence[Tensor],
    lengths: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    output: Tensor,
    cells: Tensor,
    cell_clip: float,
    proj_clip: float,
    kind: str,
) -> list[Tensor]:
    """Gradients of every gates, weight_hh and weight_proj, then of h_0 and c_0."""
    size, hidden = weight_hh[0].shape[1], cells.shape[3]
    grad_output, grad_h, grad_c = grads
    rounding = _ROUNDING[kind]
    results = []
    for r, gate in enumerate(gates):
        hh = rounded_rows(weight_hh[r].float(), rounding)
        proj = rounded_rows(weight_proj[r].float(), rounding) if weight_proj else None
        columns = slice(r * size, (r + 1) * size)
        results.append(
            _backward_direction(
                grad_output[:, :, columns], grad_h[r], grad_c[r], gate, hh, proj, lengths,
                output.new_zeros(output.shape[0], size) if h_0 is None else h_0[r],
                output.new_zeros(output.shape[0], hidden) if c_0 is None else c_0[r],
                output[:, :, columns], cells[r], cell_clip, proj_clip, r == 1, rounding,
            )
        )  # fmt: skip
    by_kind = list(zip(*results))
    gate_grads, hh_grads, proj_grads = (list(kind) for kind in by_kind[:3])
    return [
        *gate_grads, *hh_grads, *(proj_grads if weight_proj else []), torch.stack(by_kind[3]), torch.stack(by_kind[4])
    ]  # fmt: skip


def _backward_fake(
    grads: Sequence[Tensor],
    gates: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    weight_proj: Sequence[Tensor],
    lengths: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    output: Tensor,
    cells: Tensor,
    cell_clip: float,
    proj_clip: float,
    kind: str,
) -> list[Tensor]:
    sources = [*gates, *weight_hh, *weight_proj, *grads[1:]]
    return [torch_ops.allocate(source.shape, source, torch.float32) for source in sources]


_in = torch_ops.define(
    "lstm_cpu_input", "(Tensor x, Tensor weight_ih, Tensor? bias, str kind) -> Tensor", _input, _input_fake, "CPU"
)
_run = torch_ops.define(
    "lstm_cpu_run",
    "(Tensor[] x, Tensor[] weight_ih, Tensor[] bias, Tensor[] weight_hh, Tensor[] weight_proj, Tensor? lengths, "
    "Tensor? h_0, Tensor? c_0, float cell_clip, float proj_clip, str kind) -> (Tensor, Tensor, Tensor)",
    _whole,
    _whole_fake,
    "CPU",
)
_fwd = torch_ops.define(
    "lstm_cpu_fwd",
    "(Tensor[] gates, Tensor[] weight_hh, Tensor[] weight_proj, Tensor? lengths, Tensor? h_0, Tensor? c_0, "
    "float cell_clip, float proj_clip, str kind, bool save_cells) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    "CPU",
)
_bwd = torch_ops.define(
    "lstm_cpu_bwd",
    "(Tensor[] grads, Tensor[] gates, Tensor[] weight_hh, Tensor[] weight_proj, Tensor? lengths, Tensor? h_0, "
    "Tensor? c_0, Tensor output, Tensor cells, float cell_clip, float proj_clip, str kind) -> Tensor[]",
    _backward,
    _backward_fake,
    "CPU",
)


class _Input(torch.autograd.Function):
    """``x W_ih^T + b`` in float32, gradients of the factors as the product read them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_ih: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(x, weight_ih, bias)
        ctx.kind = kind
        return _in(x, weight_ih, bias, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_ih, bias = ctx.saved_tensors
        rounding, (of_x, of_weight, of_bias, _) = _ROUNDING[ctx.kind], ctx.needs_input_grad
        rows = grad.flatten(0, 1)
        return (
            grad @ rounded_rows(weight_ih.float(), rounding) if of_x else None,
            (rows.t() @ rounded_rows(x, rounding).flatten(0, 1)).to(weight_ih.dtype) if of_weight else None,
            rows.sum(0).to(bias.dtype) if of_bias else None,
            None,
        )


class _Lstm(torch.autograd.Function):
    """The recurrence of R directions. Tensors come flat: R gates, R weight_hh, R weight_proj (or none), h_0, c_0."""

    @staticmethod
    def forward(
        ctx: Any,
        directions: int,
        lengths: Tensor | None,
        clips: tuple[float, float],
        kind: str,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gates, hh, proj = (list(weights[i * directions : (i + 1) * directions]) for i in range(3))
        output, h_n, c_n, cells = _fwd(gates, hh, proj, lengths, h_0, c_0, *clips, kind, True)
        ctx.save_for_backward(lengths, h_0, c_0, output, cells, *weights)
        ctx.facts = (directions, clips, kind)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lengths, h_0, c_0, output, cells, *weights = ctx.saved_tensors
        directions, clips, kind = ctx.facts
        gates, hh, proj = (list(weights[i * directions : (i + 1) * directions]) for i in range(3))
        *of_weights, of_h_0, of_c_0 = _bwd(list(grads), gates, hh, proj, lengths, h_0, c_0, output, cells, *clips, kind)
        if h_0 is None:
            of_h_0 = None
        if c_0 is None:
            of_c_0 = None
        of_weights = [grad.to(weight.dtype) for grad, weight in zip(of_weights, weights)]
        return (None, None, None, None, of_h_0, of_c_0, *of_weights)


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the compiled CPU recurrence cannot run this call."""
    x = args["input"][0]
    if x.device.type != "cpu":
        return f"it runs on the CPU and input is on {x.device}."
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16 and input is {x.dtype}."
    rows, size = args["weight_hh"][0].shape
    if args["weight_dtype"] is torch.int8 and max(rows // 4, size, x.shape[2]) > 65536:
        return "its int8 sums take at most 65536 terms, and a weight matrix has more columns."
    if capability.extension() is None:
        return capability.why_no_extension()
    return None


def _kind(args: Mapping[str, Any]) -> str:
    if args["weight_dtype"] is torch.int8:
        return "int8"
    bf16 = args["weight_dtype"] is torch.bfloat16 or args["input"][0].dtype is torch.bfloat16
    return "bfloat16" if bf16 else "float32"


def _wide_states(args: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if args["initial_state"] is None else tuple(state.float() for state in args["initial_state"])


def lstm(**args: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """See ``ctxfast.functional.lstm``."""
    inputs, weight_ih, bias = args["input"], args["weight_ih"], args["bias"]
    hh, proj, lengths = list(args["weight_hh"]), list(args["weight_proj"] or ()), args["lengths"]
    clips, kind, dtype = (args["cell_clip"] or 0.0, args["proj_clip"] or 0.0), _kind(args), inputs[0].dtype
    h_0, c_0 = _wide_states(args)
    wide = [x.float() for x in inputs] if inputs[0] is not inputs[-1] else [inputs[0].float()] * len(inputs)
    if registry.needs_grad(args):
        biases = [None] * len(wide) if bias is None else bias
        gates = [_Input.apply(x, weight_ih[r], biases[r], kind) for r, x in enumerate(wide)]
        output, h_n, c_n = _Lstm.apply(len(gates), lengths, clips, kind, h_0, c_0, *gates, *hh, *proj)
    else:
        output, h_n, c_n = _run(wide, list(weight_ih), list(bias or ()), hh, proj, lengths, h_0, c_0, *clips, kind)
    return output.to(dtype), (h_n.to(dtype), c_n.to(dtype))


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    hh, proj, lengths, kind = list(args["weight_hh"]), list(args["weight_proj"] or ()), args["lengths"], _kind(args)
    clips, (h_0, c_0) = (args["cell_clip"] or 0.0, args["proj_clip"] or 0.0), _wide_states(args)
    bias = args["bias"] or [None] * len(hh)
    products = [(x.float(), args["weight_ih"][r], bias[r], kind) for r, x in enumerate(args["input"])]
    gates = [_in(*product) for product in products]
    output, h_n, c_n, cells = _fwd(gates, hh, proj, lengths, h_0, c_0, *clips, kind, True)
    grads = [torch.randn_like(output), torch.randn_like(h_n), torch.randn_like(c_n)]
    weights = (list(args["weight_ih"]), list(args["bias"] or ()), hh, proj)
    return [
        (_run, ([product[0] for product in products], *weights, lengths, h_0, c_0, *clips, kind)),
        (_in, products[0]),
        (_fwd, (gates, hh, proj, lengths, h_0, c_0, *clips, kind, False)),
        (_bwd, (grads, gates, hh, proj, lengths, h_0, c_0, output, cells, *clips, kind)),
    ]
