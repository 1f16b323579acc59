# SPDX-License-Identifier: Apache-2.0
"""What is peculiar to ``linear_act`` on the CPU: rows that do not feel each other, packed weights never stale, int8."""

from __future__ import annotations

import pytest
import torch

import ctxfast
from ctxfast.ops.shared.packed_weights import CACHE

ROWS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 100, 129, 257)


@pytest.mark.parametrize(("columns", "out"), [(768, 768), (768, 3072), (3072, 768), (384, 1536), (65, 33)])
@pytest.mark.parametrize("weight_dtype", [None, torch.int8])
def test_a_rows_bits_do_not_depend_on_the_others(columns: int, out: int, weight_dtype: torch.dtype | None) -> None:
    x, weight, bias = torch.randn(300, columns), torch.randn(out, columns) / columns**0.5, torch.randn(out)
    options = dict(activation="gelu", weight_dtype=weight_dtype, impl="cpu")
    whole = ctxfast.linear_act(x, weight, bias, **options)
    for count in ROWS:
        first = int(torch.randint(0, 300 - count + 1, ()))
        part = ctxfast.linear_act(x[first : first + count], weight, bias, **options)
        assert torch.equal(part, whole[first : first + count]), count


@pytest.mark.parametrize("weight_dtype", [None, torch.int8])
def test_changed_weights_are_packed_anew(weight_dtype: torch.dtype | None) -> None:
    x, weight = torch.randn(4, 32), torch.randn(16, 32)
    before = ctxfast.linear_act(x, weight, weight_dtype=weight_dtype, impl="cpu")
    weight.data.mul_(-1)  # leaves the version counter alone
    after = ctxfast.linear_act(x, weight, weight_dtype=weight_dtype, impl="cpu")
    torch.testing.assert_close(after, -before)


def test_int8_is_near_and_exact_on_whole_steps() -> None:
    x, weight = torch.randint(-127, 128, (5, 64)).float(), torch.randint(-127, 128, (7, 64)).float()
    x[:, 0], weight[:, 0] = 127.0, 127.0  # so a step is 1
    assert torch.equal(ctxfast.linear_act(x, weight, weight_dtype=torch.int8, impl="cpu"), x @ weight.t())
    x, weight = torch.randn(50, 768), torch.randn(768, 768) / 768**0.5
    wide = x @ weight.t()
    error = (ctxfast.linear_act(x, weight, weight_dtype=torch.int8, impl="cpu") - wide).norm() / wide.norm()
    assert 1e-3 < error < 2e-2


def test_int8_is_for_inference() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="its int8 product has no gradient"):
        ctxfast.linear_act(torch.randn(2, 4), weight, weight_dtype=torch.int8, impl="cpu")
    assert ctxfast.linear_act(torch.randn(2, 4), weight, weight_dtype=torch.int8).requires_grad  # the reference has
    with pytest.raises(ValueError, match="weight_dtype"):
        ctxfast.linear_act(torch.randn(2, 4), weight, weight_dtype=torch.float16)


def test_passing_weights_are_not_kept() -> None:
    x, weight = torch.randn(5, 64), torch.randn(48, 64, requires_grad=True)
    held = len(CACHE)
    ctxfast.linear_act(x, weight, impl="cpu").sum().backward()  # in training: another weight at every step
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # a new rounded copy at every call
        ctxfast.linear_act(x, weight, impl="cpu")
    assert weight.grad is not None and len(CACHE) == held
    with torch.no_grad():
        ctxfast.linear_act(x, weight, impl="cpu")
    assert len(CACHE) == held + 1
    del weight
    assert len(CACHE) == held


@pytest.mark.parametrize("rows", [1, 40, 130])
def test_bfloat16_on_either_side_of_the_change_of_kernel(rows: int) -> None:
    x, weight, bias = torch.randn(rows, 96).bfloat16(), torch.randn(70, 96).bfloat16(), torch.randn(70).bfloat16()
    found = ctxfast.linear_act(x[:, :90], weight[:, :90], bias, activation="gelu", impl="cpu")
    wide = ctxfast.linear_act(
        x[:, :90].double(), weight[:, :90].double(), bias.double(), activation="gelu", impl="reference"
    )
    torch.testing.assert_close(found.double(), wide, rtol=8e-3, atol=2e-2)
