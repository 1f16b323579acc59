# SPDX-License-Identifier: Apache-2.0
"""How the Triton kernels of ``attention`` are cut: a table instead of a search at run time.

A search would time dozens of variants in a user's first batches and give different bits on different days. The table
was made without a GPU. Its start is a probe on an H100 (64 x 64 tiles with 4 warps were best from 128 to 512 tokens);
the rest are the largest tiles that do not spill, with dropout and without, by the registers and the instructions of
compiled kernels (csrc/triton_resources.py compiles them all). Up to 128 tokens one kernel that holds a sequence whole
has half the instructions of one over queries and one over keys, and as many warps an SM (8). To be tuned on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import triton

from ..shared.triton_rows import block


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut: tiles of ``rows`` queries x ``columns`` keys.

    ``pairs`` above 0: so many (sequence, head) pairs a program, each of at most ``rows`` tokens and each in one warp.
    ``registers``: a thread has no more, where heads fill the tile; None leaves it to the compiler, which is generous
    where a few instructions would buy one more block an SM.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1
    pairs: int = 0
    registers: int | None = None

    def options(self, head_dim: int) -> dict[str, int | None]:
        """What Triton is told at a launch."""
        is_filled = head_dim == block(head_dim)
        return dict(num_warps=self.warps, num_stages=self.stages, maxnreg=self.registers if is_filled else None)


@dataclass(frozen=True)
class Plan:
    """The tiles of all passes for sequences of at most ``longest`` tokens (0: of any length).

    The backward is one kernel that holds a sequence whole (``whole``), or one over queries and one over keys.
    """

    longest: int
    forward: Tile
    whole: Tile | None = None
    query: Tile | None = None
    key: Tile | None = None


def _pairs(rows: int) -> Tile:
    return Tile(rows, rows, warps=4, pairs=4)


# Rows loaded ahead in the backward over keys on sm_90, heads of 33 to 64: Triton 3.6 has registers left for it (251 of
# 255), Triton 3.9 would spill 32 bytes.
_KEY_STAGES = 2 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else 1

# In order of length; the last plan of every list takes any. By head_dim rounded up to a power of two, 32 at least.
#
# float16 and bfloat16 on sm_90: accumulators of wgmma leave room for a whole backward up to 128 tokens.
_HOPPER = {
    32: (
        Plan(16, _pairs(16), whole=_pairs(16)),
        Plan(32, _pairs(32), whole=_pairs(32)),
        Plan(64, Tile(64, 64, 4), whole=Tile(64, 64, 4)),
        Plan(128, Tile(64, 128, 4), whole=Tile(128, 128, 8)),
        Plan(0, Tile(64, 64, 4, 2, registers=128), query=Tile(64, 64, 4, 2), key=Tile(64, 64, 4, 2)),
    ),
    64: (
        Plan(16, _pairs(16), whole=_pairs(16)),
        Plan(32, _pairs(32), whole=Tile(32, 32, 2)),
        Plan(64, Tile(64, 64, 4), whole=Tile(64, 64, 4)),
        Plan(128, Tile(64, 128, 4), whole=Tile(128, 128, 8)),
        Plan(0, Tile(64, 64, 4, 2, registers=128), query=Tile(64, 64, 4, 2), key=Tile(64, 64, 4, _KEY_STAGES)),
    ),
    128: (
        Plan(16, _pairs(16), whole=_pairs(16)),
        Plan(32, Tile(32, 32, 4), whole=Tile(32, 32, 4)),
        Plan(64, Tile(64, 64, 4), whole=Tile(64, 64, 4)),
        Plan(0, Tile(64, 64, 4, 2), query=Tile(64, 32, 4, 2), key=Tile(32, 64, 8)),
    ),
}
# The same dtypes everywhere else (mma.sync): operands lie in registers too, so tiles are smaller.
_OTHERS = {
    32: (
        _HOPPER[32][0],
        Plan(32, Tile(32, 32, warps=2, pairs=2), whole=_pairs(32)),
        _HOPPER[32][2],
        Plan(0, Tile(64, 64, 4, 2), query=Tile(64, 64, 4, 2), key=Tile(64, 64, 4, 2)),
    ),
    64: (
        *_HOPPER[64][:2],
        Plan(64, Tile(64, 64, 4), query=Tile(64, 32, 4, 2), key=Tile(32, 32, 4, 2)),
        Plan(0, Tile(64, 64, 4, 2), query=Tile(64, 32, 4, 2), key=Tile(32, 32, 4, 2)),
    ),
    128: (
        _HOPPER[128][0],
        Plan(32, Tile(32, 32, 2), whole=Tile(32, 32, 4)),
        Plan(64, Tile(64, 64, 8), whole=Tile(64, 64, 8)),
        Plan(0, Tile(64, 64, 8, 2), query=Tile(64, 32, 4), key=Tile(32, 64, 8, 2)),
    ),
}
# float32 has no tensor cores in full precision: plain multiply-adds, whose operands fill registers soon.
_FLOAT32 = {
    32: (
        Plan(16, _pairs(16), whole=_pairs(16)),
        Plan(32, Tile(32, 32, 4), whole=Tile(32, 32, 4)),
        Plan(0, Tile(32, 32, 8), query=Tile(32, 32, 8, registers=128), key=Tile(32, 32, 8)),
    ),
    64: (
        Plan(16, _pairs(16), whole=Tile(16, 16, 4)),
        Plan(32, Tile(32, 32, 4), whole=Tile(32, 32, 4)),
        Plan(0, Tile(32, 32, 8), query=Tile(32, 32, 8), key=Tile(32, 32, 8)),
    ),
    128: (Plan(0, Tile(32, 32, 8), query=Tile(16, 16, 8), key=Tile(16, 16, 8)),),
}
# float32 with its products rounded to TensorFloat-32 (torch.backends.cuda.matmul.allow_tf32).
_TF32 = _FLOAT32 | {
    64: (
        Plan(16, _pairs(16), whole=Tile(16, 16, 1)),  # four warps put 8 bytes on the stack (sm_80, Triton 3.9)
        _FLOAT32[64][1],
        Plan(0, Tile(32, 32, 4), query=Tile(32, 32, 4), key=Tile(32, 32, 4)),
    )
}

# Full batches of one length without dropout or gradients, in 16 bits: cuDNN's kernels for Hopper overlap what these do
# one after another. Compute capability's major number -> whether SDPA with cuDNN is faster for (sequences, length,
# heads, head_dim); none is entered before a GPU has measured both. FULL_BY_SDPA[9] = lambda *sizes: True times it.
FULL_BY_SDPA: dict[int, Callable[[int, int, int, int], bool]] = {}


def plans(head_dim: int, kind: str, major: int) -> tuple[Plan, ...]:
    """All plans for heads of this size, a kind of product ("half", "float32", "tf32") and compute capability."""
    half = _HOPPER if major == 9 else _OTHERS
    table = {"half": half, "float32": _FLOAT32, "tf32": _TF32}[kind]
    return table[max(32, block(head_dim))]


def choose(head_dim: int, kind: str, major: int, max_seqlen: int, mean: float) -> Plan:
    """The plan of a batch. ``mean`` is tokens by sequences, which the host knows.

    A tile made for the longest sequence is mostly empty when the mean is below half of it: such a batch is looped over
    in the smaller tiles of the last plan.
    """
    *short, last = plans(head_dim, kind, major)
    for plan in short:
        if max_seqlen <= plan.longest:
            return plan if plan.longest <= 64 or mean > plan.longest / 2 else last
    return last


@dataclass(frozen=True)
class Grid:
    """Programs per head of a kernel over blocks of a sequence, blocks of the longest, and whether a table tells each
    program its block (``triton_blocks``) or a division."""

    programs: int
    blocks: int
    has_table: bool


def grid(tokens: int, sequences: int, max_seqlen: int, size: int) -> Grid:
    """The grid over blocks of ``size`` tokens, from what the host knows: a table where it saves a fifth."""
    blocks = -(-max_seqlen // size)
    fewer = tokens // size + sequences  # no less than all sequences' blocks
    has_table = 5 * fewer <= 4 * blocks * sequences
    return Grid(fewer if has_table else blocks * sequences, blocks, has_table)
