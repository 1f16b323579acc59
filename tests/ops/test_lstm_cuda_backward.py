# SPDX-License-Identifier: Apache-2.0
"""What of the persistent backward recurrence needs no GPU and no compiler: the layout of its weights.

The kernel itself runs on the emulator: csrc/tests/test_lstm_persistent_backward.cu.
"""

from __future__ import annotations

import pytest
import torch

from ctxfast.ops.lstm import cuda_backward


def fragments(matrix: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
    """The A operand of mma.m16n8k16 for 16 rows and 16 columns of a matrix: (32 lanes, 8)."""
    lanes = []
    for lane in range(32):
        group, pair = lane // 4, lane % 4
        for register in range(4):
            row = rows[group + 8 * (register % 2)]
            lanes += [matrix[row, columns[2 * pair + odd + 8 * (register // 2)]] for odd in range(2)]
    return torch.stack(lanes)


@pytest.mark.parametrize(
    ("hidden", "size", "projected", "k_groups", "rows"),
    [(128, 64, True, 2, 64), (256, 128, True, 2, 64), (128, 128, False, 1, 16), (128, 128, False, 4, 64)],
)
def test_weights_lie_as_the_kernel_reads_them(
    hidden: int, size: int, projected: bool, k_groups: int, rows: int
) -> None:
    hh = torch.arange(4 * hidden * size, dtype=torch.float32).view(4 * hidden, size)
    proj = -torch.arange(size * hidden, dtype=torch.float32).view(size, hidden) if projected else None
    packed = cuda_backward.pack(hh, proj, k_groups, rows)
    tiles, kpairs = rows // 16, hidden // 8 // k_groups
    of_hh = kpairs * 2 * tiles * 256
    assert packed.shape == ((size // rows) * k_groups, of_hh + (size // 32 * 2048 if projected else 0))
    # Every weight once: in W_hh^T's part and in W_proj^T's.
    assert torch.equal(packed[:, :of_hh].flatten().sort().values, hh.flatten())
    for block, kpair, step, tile in ((0, 0, 0, 0), (1, kpairs - 1, 1, tiles - 1), (packed.shape[0] - 1, 1, 0, 0)):
        where = (block % k_groups) * kpairs + kpair
        cells = [where // 2 * 16 + step * 8 + where % 2 * 4 + s for s in range(4)]
        # Two columns of a lane are gates i, f; eight further are g, o.
        columns = [gate * hidden + cell for gates in ((0, 1), (2, 3)) for cell in cells for gate in gates]
        first = (block // k_groups) * rows + tile * 16
        at = ((kpair * 2 + step) * tiles + tile) * 256
        assert torch.equal(packed[block, at : at + 256], fragments(hh.t(), list(range(first, first + 16)), columns))
    if proj is None:
        return
    assert torch.equal(packed[:, of_hh:].flatten().sort().values, proj.flatten().sort().values)
    for block, kpair, step, tile in ((0, 0, 0, 0), (packed.shape[0] - 1, size // 32 - 1, 1, 3)):
        # Rows of dh as the blocks finish them: rows q and q + 8 of a tile are one lane's pair.
        columns = [
            kpair * 32 + step * 16 + half * 4 + s + 8 * odd for half in (0, 1) for s in range(4) for odd in (0, 1)
        ]
        first = block * 64 + tile * 16
        at = of_hh + ((kpair * 2 + step) * 4 + tile) * 256
        assert torch.equal(packed[block, at : at + 256], fragments(proj.t(), list(range(first, first + 16)), columns))


def test_fake_results_have_the_shapes_of_the_gradients() -> None:
    z = [torch.empty(3, 5, 128, 4, dtype=torch.bfloat16) for _ in range(2)]
    hh = [torch.empty(512, 64, dtype=torch.bfloat16)] * 2
    output, cells = torch.empty(3, 5, 128, dtype=torch.bfloat16), torch.empty(2, 3, 5, 128)
    results = cuda_backward._backward_fake(z, hh, [], None, None, output, cells, None, None, None, 0.0, 0.0)
    assert [(tuple(t.shape), t.dtype) for t in results] == [
        ((3, 5, 128, 4), torch.bfloat16),
        ((3, 5, 128, 4), torch.bfloat16),
        ((2, 3, 5, 64), torch.bfloat16),
        ((2, 3, 64), torch.float32),
        ((2, 3, 128), torch.float32),
    ]
