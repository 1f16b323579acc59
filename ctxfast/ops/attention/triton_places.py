# SPDX-License-Identifier: Apache-2.0
"""What depends on places in ``attention`` in Triton: rotations, and the gradient of the relative bias.

Queries and keys are rotated in a pass of their own: the products then read them as they lie in memory (see
``triton_forward``), and a key is rotated once, not once for every block of queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._core import torch_ops
from ..shared import triton_launch, triton_rows
from .reference import rotated
from .same_sequences import derived
from .triton_dropout import is_kept
from .triton_forward import load_rows, placed

_ROWS = 16  # a program's rows of a head


@triton.jit(do_not_specialize=["rows", "heads", "turned"])
def rotate_rows(
    x, places, angles, out, rows, heads, turned, way, stride_t,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x (T, heads, D), tokens ``stride_t`` apart -> out, contiguous: of the first ``turned`` heads, dimension d rotated
    together with d + HALF by the angle of the token's place; ``way`` -1: back. ``rows``: T times heads."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    token, head = row // heads, row % heads
    place = tl.load(places + token, mask=inside, other=0)
    given, made = x + token * stride_t + head * D, out + row * D
    column = tl.arange(0, BLOCK_HALF)
    mask = inside[:, None] & (column < HALF)[None, :]
    first = tl.load(given[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(given[:, None] + HALF + column[None, :], mask=mask, other=0.0).to(tl.float32)
    angle = angles + place[:, None] * (2 * HALF) + column[None, :]
    cosine = tl.load(angle, mask=mask, other=1.0)
    sine = tl.load(angle + HALF, mask=mask, other=0.0) * way
    is_turned = (head < turned)[:, None]
    kind = out.dtype.element_ty
    one = tl.where(is_turned, first * cosine - second * sine, first)
    two = tl.where(is_turned, second * cosine + first * sine, second)
    tl.store(made[:, None] + column[None, :], one.to(kind), mask=mask)
    tl.store(made[:, None] + HALF + column[None, :], two.to(kind), mask=mask)
    if 2 * HALF < D:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        mask = inside[:, None] & (rest < D)[None, :]
        kept = tl.load(given[:, None] + rest[None, :], mask=mask, other=0.0)
        tl.store(made[:, None] + rest[None, :], kept.to(kind), mask=mask)


def _rotated(qkv: Tensor) -> Tensor:
    return torch_ops.allocate(qkv.shape, qkv)


def _places(cu_seqlens: Tensor, tokens: int, positions: int) -> Tensor:
    """(T,) int32: each token's place in its sequence."""

    def make() -> Tensor:
        token = torch.arange(tokens, device=cu_seqlens.device)
        offsets = cu_seqlens.long()
        start = offsets[torch.searchsorted(offsets, token, right=True) - 1]
        return (token - start).clamp_(max=positions - 1).int()

    return derived(cu_seqlens, ("places", tokens, positions), make)


