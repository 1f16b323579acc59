# SPDX-License-Identifier: Apache-2.0
"""``attention`` on the CPU: every instruction set by the parity rule; bits that depend on the sequence alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from parity import FORWARD, check, run, wide
from torch import Tensor

import ctxfast
from ctxfast._core import capability, registry

SPEC = registry.OPS["attention"]
LENGTHS = (33, 0, 1, 130, 16, 300, 7)
HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ALL = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _packed(dtype: torch.dtype, D: int = 64) -> dict:
    generator = torch.Generator().manual_seed(0)
    return dict(
        qkv=torch.randn(sum(LENGTHS), 3, 3, D, generator=generator).to(dtype),
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32),
        max_seqlen=max(LENGTHS),
        bias=(0.3 * torch.randn(3, 3, D, generator=generator)).to(dtype),
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu(kwargs: dict) -> Tensor:
    return run("attention", kwargs, "cpu")[0]


@ALL
@pytest.mark.parametrize("D", [20, 64])
def test_bits_depend_on_the_sequence_alone(dtype, D) -> None:
    """Not on what a sequence is batched with, nor on threads, whose parts begin inside sequences."""
    kwargs = _packed(dtype, D)
    with _threads(1):
        expected = _cpu(kwargs)
    for threads in (2, 3, 7):
        with _threads(threads):
            assert torch.equal(_cpu(kwargs), expected)
            for start, length in zip(kwargs["cu_seqlens"].tolist(), LENGTHS):
                alone = dict(kwargs, qkv=kwargs["qkv"][start : start + length], max_seqlen=length)
                alone["cu_seqlens"] = torch.tensor([0, length])
                assert torch.equal(_cpu(alone), expected[start : start + length])


@HALF
@pytest.mark.parametrize("D", [17, 32, 64, 128])
def test_every_instruction_set_of_this_machine(dtype, D) -> None:
    kwargs = _packed(dtype, D)
    reference, right = run("attention", kwargs, "reference")[0], run("attention", wide(kwargs), "reference")[0]
    qkv, bias, offsets = kwargs["qkv"], kwargs["bias"], kwargs["cu_seqlens"]
    for isa in capability.extension().cpu_isas():
        out = torch.full((len(qkv), 3, D), torch.nan, dtype=dtype)
        capability.extension().attention_forward(
            len(qkv), 3, D, len(LENGTHS), dtype is torch.bfloat16, qkv.data_ptr(), qkv.stride(0), bias.data_ptr(),
            offsets.data_ptr(), False, D**-0.5, out.data_ptr(), out.stride(0), 2, isa,
        )  # fmt: skip
        check(f"output, {isa}", out, reference, right, dtype, SPEC.ceiling[dtype], FORWARD)


@HALF
def test_rows_of_a_wider_matrix_are_read_in_place(dtype) -> None:
    """And other layouts, and offsets of other types, give the same bits."""
    kwargs = _packed(dtype)
    expected = _cpu(kwargs)
    qkv, offsets = kwargs["qkv"], kwargs["cu_seqlens"]
    rows = torch.full((len(qkv), 3 * 3 * 64 + 5), torch.nan, dtype=dtype)
    rows[:, : 3 * 3 * 64] = qkv.flatten(1)
    part = rows[:, : 3 * 3 * 64].unflatten(1, (3, 3, 64))
    turned = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    assert part.data_ptr() == rows.data_ptr() and not turned.is_contiguous()
    for other in (dict(qkv=part), dict(qkv=turned), dict(cu_seqlens=offsets.long())):
        assert torch.equal(_cpu(kwargs | other), expected)
    every_second = torch.stack((offsets, offsets), dim=1).flatten()[::2]
    assert not every_second.is_contiguous() and torch.equal(_cpu(kwargs | dict(cu_seqlens=every_second)), expected)


def test_float16_is_computed_in_float32() -> None:
    kwargs = _packed(torch.float16)
    as_float = {name: value.float() if name in ("qkv", "bias") else value for name, value in kwargs.items()}
    assert torch.equal(_cpu(kwargs), _cpu(as_float).half())


@HALF
def test_bias_with_and_without_gradients(dtype) -> None:
    """The kernel adds it on its way in; autograd wants it added before."""
    kwargs = _packed(dtype)
    plain = _cpu(kwargs)
    recorded = _cpu(kwargs | dict(qkv=kwargs["qkv"].clone().requires_grad_()))
    assert recorded.requires_grad and not plain.requires_grad
    check("output", plain, recorded, recorded.detach().double(), dtype, SPEC.ceiling[dtype], FORWARD)
    only_bias = _cpu(kwargs | dict(bias=kwargs["bias"].clone().requires_grad_()))
    assert only_bias.requires_grad and torch.equal(only_bias, recorded)


@HALF
def test_not_a_number_stays_in_its_sequence_and_head(dtype) -> None:
    kwargs = _packed(dtype)
    clean = _cpu(kwargs)
    start = int(kwargs["cu_seqlens"][3])
    for part, value in ((0, torch.nan), (1, torch.nan), (2, torch.nan), (0, torch.inf), (2, -torch.inf)):
        qkv = kwargs["qkv"].clone()
        qkv[start + 50, part, 1, 3] = value
        got, expected = _cpu(kwargs | dict(qkv=qkv)), run("attention", kwargs | dict(qkv=qkv), "reference")[0]
        # The reference's grid is padded: it multiplies what lies there, in other sequences, by zero.
        inside = slice(start, start + 130)
        assert torch.equal(torch.isfinite(got[inside]), torch.isfinite(expected[inside]))
        touched = torch.zeros_like(clean, dtype=torch.bool)
        touched[inside, 1] = True
        assert torch.equal(got[~touched], clean[~touched])


def test_wide_heads_are_refused() -> None:
    qkv = torch.zeros(2, 3, 1, 1025)
    with pytest.raises(RuntimeError, match="it takes heads of at most 1024 and head_dim is 1025."):
        ctxfast.attention(qkv, torch.tensor([0, 2]), 2, impl="cpu")
