# SPDX-License-Identifier: Apache-2.0
"""``attention`` on the CPU without padding: a compiled kernel (csrc/cpu/attention_body.h) over the packed rows.

float16, which processors do not multiply, goes through it as float32. The forward keeps nothing but its input; the
backward recomputes the probabilities of one length group at a time, in torch. A sequence's result does not depend on
what it is batched with, nor on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core import capability, registry, torch_ops

_MAX_HEAD_DIM = 1024  # of csrc/include/ctxfast/attention.h


def _groups(cu_seqlens: Tensor) -> list[tuple[int, list[int]]]:
    """(length, starts of the sequences of that length) for every length above 0, in order of first appearance."""
    bounds = cu_seqlens.tolist()
    groups: dict[int, list[int]] = {}
    for start, end in zip(bounds[:-1], bounds[1:]):
        if end > start:
            groups.setdefault(end - start, []).append(start)
    return list(groups.items())


def _adjoining(packed: Tensor, length: int, starts: list[int]) -> Tensor | None:
    """Sequences of one length that lie one after another, as a view (n, length, ...) of the packed rows; else None."""
    first, count = starts[0], len(starts)
    if any(start != first + i * length for i, start in enumerate(starts)):
        return None
    return packed[first : first + length * count].unflatten(0, (count, length))


def _take(packed: Tensor, length: int, starts: list[int]) -> Tensor:
    """Rows of the sequences of one length: (n, length, ...); a view when they lie one after another."""
    view = _adjoining(packed, length, starts)
    return torch.stack([packed[start : start + length] for start in starts]) if view is None else view


def _put(out: Tensor, length: int, starts: list[int], rows: Tensor) -> None:
    """Write rows (n, length, ...) where ``_take`` read them."""
    view = _adjoining(out, length, starts)
    if view is not None:
        view.copy_(rows)
        return
    for i, start in enumerate(starts):
        out[start : start + length] = rows[i]


def _forward(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, bias: Tensor | None, scale: float) -> Tensor:
    if qkv.dtype is torch.float16:
        wide = _forward(qkv.float(), cu_seqlens, max_seqlen, None if bias is None else bias.float(), scale)
        return wide.to(qkv.dtype)
    tokens, _, heads, head_dim = qkv.shape
    width = 3 * heads * head_dim
    if qkv.stride()[1:] != (heads * head_dim, head_dim, 1) or qkv.stride(0) < width:
        qkv = qkv.contiguous()
    bias = None if bias is None else bias.contiguous()
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        cu_seqlens = cu_seqlens.long()
    cu_seqlens = cu_seqlens.contiguous()
    out = torch_ops.allocate((tokens, heads, head_dim), qkv)
    # The stride of a row that is alone may be anything.
    capability.extension().attention_forward(
        tokens, heads, head_dim, cu_seqlens.shape[0] - 1, qkv.dtype is torch.bfloat16, qkv.data_ptr(),
        max(qkv.stride(0), width), 0 if bias is None else bias.data_ptr(), cu_seqlens.data_ptr(),
        cu_seqlens.dtype is torch.int64, scale, out.data_ptr(), heads * head_dim, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _forward_fake(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, bias: Tensor | None, scale: float) -> Tensor:
    return torch_ops.allocate((qkv.shape[0], qkv.shape[2], qkv.shape[3]), qkv)


def _backward(grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    out = torch_ops.allocate(qkv.shape, qkv)
    for length, starts in _groups(cu_seqlens):
        query, key, value = _take(qkv, length, starts).permute(2, 0, 3, 1, 4).float()  # (n, H, length, D)
        d_context = _take(grad, length, starts).transpose(1, 2).float()
        probs = torch.softmax(torch.matmul(query, key.transpose(-1, -2)) * scale, dim=-1)
        d_value = torch.matmul(probs.transpose(-1, -2), d_context)
        d_probs = torch.matmul(d_context, value.transpose(-1, -2))
        d_scores = probs * (d_probs - (d_probs * probs).sum(-1, keepdim=True)) * scale
        d_query = torch.matmul(d_scores, key)
        d_key = torch.matmul(d_scores.transpose(-1, -2), query)
        _put(
            out,
            length,
            starts,
            torch.stack((d_query, d_key, d_value)).permute(1, 3, 0, 2, 4).to(qkv.dtype),
        )
    return out


def _backward_fake(grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    return torch_ops.allocate(qkv.shape, qkv)


_fwd = torch_ops.define(
    "attention_cpu_fwd",
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, Tensor? bias, float scale) -> Tensor",
    _forward, _forward_fake, "CPU",
)  # fmt: skip
_bwd = torch_ops.define(
    "attention_cpu_bwd", "(Tensor grad, Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale) -> Tensor",
    _backward, _backward_fake, "CPU",
)  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
        ctx.save_for_backward(qkv, cu_seqlens)
        ctx.sizes = (max_seqlen, scale)
        return _fwd(qkv, cu_seqlens, max_seqlen, None, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, cu_seqlens = ctx.saved_tensors
        return _bwd(grad, qkv, cu_seqlens, *ctx.sizes), None, None, None


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the padding-free CPU attention cannot run this call."""
    qkv = args["qkv"]
    if qkv.device.type != "cpu":
        return f"it runs on the CPU and qkv is on {qkv.device}."
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16 and qkv is {qkv.dtype}."
    if args["dropout_p"] > 0:
        return "it has no dropout."
    if qkv.shape[3] > _MAX_HEAD_DIM:
        return f"it takes heads of at most {_MAX_HEAD_DIM} and head_dim is {qkv.shape[3]}."
    return None if capability.extension() is not None else capability.why_no_extension()


def _scale(qkv: Tensor, softmax_scale: float | None) -> float:
    return 1.0 / math.sqrt(qkv.shape[3]) if softmax_scale is None else softmax_scale


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    bias: Tensor | None,
    softmax_scale: float | None,
    dropout_p: float,
) -> Tensor:
    """See ``ctxfast.functional.attention``."""
    scale = _scale(qkv, softmax_scale)
    if registry.needs_grad(dict(qkv=qkv, bias=bias)):
        return _Attention.apply(qkv if bias is None else qkv + bias, cu_seqlens, max_seqlen, scale)
    forward = _forward if torch_ops.is_direct(qkv, cu_seqlens, bias) else _fwd
    return forward(qkv, cu_seqlens, max_seqlen, bias, scale)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    qkv, cu_seqlens, max_seqlen = args["qkv"], args["cu_seqlens"], args["max_seqlen"]
    scale = _scale(qkv, args["softmax_scale"])
    grad = torch.randn(qkv.shape[0], qkv.shape[2], qkv.shape[3]).to(qkv.dtype)
    return [
        (_fwd, (qkv, cu_seqlens, max_seqlen, args["bias"], scale)),
        (_bwd, (grad, qkv, cu_seqlens, max_seqlen, scale)),
    ]
