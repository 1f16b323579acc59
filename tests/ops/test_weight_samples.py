# SPDX-License-Identifier: Apache-2.0
"""Samples of packed weights: what is looked at to see a write that PyTorch does not count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ctxfast import functional
from ctxfast.ops.shared import weight_cache
from ctxfast.ops.shared.weight_cache import Seen, forget_packed, sample_columns


@pytest.fixture
def few(monkeypatch) -> None:
    """Weights of these sizes would be compared whole: take samples as of large ones."""
    monkeypatch.setattr(weight_cache, "WHOLE", 0)


@pytest.mark.parametrize("rows, columns", [(1, 9), (9, 1), (1, 1), (3, 1000), (1000, 3), (96, 200), (37, 96), (48, 48)])
@pytest.mark.usefixtures("few")
def test_samples_leave_no_row_and_no_column_out(rows: int, columns: int) -> None:
    sampled = sample_columns(rows, columns, 4)
    assert sampled.shape == (rows, max(-(-columns // rows), min(4, columns)))
    assert torch.equal(sampled - sampled[:, :1], torch.arange(sampled.shape[1]).expand(rows, -1))
    assert sampled.unique().tolist() == list(range(columns))
    turn = -(-columns // sampled.shape[1])  # every so many rows in a row see all columns
    assert all(len(sampled[row : row + turn].unique()) == columns for row in range(rows - turn + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_rows_written_after_columns_and_columns_after_rows(dtype: torch.dtype, layout: str) -> None:
    """Where a row and a column cross the value is there already; every other entry is new."""
    x, weight = torch.randn(3, 384).to(dtype), torch.randn(384, 384).to(dtype)
    weight = nn.Parameter(weight if layout == "contiguous" else weight.t())
    with torch.no_grad():
        for at in range(0, 384, 5):
            column, row = (slice(None), at), (at,)
            for first, second in ((column, row), (row, column)):
                before = weight.detach().clone()
                functional.linear_act(x, weight, impl="cpu")
                for place in (first, second):
                    weight.data[place] = 0
                    found = functional.linear_act(x, weight, impl="cpu")
                    forget_packed(weight)
                    assert torch.equal(found, functional.linear_act(x, weight, impl="cpu")), (first, second)
                weight.copy_(before)


@pytest.mark.parametrize("rows, columns", [(768, 3072), (3072, 768), (1152, 384)])
def test_samples_of_large_weights_are_few(rows: int, columns: int) -> None:
    assert sample_columns(rows, columns, 4).numel() == 4 * rows
    assert sample_columns(rows, columns, 2).numel() == 8 * rows
    assert sample_columns(96, 200, 4).shape == (96, 200)  # 75 KiB: whole


def _strided(dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.randn(60, 80).to(dtype)
    return {
        "contiguous": wide[:24, :70].contiguous(),
        "wide": wide[:9].contiguous(),
        "transposed": wide.t(),
        "rows apart": wide[::2, :50],
        "columns apart": wide[:, 1::3],
        "an offset": wide[3:, 7:],
        "a vector": wide[:, 5],
        "three dimensions": wide.view(10, 6, 80),
        "three dimensions without a matrix": wide.view(10, 6, 80).transpose(1, 2),
        "expanded": wide[:1].expand(7, 80),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8], ids=str)
@pytest.mark.parametrize("layout", _strided(torch.float32))
@pytest.mark.usefixtures("few")
def test_every_sampled_bit_counts(dtype: torch.dtype, layout: str) -> None:
    weight = _strided(dtype)[layout]
    seen = Seen((weight,), lambda _: False, lambda _: None)
    assert seen.are_still((weight,))
    words = weight.data.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    changes = 0
    for at in list(torch.cartesian_prod(*map(torch.arange, weight.shape)).view(-1, weight.dim()))[::7]:
        words[tuple(at)] ^= 1
        changes += not seen.are_still((weight,))
        words[tuple(at)] ^= 1
        assert seen.are_still((weight,))
    assert changes > 0
