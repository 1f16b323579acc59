# SPDX-License-Identifier: Apache-2.0
"""``attention`` on the CPU without padding: compiled kernels (csrc/attention/forward.h, backward.h).

float16, which processors do not multiply, goes through them as float32. The forward keeps nothing but its input, and
with dropout two seeds: the backward makes scores and mask again. A sequence's result does not depend on the number of
threads, nor, without dropout, on what it is batched with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core import capability, registry, torch_ops
from ..shared import philox
from . import definition

_MAX_HEAD_DIM = 1024  # of csrc/attention/attention.h


def _arguments(
    qkv: Tensor, cu_seqlens: Tensor, bias: Tensor | None, scale: float, dropout_p: float, seeds: Tensor | None,
    relative_bias: Tensor | None, window: int | None, rotary: Tensor | None, num_kv_heads: int | None,
) -> tuple[tuple[Any, ...], dict[str, int], list[Tensor | None]]:  # fmt: skip
    """What both kernels are called with, by place and by name, and the tensors that these addresses are of."""
    tokens, head_dim = qkv.shape[0], qkv.shape[-1]
    heads, kv_heads = definition.head_counts(qkv, num_kv_heads)
    width = (heads + 2 * kv_heads) * head_dim
    inner = (heads * head_dim, head_dim, 1) if num_kv_heads is None else (head_dim, 1)
    if qkv.stride()[1:] != inner or qkv.stride(0) < width:
        qkv = qkv.contiguous()
    bias = None if bias is None else bias.contiguous()
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        cu_seqlens = cu_seqlens.long()
    cu_seqlens = cu_seqlens.contiguous()
    # The stride of a row that is alone may be anything.
    addresses = (
        tokens, heads, head_dim, cu_seqlens.shape[0] - 1, capability.DTYPE_NAMES[qkv.dtype], qkv.data_ptr(),
        max(qkv.stride(0), width), 0 if bias is None else bias.data_ptr(), cu_seqlens.data_ptr(),
        cu_seqlens.dtype is torch.int64, scale, dropout_p, 0 if seeds is None else seeds.data_ptr(),
    )  # fmt: skip
    places: dict[str, int] = {}
    if relative_bias is not None:
        relative_bias = relative_bias.contiguous()
        places |= dict(relative_bias=relative_bias.data_ptr(), reach=(relative_bias.shape[1] + 1) // 2)
    if window is not None:
        places |= dict(window=window)
    if rotary is not None:
        rotary = rotary.contiguous()
        places |= dict(rotary=rotary.data_ptr(), positions=rotary.shape[0], rotated=2 * rotary.shape[2])
    if num_kv_heads is not None:
        places |= dict(kv_heads=num_kv_heads)
    return addresses, places, [qkv, bias, cu_seqlens, relative_bias, rotary]


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _output(qkv: Tensor, num_kv_heads: int | None) -> Tensor:
    heads, _ = definition.head_counts(qkv, num_kv_heads)
    return torch_ops.allocate((qkv.shape[0], heads, qkv.shape[-1]), qkv)


def _forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, bias: Tensor | None, scale: float, dropout_p: float,
    seeds: Tensor | None, relative_bias: Tensor | None, window: int | None, rotary: Tensor | None,
    num_kv_heads: int | None,
) -> Tensor:  # fmt: skip
    rest = (scale, dropout_p, seeds, relative_bias, window, rotary, num_kv_heads)
    if qkv.dtype is torch.float16:
        return _forward(qkv.float(), cu_seqlens, max_seqlen, _wide(bias), *rest).to(qkv.dtype)
    addresses, places, _held = _arguments(qkv, cu_seqlens, bias, *rest)
    out = _output(qkv, num_kv_heads)
    width, threads = out.shape[1] * out.shape[2], torch.get_num_threads()
    capability.extension().attention_forward(*addresses, out.data_ptr(), width, threads, **places)
    return out


def _gradients(qkv: Tensor, relative_bias: Tensor | None, has_table: bool) -> tuple[Tensor, Tensor]:
    """Of qkv and, or empty, of relative_bias."""
    size = relative_bias.shape if has_table and relative_bias is not None else (0,)
    return torch_ops.allocate(qkv.shape, qkv), torch_ops.allocate(size, qkv, torch.float32)


def _backward(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, bias: Tensor | None, scale: float,
    dropout_p: float, seeds: Tensor | None, relative_bias: Tensor | None, window: int | None, rotary: Tensor | None,
    num_kv_heads: int | None, has_table: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``has_table``: whether the gradient of relative_bias is wanted."""
    rest = (scale, dropout_p, seeds, relative_bias, window, rotary, num_kv_heads)
    if qkv.dtype is torch.float16:
        found = _backward(grad.float(), qkv.float(), cu_seqlens, max_seqlen, _wide(bias), *rest, has_table)
        return found[0].to(qkv.dtype), found[1]
    width = grad.shape[1] * grad.shape[2]
    addresses, places, _held = _arguments(qkv, cu_seqlens, bias, *rest)
    if grad.stride()[1:] != (grad.shape[2], 1) or grad.stride(0) < width:
        grad = grad.contiguous()
    out, table = _gradients(qkv, relative_bias, has_table)
    if has_table:
        table.zero_()  # as it stays without tokens
        places |= dict(grad_relative_bias=table.data_ptr())
    capability.extension().attention_backward(
        *addresses, grad.data_ptr(), max(grad.stride(0), width), out.data_ptr(), qkv.shape[1:].numel(),
        torch.get_num_threads(), **places,
    )  # fmt: skip
    return out, table