def _rotate(qkv: Tensor, cu_seqlens: Tensor, rotary: Tensor, turned: int, way: float) -> Tensor:
    """``turned``: heads of queries and keys, which come first."""
    out = _rotated(qkv)
    if qkv.numel() == 0:
        return out
    tokens, head_dim, half = qkv.shape[0], qkv.shape[-1], rotary.shape[2]
    if qkv[0].is_contiguous():
        stride = qkv.stride(0)
    else:
        qkv, stride = qkv.contiguous(), qkv[0].numel()
    places = _places(cu_seqlens, tokens, rotary.shape[0])
    heads = qkv[0].numel() // head_dim
    with triton_rows.on_device(qkv):
        triton_launch.launch(
            rotate_rows, (triton.cdiv(tokens * heads, _ROWS),),
            qkv, places, rotary.contiguous(), out, tokens * heads, heads, turned, way, stride,
            D=head_dim, HALF=half, BLOCK_HALF=triton_rows.block(half),
            BLOCK_REST=triton_rows.block(max(1, head_dim - 2 * half)), ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
    return out


def plain_rotation(qkv: Tensor, cu_seqlens: Tensor, rotary: Tensor, turned: int, way: float) -> Tensor:
    """The same in PyTorch's own operations, which can be differentiated."""
    place = _places(cu_seqlens, qkv.shape[0], rotary.shape[0])
    rows = qkv.flatten(1, -2)
    made = rotated(rows[:, :turned], rotary * rotary.new_tensor([1.0, way])[:, None], place)
    return torch.cat((made, rows[:, turned:]), dim=1).view(qkv.shape)


def block_of(dtype: torch.dtype, head_dim: int) -> int:
    """Queries and keys of a block of ``backward_relative``."""
    return 64 if dtype != torch.float32 and head_dim <= 64 else 32


rotation = torch_ops.define("attention_triton_rotate", _rotate, _rotated, triton_rows.DISPATCH)


@triton.jit(do_not_specialize=["tokens", "heads", "blocks", "most", "window", "threshold"])
def backward_relative(
    qkv, cu_seqlens, out, lse, grad_out, relative_bias, diagonals, seeds,
    tokens, heads, blocks, most, window, scale, threshold, rescale,
    stride_t, stride_p, stride_h, stride_d, grad_stride_t, grad_stride_h, grad_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, DROPOUT: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the diagonals of the gradient of scores, (2, S, H, 2 blocks BLOCK), entry blocks BLOCK + (j - i).

    A program takes the blocks of scores that lie ``step`` blocks right of the main diagonal, in order. A block's
    diagonals belong to two rows of BLOCK entries, which the first two indices keep apart: nothing is added to what
    another program writes. Grid: (S H, 2 blocks - 1).
    """
    pair = tl.program_id(0)
    step = tl.program_id(1) - (blocks - 1)
    head, sequence = pair % heads, pair // heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    own = (length + (BLOCK - 1)) // BLOCK
    begin, end = tl.maximum(0, -step), tl.minimum(own, own - step)
    if begin >= end:
        return
    base = qkv + start * stride_t + head.to(tl.int64) * stride_h
    base_k = qkv + start * stride_t + stride_p + (head // GROUP).to(tl.int64) * stride_h
    base_v = base_k + stride_p // GROUP
    base_grad = grad_out + start * grad_stride_t + head.to(tl.int64) * grad_stride_h
    base_out = out + (start * heads + head) * D
    statistic = head.to(tl.int64) * tokens + start
    center = relative_bias + head * (2 * most + 1) + most
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    # Entry n of row m is turned to column (n - m) mod BLOCK: each column is then one diagonal, or two.
    source, is_right = (column + row) % BLOCK, column + row < BLOCK
    right = tl.zeros([BLOCK], tl.float32)
    left = tl.zeros([BLOCK], tl.float32)
    for block in range(begin, end):
        first, first_key = block * BLOCK, (block + step) * BLOCK
        query, key = first + tl.arange(0, BLOCK), first_key + tl.arange(0, BLOCK)
        q = load_rows(base, query, stride_t, stride_d, length, D, BLOCK_D)
        k = load_rows(base_k, key, stride_t, stride_d, length, D, BLOCK_D)
        v = load_rows(base_v, key, stride_t, stride_d, length, D, BLOCK_D)
        d_out = load_rows(base_grad, query, grad_stride_t, grad_stride_d, length, D, BLOCK_D)
        result = load_rows(base_out, query, heads * D, 1, length, D, BLOCK_D)
        delta = tl.sum(d_out.to(tl.float32) * result.to(tl.float32), 1)
        row_lse = tl.load(lse + statistic + query, mask=query < length, other=float("inf"))
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = placed(scores, key[None, :] - query[:, None], center, scale, most, window, True, WINDOW)
        probs = tl.where((key < length)[None, :], tl.exp2(scores - row_lse[:, None]), 0.0)
        d_probs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = is_kept(seeds, pair, first, row, first_key, column, threshold)
            d_probs = tl.where(keep, d_probs * rescale, 0.0)
        turned = tl.gather(probs * (d_probs - delta[:, None]), source, 1)
        right += tl.sum(tl.where(is_right, turned, 0.0), 0)
        left += tl.sum(tl.where(is_right, 0.0, turned), 0)
    size = 2 * blocks * BLOCK
    entry = pair.to(tl.int64) * size + (blocks + step) * BLOCK + tl.arange(0, BLOCK)
    tl.store(diagonals + entry, right)
    tl.store(diagonals + tl.num_programs(0).to(tl.int64) * size + entry - BLOCK, left)


def table_gradient(diagonals: Tensor, columns: int) -> Tensor:
    """(2, S, H, 2 C) sums over diagonals, 0 at C -> (H, columns): those beyond the table go to its ends."""
    sums = diagonals.sum((0, 1))
    center, most = sums.shape[1] // 2, columns // 2
    if most == 0:
        return sums.sum(1, keepdim=True)
    if most >= center:
        sums = torch.nn.functional.pad(sums, (most - center + 1, most - center + 1))
        center = most + 1
    inner = sums[:, center - most + 1 : center + most]
    ends = sums[:, : center - most + 1].sum(1, keepdim=True), sums[:, center + most :].sum(1, keepdim=True)
    return torch.cat((ends[0], inner, ends[1]), dim=1)
