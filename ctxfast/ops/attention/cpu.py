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
    qkv: Tensor, cu_seqlens: Tensor, bias: Tensor | None, scale: float, dropout_p: float, seeds: Tensor | None
) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """What both kernels are called with, and the tensors that these addresses are of."""
    tokens, _, heads, head_dim = qkv.shape
    width = 3 * heads * head_dim
    if qkv.stride()[1:] != (heads * head_dim, head_dim, 1) or qkv.stride(0) < width:
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
    return addresses, [qkv, bias, cu_seqlens]


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _output(qkv: Tensor) -> Tensor:
    return torch_ops.allocate((qkv.shape[0], qkv.shape[2], qkv.shape[3]), qkv)


def _forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, bias: Tensor | None, scale: float, dropout_p: float,
    seeds: Tensor | None,
) -> Tensor:  # fmt: skip
    if qkv.dtype is torch.float16:
        wide = _forward(qkv.float(), cu_seqlens, max_seqlen, _wide(bias), scale, dropout_p, seeds)
        return wide.to(qkv.dtype)
    tokens, _, heads, head_dim = qkv.shape
    addresses, _held = _arguments(qkv, cu_seqlens, bias, scale, dropout_p, seeds)
    out = _output(qkv)
    threads = torch.get_num_threads()
    capability.extension().attention_forward(*addresses, out.data_ptr(), heads * head_dim, threads)
    return out


def _gradient(qkv: Tensor) -> Tensor:
    return torch_ops.allocate(qkv.shape, qkv)


def _backward(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, bias: Tensor | None, scale: float,
    dropout_p: float, seeds: Tensor | None,
) -> Tensor:  # fmt: skip
    if qkv.dtype is torch.float16:
        rest = (cu_seqlens, max_seqlen, _wide(bias), scale, dropout_p, seeds)
        return _backward(grad.float(), qkv.float(), *rest).to(qkv.dtype)
    _, _, heads, head_dim = qkv.shape
    width = heads * head_dim
    addresses, _held = _arguments(qkv, cu_seqlens, bias, scale, dropout_p, seeds)
    if grad.stride()[1:] != (head_dim, 1) or grad.stride(0) < width:
        grad = grad.contiguous()
    out = _gradient(qkv)
    capability.extension().attention_backward(
        *addresses, grad.data_ptr(), max(grad.stride(0), width), out.data_ptr(), 3 * width, torch.get_num_threads()
    )
    return out


_fwd = torch_ops.define("attention_cpu_fwd", _forward, _output, "CPU")
_bwd = torch_ops.define("attention_cpu_bwd", _backward, _gradient, "CPU")


def _mask(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float, seeds: Tensor | None) -> Tensor | None:
    """(S, H, L, L): the mask that csrc/attention/attention.h lays down, for the definition."""
    if seeds is None:
        return None
    sequences, heads = cu_seqlens.shape[0] - 1, qkv.shape[2]
    key = torch.arange(max_seqlen, device=qkv.device)
    query, pair = key[:, None], torch.arange(sequences * heads, device=qkv.device).view(sequences, heads, 1, 1)
    counter = (16 * (key // 32) + key % 16, query // 4, pair, seeds[1])
    bits = philox.half(philox.draw(counter, seeds[0]), query % 4, (key // 16) % 2 == 1)
    return philox.multiplier(bits, dropout_p, torch.promote_types(qkv.dtype, torch.float32))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, cu_seqlens: Tensor, max_seqlen: int, scale: float,
        dropout_p: float, seeds: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(qkv, bias, cu_seqlens, seeds)
        ctx.numbers = (max_seqlen, scale, dropout_p)
        return _fwd(qkv, cu_seqlens, max_seqlen, bias, scale, dropout_p, seeds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, cu_seqlens, seeds = ctx.saved_tensors
        max_seqlen, scale, dropout_p = ctx.numbers
        if torch_ops.needs_definition(grad):
            mask = _mask(qkv, cu_seqlens, max_seqlen, dropout_p, seeds)
            constants = definition.Constants(*ctx.numbers)
            wanted = (*ctx.needs_input_grad[:2], False)
            grads = definition.gradients(grad, (qkv, bias, None), cu_seqlens, None, constants, mask, wanted)
            return *grads[:2], None, None, None, None, None
        grad_qkv = _bwd(grad, qkv, cu_seqlens, max_seqlen, bias, scale, dropout_p, seeds)
        grad_bias = grad_qkv.sum(0) if ctx.needs_input_grad[1] else None
        return grad_qkv if ctx.needs_input_grad[0] else None, grad_bias, None, None, None, None, None


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the padding-free CPU attention cannot run this call."""
    qkv, objection = args["qkv"], definition.why_plain(args)
    if objection is not None:
        return objection
    if qkv.device.type != "cpu":
        return f"it runs on the CPU and qkv is on {qkv.device}."
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16 and qkv is {qkv.dtype}."
    if qkv.shape[3] > _MAX_HEAD_DIM:
        return f"it takes heads of at most {_MAX_HEAD_DIM} and head_dim is {qkv.shape[3]}."
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
    if registry.needs_grad(qkv, bias):
        return _Attention.apply(qkv, bias, cu_seqlens, max_seqlen, scale, dropout_p, seeds)
    forward = _forward if torch_ops.is_direct(qkv, cu_seqlens, bias) else _fwd
    return forward(qkv, cu_seqlens, max_seqlen, bias, scale, dropout_p, seeds)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    qkv, dropout_p = args["qkv"], args["dropout_p"]
    scale, seeds = definition.scale(qkv, args["softmax_scale"]), philox.draw_seeds(qkv, dropout_p)
    given = (qkv, args["cu_seqlens"], args["max_seqlen"], args["bias"], scale, dropout_p, seeds)
    return [(_fwd, given), (_bwd, (torch.randn(qkv.shape[0], *qkv.shape[2:]).to(qkv.dtype), *given))]
