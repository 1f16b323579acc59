# SPDX-License-Identifier: Apache-2.0
"""``lstm`` on the CPU: one call of the compiled kernel for all directions and steps.

Products run as ``weight_dtype`` says; bfloat16 inputs mean bfloat16 products, float16 inputs float32 ones. Gates and
states are float32 inside. Weights are packed once per parameter and found again by later calls. When a gradient is
needed the kernel also stores gates and cells of every step. The recurrence's backward is compiled too; gradients of the
weights and of the input are products over all steps after it. For bfloat16 inputs gates are stored, and all products of
the backward made, in bfloat16; else it is float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import capability, registry, torch_ops
from ..shared import packed_weights
from ..shared.definitions import rounded_rows
from ..shared.weight_cache import WeightCache
from .states import as_int64, previous

_packed = WeightCache()
# The kernel's word for how factors are held -> what the backward pass rounds to.
_ROUNDING = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}


def _pack(weight_hh: Tensor, weight_proj: Tensor | None, kind: str) -> Tensor:
    """The kernel's layout of one direction's recurrent and projection weights, from the cache if they are known.

    ``kind``: how factors are held, with " backward" for that pass, which reads them transposed, as float32, or
    " narrow backward", as bfloat16.
    """
    c = capability.extension()
    weight_dtype, *pass_ = kind.split(" ")
    is_backward, is_narrow = "backward" in pass_, "narrow" in pass_

    def pack() -> Tensor:
        hh = weight_hh.detach().float()
        proj = None if weight_proj is None else weight_proj.detach().float()
        if is_backward and not is_narrow:
            hh = rounded_rows(hh, _ROUNDING[weight_dtype])
            proj = None if proj is None else rounded_rows(proj, _ROUNDING[weight_dtype])
        shape = (hh.shape[0] // 4, hh.shape[1], proj is not None)
        weights = (hh.data_ptr(), hh.stride(), torch_ops.address(proj), () if proj is None else proj.stride())
        threads = torch.get_num_threads()
        if is_backward:
            held = "bfloat16" if is_narrow else "float32"
            packed = packed_weights.on_cache_line(c.lstm_backward_packed_bytes(*shape, held))
            c.lstm_pack_backward(*shape, held, *weights, packed.data_ptr(), threads)
        else:
            packed = packed_weights.on_cache_line(c.lstm_packed_bytes(*shape, kind))
            c.lstm_pack(*shape, kind, *weights, packed.data_ptr(), threads)
        return packed

    sources = (weight_hh,) if weight_proj is None else (weight_hh, weight_proj)
    return _packed.get(sources, kind, pack)


def _pack_input(weight_ih: Tensor, kind: str) -> Tensor:
    """The same for one direction's input weights."""
    c = capability.extension()

    def pack() -> Tensor:
        weight = weight_ih.detach().float()
        shape = (weight.shape[0] // 4, weight.shape[1], kind)
        packed = packed_weights.on_cache_line(c.lstm_input_packed_bytes(*shape))
        c.lstm_pack_input(*shape, weight.data_ptr(), weight.stride(), packed.data_ptr(), torch.get_num_threads())
        return packed

    return _packed.get((weight_ih,), f"input {kind}", pack)


def _rows(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _outputs(
    x: Sequence[Tensor], weight_hh: Sequence[Tensor], save: bool, is_narrow: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output, h_n, c_n; cells and gates (before their nonlinearity) of every step, or empty."""
    batch, steps, _ = x[0].shape
    directions, hidden, size = len(x), weight_hh[0].shape[0] // 4, weight_hh[0].shape[1]
    return (
        torch_ops.allocate((batch, steps, directions * size), x[0]),
        torch_ops.allocate((directions, batch, size), x[0]),
        torch_ops.allocate((directions, batch, hidden), x[0]),
        torch_ops.allocate((directions, batch, steps, hidden) if save else (0,), x[0]),
        torch_ops.allocate(
            (directions, batch, steps, 4 * hidden) if save else (0,), x[0], torch.bfloat16 if is_narrow else None
        ),
    )


def _forward(
    x: Sequence[Tensor],  # R of (B, T, I)
    weight_ih: Sequence[Tensor],
    bias: Sequence[Tensor],  # empty: none
    weight_hh: Sequence[Tensor],
    weight_proj: Sequence[Tensor],  # empty: no projection
    lengths: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    cell_clip: float,  # 0: off
    proj_clip: float,
    kind: str,
    save: bool,
    is_narrow: bool,  # gates are stored in bfloat16
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _outputs(x, weight_hh, save, is_narrow)
    output, h_n, c_n, cells, z = outputs
    hidden, size = weight_hh[0].shape[0] // 4, weight_hh[0].shape[1]
    packed = [_pack(weight, weight_proj[r] if weight_proj else None, kind) for r, weight in enumerate(weight_hh)]
    packed_input = [_pack_input(weight, kind) for weight in weight_ih]
    x, bias, lengths = [_rows(each) for each in x], [each.float().contiguous() for each in bias], as_int64(lengths)
    h_0, c_0 = None if h_0 is None else h_0.contiguous(), None if c_0 is None else c_0.contiguous()
    capability.extension().lstm_forward(
        batch=x[0].shape[0], steps=x[0].shape[1], directions=len(x),
        hidden=hidden, proj_size=size, has_projection=bool(weight_proj), weight_dtype=kind, input=x[0].shape[2],
        x=[each.data_ptr() for each in x], x_strides=[each.stride()[:2] for each in x],
        packed_input=[weights.data_ptr() for weights in packed_input], bias=[each.data_ptr() for each in bias],
        packed=[weights.data_ptr() for weights in packed],
        lengths=torch_ops.address(lengths), h_0=torch_ops.address(h_0), c_0=torch_ops.address(c_0),
        output=output.data_ptr(), output_strides=output.stride()[:2], h_n=h_n.data_ptr(), c_n=c_n.data_ptr(),
        cells=cells.data_ptr(), z=z.data_ptr(), z_dtype=capability.DTYPE_NAMES[z.dtype],
        cell_clip=cell_clip, proj_clip=proj_clip, threads=torch.get_num_threads(),
    )  # fmt: skip
    return outputs


def _gradients(
    weight_hh: Sequence[Tensor], weight_proj: Sequence[Tensor], cells: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of z and of h before its clip; what was projected, or empty; of the bias, h_0 and c_0."""
    directions, batch, steps, hidden = cells.shape
    size = weight_hh[0].shape[1]
    return (
        torch_ops.allocate(z.shape, z),
        torch_ops.allocate((directions, batch, steps, size), z),
        torch_ops.allocate(cells.shape if weight_proj else (0,), z),
        torch_ops.allocate((directions, 4 * hidden), cells),
        torch_ops.allocate((directions, batch, size), cells),
        torch_ops.allocate((directions, batch, hidden), cells),
    )


def _backward(
    grads: Sequence[Tensor],  # of output, h_n, c_n
    weight_hh: Sequence[Tensor],
    weight_proj: Sequence[Tensor],
    lengths: Tensor | None,
    c_0: Tensor | None,
    output: Tensor,
    cells: Tensor,
    z: Tensor,
    cell_clip: float,
    proj_clip: float,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = _gradients(weight_hh, weight_proj, cells, z)
    grad_z, grad_hidden, m, grad_bias, grad_h_0, grad_c_0 = found
    held = capability.DTYPE_NAMES[z.dtype]
    which = "narrow backward" if z.dtype is torch.bfloat16 else "backward"
    directions, batch, steps, hidden = cells.shape
    size = weight_hh[0].shape[1]
    grad_output, grad_h_n, grad_c_n = _rows(grads[0]), grads[1].contiguous(), grads[2].contiguous()
    lengths, c_0 = as_int64(lengths), None if c_0 is None else c_0.contiguous()
    for r in range(directions):
        # Kept until the call returns: an entry of the cache may go with its weight.
        packed = _pack(weight_hh[r], weight_proj[r] if weight_proj else None, f"{kind} {which}")
        columns = slice(r * size, (r + 1) * size)
        capability.extension().lstm_backward(
            batch=batch, steps=steps, reverse=r == 1, hidden=hidden, proj_size=size, has_projection=bool(weight_proj),
            weight_dtype=held, packed=packed.data_ptr(), lengths=torch_ops.address(lengths), z=z[r].data_ptr(),
            cells=cells[r].data_ptr(),
            c_0=0 if c_0 is None else c_0[r].data_ptr(),
            output=output[:, :, columns].data_ptr(), output_strides=output.stride()[:2],
            grad_output=grad_output[:, :, columns].data_ptr(), grad_output_strides=grad_output.stride()[:2],
            grad_h_n=grad_h_n[r].data_ptr(), grad_c_n=grad_c_n[r].data_ptr(), grad_z=grad_z[r].data_ptr(),
            grad_hidden=grad_hidden[r].data_ptr(), m=m[r].data_ptr() if weight_proj else 0,
            grad_bias=grad_bias[r].data_ptr(),
            grad_h_0=grad_h_0[r].data_ptr(), grad_c_0=grad_c_0[r].data_ptr(),
            cell_clip=cell_clip, proj_clip=proj_clip, threads=torch.get_num_threads(),
        )  # fmt: skip
    return found


_fwd = torch_ops.define("lstm_cpu_fwd", _forward, _outputs, "CPU")
_bwd = torch_ops.define("lstm_cpu_bwd", _backward, _gradients, "CPU")


class _Lstm(torch.autograd.Function):
    """R directions. Tensors come flat: x (1 or R), R each (or none) of weight_ih, bias, weight_hh, weight_proj."""

    @staticmethod
    def forward(
        ctx: Any,
        counts: tuple[int, ...],  # how many tensors of each of the five kinds
        lengths: Tensor | None,
        clips: tuple[float, float],
        how: tuple[str, bool],  # ``_kind``; whether the input is bfloat16, and so may be what the backward multiplies
        h_0: Tensor | None,
        c_0: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, *weights = _split(tensors, counts)
        kind, is_narrow = how
        output, h_n, c_n, cells, z = _fwd(
            x * (counts[1] // counts[0]), *weights, lengths, h_0, c_0, *clips, kind, True,
            is_narrow and kind == "bfloat16",
        )  # fmt: skip
        ctx.save_for_backward(lengths, h_0, c_0, output, cells, z, *tensors)
        ctx.facts = (counts, clips, how)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lengths, h_0, c_0, output, cells, z, *tensors = ctx.saved_tensors
        counts, clips, (kind, is_narrow) = ctx.facts
        x, weight_ih, bias, hh, proj = _split(tensors, counts)
        if torch_ops.needs_definition(*grads):
            return _definition_gradients(ctx, grads)
        rounding = _ROUNDING[kind]
        grad_z, grad_hidden, m, of_bias, of_h_0, of_c_0 = _bwd(
            list(grads), hh, proj, lengths, c_0, output, cells, z, *clips, kind
        )
        size = hh[0].shape[1]

        # torch's product of bfloat16 factors is twice as fast and gives bfloat16.
        dtype = torch.bfloat16 if is_narrow else torch.float32
        rounded_z = grad_z.to(dtype)

        def factor(rows: Tensor) -> Tensor:
            return rows.to(dtype) if dtype is rounding else rounded_rows(rows.float(), rounding).to(dtype)

        def of_read(r: int) -> Tensor:
            first = None if h_0 is None else h_0[r]
            before = previous(output[:, :, r * size : (r + 1) * size], first, lengths, r == 1)
            rows = torch.cat([factor(x[r % len(x)]), factor(before)], dim=2).flatten(0, 1)
            return rounded_z[r].flatten(0, 1).t() @ rows

        # x and the h before lie side by side: the gradients of their weights are one product.
        is_trained = any(ctx.needs_input_grad[6 + counts[0] :])
        of_weights = [of_read(r) for r in range(len(hh))] if is_trained else []

        def gradient(what: int, r: int) -> Tensor:
            if what == 0:
                readers = [r] if len(x) > 1 else range(len(weight_ih))
                return sum((rounded_z[d] @ factor(weight_ih[d])).float() for d in readers)
            if what == 1:
                return of_weights[r][:, : x[0].shape[2]]
            if what == 2:
                return of_bias[r]
            if what == 3:
                return of_weights[r][:, x[0].shape[2] :]
            return grad_hidden[r].flatten(0, 1).to(dtype).t() @ factor(m[r]).flatten(0, 1)

        wanted = iter(ctx.needs_input_grad[6:])
        found = [
            gradient(what, r).to(tensor.dtype) if next(wanted) else None
            for what, group in enumerate((x, weight_ih, bias, hh, proj))
            for r, tensor in enumerate(group)
        ]
        return (
            None, None, None, None,
            of_h_0 if ctx.needs_input_grad[4] else None, of_c_0 if ctx.needs_input_grad[5] else None, *found,
        )  # fmt: skip


def _definition_gradients(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """What a backward returns that is itself differentiated."""
    lengths, h_0, c_0, _, _, _, *tensors = ctx.saved_tensors
    counts, (cell_clip, proj_clip), (kind, _) = ctx.facts

    def definition(h_0: Tensor | None, c_0: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight_ih, bias, hh, proj = _split([tensor.float() for tensor in tensors], counts)
        state = None if h_0 is None else (h_0, c_0)
        output, (h_n, c_n) = registry.OPS["lstm"].reference(
            x * (counts[1] // counts[0]), weight_ih, hh, bias or None, proj or None, lengths, state,
            cell_clip or None, proj_clip or None, _ROUNDING[kind],
        )  # fmt: skip
        return output, h_n, c_n

    wanted = ctx.needs_input_grad[4:]
    return None, None, None, None, *torch_ops.definition_gradients(definition, (h_0, c_0, *tensors), wanted, grads)


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    groups, start = [], 0
    for count in counts:
        groups.append(list(tensors[start : start + count]))
        start += count
    return groups


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


def _operands(args: Mapping[str, Any]) -> tuple[list[list[Tensor]], tuple[Any, ...]]:
    """What the operator takes: x, weight_ih, bias, weight_hh, weight_proj; lengths, h_0, c_0, clips, kind."""
    inputs = args["input"]
    wide = [inputs[0].float()] * len(inputs) if inputs[0] is inputs[-1] else [x.float() for x in inputs]
    groups = [wide, *(list(args[name] or ()) for name in ("weight_ih", "bias", "weight_hh", "weight_proj"))]
    state = (None, None) if args["initial_state"] is None else tuple(each.float() for each in args["initial_state"])
    return groups, (args["lengths"], *state, args["cell_clip"] or 0.0, args["proj_clip"] or 0.0, _kind(args))


def lstm(**args: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """See ``ctxfast.functional.lstm``."""
    groups, (lengths, h_0, c_0, *clips, kind) = _operands(args)
    if registry.needs_grad(*args.values()):
        if groups[0][0] is groups[0][-1]:
            groups[0] = groups[0][:1]  # one argument: torch.compile takes no tensor twice
        counts = tuple(len(group) for group in groups)
        tensors = [tensor for group in groups for tensor in group]
        is_narrow = args["input"][0].dtype is torch.bfloat16
        output, h_n, c_n = _Lstm.apply(counts, lengths, tuple(clips), (kind, is_narrow), h_0, c_0, *tensors)
    else:
        output, h_n, c_n, _, _ = _fwd(*groups, lengths, h_0, c_0, *clips, kind, False, False)
    dtype = args["input"][0].dtype
    return output.to(dtype), (h_n.to(dtype), c_n.to(dtype))


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    groups, rest = _operands(args)
    is_narrow = args["input"][0].dtype is torch.bfloat16 and rest[-1] == "bfloat16"
    output, h_n, c_n, cells, z = _fwd(*groups, *rest, True, is_narrow)
    grads = [torch.randn_like(output), torch.randn_like(h_n), torch.randn_like(c_n)]
    lengths, _, c_0, *how = rest
    return [(_fwd, (*groups, *rest, False, False)), (_bwd, (grads, *groups[3:], lengths, c_0, output, cells, z, *how))]
