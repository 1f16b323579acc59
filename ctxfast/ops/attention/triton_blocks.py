# SPDX-License-Identifier: Apache-2.0
"""Which block of which sequence a program of ``attention`` works on, the longest sequences first: a table.

In a ragged batch most programs of a grid made for the longest sequence would start for nothing, and a start holds a
place on an SM for as long as a load takes; the table has a row for every block there is. What begins first takes
longest, so that no long sequence is left for the end. One small kernel makes it from ``cu_seqlens`` on the device: a
captured graph makes it anew at every replay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._core import torch_ops
from .same_sequences import derived

TILE = dict(SEQUENCES=16, OTHERS=128, num_warps=4)


@triton.jit(do_not_specialize=["sequences", "programs"])
def list_blocks(
    cu_seqlens, table, sequences, programs, SIZE: tl.constexpr, SEQUENCES: tl.constexpr, OTHERS: tl.constexpr
):  # fmt: skip
    """cu_seqlens (S + 1) -> table (programs, 4) int32: sequence, first token in it, where it starts, its length.

    Grid: blocks of SEQUENCES sequences, each of which counts the blocks that come before its own; no program waits for
    another. Rows past the last block have length 0.
    """
    program = tl.program_id(0)
    own = program * SEQUENCES + tl.arange(0, SEQUENCES)
    start = tl.load(cu_seqlens + own, mask=own < sequences, other=0).to(tl.int32)
    length = tl.load(cu_seqlens + own + 1, mask=own < sequences, other=0).to(tl.int32) - start
    before = tl.zeros([SEQUENCES], tl.int32)
    total = tl.zeros([], tl.int32)
    for at in range(0, sequences, OTHERS):
        other = at + tl.arange(0, OTHERS)
        inside = other < sequences
        begin = tl.load(cu_seqlens + other, mask=inside, other=0).to(tl.int32)
        size = tl.load(cu_seqlens + other + 1, mask=inside, other=0).to(tl.int32) - begin
        blocks = (size + (SIZE - 1)) // SIZE
        is_before = (size[None, :] == length[:, None]) & (other[None, :] < own[:, None])
        is_before = is_before | (size[None, :] > length[:, None])
        before += tl.sum(tl.where(is_before, blocks[None, :], 0), 1)
        total += tl.sum(blocks, 0)
    mine = tl.where(own < sequences, (length + (SIZE - 1)) // SIZE, 0)
    for block in range(0, tl.max(mine, 0)):
        at = table + (before + block) * 4
        inside = block < mine
        tl.store(at, own, mask=inside)
        tl.store(at + 1, tl.zeros([SEQUENCES], tl.int32) + block * SIZE, mask=inside)
        tl.store(at + 2, start, mask=inside)
        tl.store(at + 3, length, mask=inside)
    # The columns but the length of rows past the last block are read, and never used.
    for at in range(program * OTHERS + total, programs, tl.num_programs(0) * OTHERS):
        row = at + tl.arange(0, OTHERS)
        for column in tl.static_range(4):
            tl.store(table + row * 4 + column, tl.zeros([OTHERS], tl.int32), mask=row < programs)


def block_table(cu_seqlens: Tensor, programs: int, size: int) -> Tensor:
    """(programs, 4) int32, see ``list_blocks``; ``programs`` is no less than there are blocks of ``size`` tokens."""

    def make() -> Tensor:
        sequences = cu_seqlens.shape[0] - 1
        table = torch_ops.allocate((programs, 4), cu_seqlens, torch.int32)
        list_blocks[(triton.cdiv(sequences, TILE["SEQUENCES"]),)](
            cu_seqlens, table, sequences, programs, SIZE=size, **TILE
        )
        return table

    return derived(cu_seqlens, (programs, size), make)