_fwd = torch_ops.define("attention_cpu_fwd", _forward, _output, "CPU")
_bwd = torch_ops.define("attention_cpu_bwd", _backward, _gradients, "CPU")


def _mask(qkv: Tensor, cu_seqlens: Tensor, seeds: Tensor | None, constants: definition.Constants) -> Tensor | None:
    """(S, H, L, L): the mask that csrc/attention/attention.h lays down, for the definition."""
    if seeds is None:
        return None
    max_seqlen, dropout_p = constants.max_seqlen, constants.dropout_p
    sequences, (heads, _) = cu_seqlens.shape[0] - 1, definition.head_counts(qkv, constants.num_kv_heads)
    key = torch.arange(max_seqlen, device=qkv.device)
    query, pair = key[:, None], torch.arange(sequences * heads, device=qkv.device).view(sequences, heads, 1, 1)
    counter = (16 * (key // 32) + key % 16, query // 4, pair, seeds[1])
    bits = philox.half(philox.draw(counter, seeds[0]), query % 4, (key // 16) % 2 == 1)
    return philox.multiplier(bits, dropout_p, torch.promote_types(qkv.dtype, torch.float32))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, relative_bias: Tensor | None, cu_seqlens: Tensor,
        rotary: Tensor | None, seeds: Tensor | None, constants: definition.Constants,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(qkv, bias, relative_bias, cu_seqlens, rotary, seeds)
        ctx.constants = constants
        max_seqlen, scale, dropout_p, window, num_kv_heads = constants
        return _fwd(
            qkv, cu_seqlens, max_seqlen, bias, scale, dropout_p, seeds, relative_bias, window, rotary, num_kv_heads
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, cu_seqlens, rotary, seeds = ctx.saved_tensors
        wanted, constants = ctx.needs_input_grad[:3], ctx.constants
        if torch_ops.needs_definition(grad):
            mask = _mask(inputs[0], cu_seqlens, seeds, constants)
            grads = definition.gradients(grad, inputs, cu_seqlens, rotary, constants, mask, wanted)
            return *grads, None, None, None, None
        qkv, bias, relative_bias = inputs
        max_seqlen, scale, dropout_p, window, num_kv_heads = constants
        grad_qkv, grad_table = _bwd(
            grad, qkv, cu_seqlens, max_seqlen, bias, scale, dropout_p, seeds, relative_bias, window, rotary,
            num_kv_heads, wanted[2],
        )  # fmt: skip
        grad_bias = grad_qkv.sum(0) if wanted[1] else None
        return (
            grad_qkv if wanted[0] else None, grad_bias, grad_table if wanted[2] else None, None, None, None, None
        )  # fmt: skip


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the padding-free CPU attention cannot run this call."""
    qkv = args["qkv"]
    if qkv.device.type != "cpu":
        return f"it runs on the CPU and qkv is on {qkv.device}."
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16 and qkv is {qkv.dtype}."
    if qkv.shape[-1] > _MAX_HEAD_DIM:
        return f"it takes heads of at most {_MAX_HEAD_DIM} and head_dim is {qkv.shape[-1]}."
    return None if capability.extension() is not None else capability.why_no_extension()


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    bias: Tensor | None,
    softmax_scale: float | None,
    dropout_p: float,
    relative_bias: Tensor | None = None,
    window: int | None = None,
    rotary: Tensor | None = None,
    num_kv_heads: int | None = None,
) -> Tensor:
    """See ``ctxfast.functional.attention``."""
    scale, seeds = definition.scale(qkv, softmax_scale), philox.draw_seeds(qkv, dropout_p)
    if registry.needs_grad(qkv, bias, relative_bias):
        constants = definition.Constants(max_seqlen, scale, dropout_p, window, num_kv_heads)
        return _Attention.apply(qkv, bias, relative_bias, cu_seqlens, rotary, seeds, constants)
    forward = _forward if torch_ops.is_direct(qkv, cu_seqlens, bias, relative_bias, rotary) else _fwd
    return forward(
        qkv, cu_seqlens, max_seqlen, bias, scale, dropout_p, seeds, relative_bias, window, rotary, num_kv_heads
    )


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    qkv, dropout_p = args["qkv"], args["dropout_p"]
    scale, seeds = definition.scale(qkv, args["softmax_scale"]), philox.draw_seeds(qkv, dropout_p)
    places = [args[name] for name in ("relative_bias", "window", "rotary", "num_kv_heads")]
    given = (qkv, args["cu_seqlens"], args["max_seqlen"], args["bias"], scale, dropout_p, seeds, *places)
    grad = torch.randn(_output(qkv, places[-1]).shape).to(qkv.dtype)
    return [(_fwd, given), (_bwd, (grad, *given, places[0] is not None))]
