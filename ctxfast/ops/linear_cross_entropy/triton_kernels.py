# SPDX-License-Identifier: Apache-2.0
"""Kernel of ``linear_cross_entropy`` in Triton: rows of logits to losses and gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ignore_index"])
def softmax(
    logits, labels, scale, losses, stride, ignore_index, V, BLOCK_V: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    """logits (rows, V) -> losses (rows); GRADIENT: logits become scale * (softmax - one at the label), in place.

    Rows lie ``stride`` elements apart and may be read and written up to the next: V is rarely a multiple of anything,
    and a mask that ends there would make every load and store one element wide.

    One program a row. The second pass over a row finds it in L2. A row without a label has loss and gradient zero, one
    with a label that is not a class the loss is nan.
    """
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    label = tl.load(labels + row).to(tl.int64)
    lane = tl.arange(0, BLOCK_V)
    # Every lane keeps the largest value it has seen and its sum; they meet once, at the end of the row.
    largest = tl.full([BLOCK_V], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, stride, BLOCK_V):
        column = first + lane
        z = tl.load(base + column, mask=column < stride, other=float("-inf")).to(tl.float32)
        z = tl.where(column < V, z, float("-inf"))
        # Lanes past the row's end, and logits of -inf, must not meet -inf - -inf.
        grown = tl.maximum(largest, z)
        anchor = tl.where(grown == float("-inf"), 0.0, grown)
        total = total * tl.exp(largest - anchor) + tl.exp(z - anchor)
        largest = grown
    most = tl.max(largest, 0)
    anchor = tl.where(most == float("-inf"), 0.0, most)
    normal = anchor + tl.log(tl.sum(total * tl.exp(largest - anchor), 0))
    has_label = label != ignore_index
    is_class = (label >= 0) & (label < V)
    target = tl.load(base + label, mask=is_class, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(has_label, normal - target, 0.0))
    if GRADIENT:
        share = tl.where(has_label, tl.load(scale + row), 0.0)
        # All threads must have read the label's logit before one of them overwrites it.
        tl.debug_barrier()
        for first in range(0, stride, BLOCK_V):
            column = first + lane
            z = tl.load(base + column, mask=column < stride, other=0.0).to(tl.float32)
            grad = (tl.exp(z - normal) - (column == label).to(tl.float32)) * share
            grad = tl.where(column < V, grad, 0.0)
            tl.store(base + column, grad.to(logits.dtype.element_ty), mask=column < stride)
