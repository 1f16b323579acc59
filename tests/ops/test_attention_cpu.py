# SPDX-License-Identifier: Apache-2.0
"""``attention`` on the CPU: every instruction set by the parity rule; bits of a sequence by itself; dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support import attention_masks
from support.parity import FORWARD, GRADIENT, check, gradients, run, wide
from torch import Tensor

import ctxfast
from ctxfast._core import capability, registry

SPEC = registry.OPS["attention"]
LENGTHS = (33, 0, 1, 130, 16, 300, 7)
HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ALL = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _packed(dtype: torch.dtype, D: int = 64) -> dict:
    return attention_masks.packed(list(LENGTHS), 3, D, dtype, "cpu")


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


def _with_gradient(kwargs: dict) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of qkv for a gradient that is the first part of its rows."""
    qkv = kwargs["qkv"].detach().requires_grad_()
    out = ctxfast.attention(**kwargs | dict(qkv=qkv), impl="cpu")
    return out.detach(), torch.autograd.grad(out, qkv, kwargs["qkv"][:, 0].contiguous())[0]


@ALL
@pytest.mark.parametrize("D", [20, 64])
def test_bits_depend_on_the_sequence_alone(dtype, D) -> None:
    """Not on what a sequence is batched with, nor on threads, whose parts begin inside sequences."""
    kwargs = _packed(dtype, D)
    with _threads(1):
        expected = _with_gradient(kwargs)
        assert torch.equal(_cpu(kwargs), expected[0])
    for threads in (2, 3, 7):
        with _threads(threads):
            assert all(map(torch.equal, _with_gradient(kwargs), expected))
            for start, length in zip(kwargs["cu_seqlens"].tolist(), LENGTHS):
                alone = dict(kwargs, qkv=kwargs["qkv"][start : start + length], max_seqlen=length)
                alone["cu_seqlens"] = torch.tensor([0, length])
                for one, two in zip(_with_gradient(alone), expected):
                    assert torch.equal(one, two[start : start + length])


def _forward_and_back(kwargs: dict, isa: str, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """The result and the gradient of qkv on one instruction set."""
    qkv, bias, offsets = kwargs["qkv"], kwargs["bias"], kwargs["cu_seqlens"]
    tokens, _, heads, D = qkv.shape
    grad, seeds = qkv[:, 0].contiguous(), torch.tensor([-5, 7])
    out, grad_qkv = torch.full_like(grad, torch.nan), torch.full_like(qkv, torch.nan)
    common = (
        tokens, heads, D, len(offsets) - 1, capability.DTYPE_NAMES[qkv.dtype], qkv.data_ptr(), qkv.stride(0),
        bias.data_ptr(), offsets.data_ptr(), False, D**-0.5, dropout_p, seeds.data_ptr(),
    )  # fmt: skip
    extension = capability.extension()
    extension.attention_forward(*common, out.data_ptr(), out.stride(0), 2, isa)
    extension.attention_backward(*common, grad.data_ptr(), grad.stride(0), grad_qkv.data_ptr(), qkv.stride(0), 2, isa)
    return out, grad_qkv


@HALF
@pytest.mark.parametrize("D", [17, 32, 64, 128])
def test_every_instruction_set_of_this_machine(dtype, D) -> None:
    kwargs = _packed(dtype, D)
    plain, plain_grads, given = gradients("attention", kwargs, ("qkv",), "reference", [kwargs["qkv"][:, 0]])
    right, right_grads, _ = gradients("attention", wide(kwargs), ("qkv",), "reference", given)
    for isa in capability.extension().cpu_isas():
        out, grad = _forward_and_back(kwargs, isa)
        ceiling = SPEC.ceiling[dtype]
        check(f"output, {isa}", out, plain[0], right[0].detach(), dtype, ceiling, FORWARD)
        check(f"gradient, {isa}", grad, plain_grads[0][1], right_grads[0][1], dtype, ceiling, GRADIENT)


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
    kwargs = _packed(dtype)
    plain = _cpu(kwargs)
    for name in ("qkv", "bias"):
        recorded = _cpu(kwargs | {name: kwargs[name].clone().requires_grad_()})
        assert recorded.requires_grad and not plain.requires_grad and torch.equal(recorded, plain)


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


# dropout


@pytest.mark.parametrize("lengths", [[13, 9], [1, 50, 33], [97], [140, 64]], ids=str)
def test_dropout_mask_and_gradients(lengths) -> None:
    attention_masks.check_gradients(lengths, "cpu")


def test_dropout_in_bfloat16() -> None:
    attention_masks.check_gradients([60, 7], "cpu", dtype=torch.bfloat16, tolerance=0.05)


def test_dropout_masks_are_independent() -> None:
    attention_masks.check_independence("cpu")


@HALF
def test_dropout_on_every_instruction_set(dtype) -> None:
    """The mask is the same: a weight that is kept by one and dropped by another would show."""
    kwargs = _packed(dtype)
    first, *others = [_forward_and_back(kwargs, isa, 0.4) for isa in capability.extension().cpu_isas()]
    plain = _forward_and_back(kwargs, "generic")
    for found in others:
        for one, two, without in zip(first, found, plain):
            torch.testing.assert_close(one, two, rtol=0, atol=2e-2 if dtype is torch.bfloat16 else 2e-6)
            assert float((one - without).abs().max()) > 0.1


def test_dropout_does_not_depend_on_threads() -> None:
    kwargs = _packed(torch.float32) | dict(dropout_p=0.1)

    def drawn(threads: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        with _threads(threads):
            return _with_gradient(kwargs)

    expected = drawn(1)
    for threads in (2, 5):
        assert all(map(torch.equal, drawn(threads), expected))


@pytest.mark.parametrize("dropout_p", [1e-9, 0.99999])
def test_dropout_near_its_ends(dropout_p) -> None:
    kwargs = _packed(torch.float32)
    out, grad = _with_gradient(kwargs | dict(dropout_p=dropout_p))
    assert torch.isfinite(out).all() and torch.isfinite(grad).all()
    if dropout_p < 0.5:
        assert torch.equal(out, _cpu(kwargs))


def test_dropout_under_a_compiler() -> None:
    kwargs = _packed(torch.float32)
    qkv = kwargs.pop("qkv").requires_grad_()

    def call(qkv: Tensor) -> Tensor:
        return ctxfast.attention(qkv, **kwargs, dropout_p=0.2, impl="cpu").square().sum()

    found = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(function(qkv), qkv)[0])
    assert torch.equal(*found)


def test_wide_heads_are_refused() -> None:
    qkv = torch.zeros(2, 3, 1, 1025)
    with pytest.raises(RuntimeError, match="it takes heads of at most 1024 and head_dim is 1025."):
        ctxfast.attention(qkv, torch.tensor([0, 2]), 2, impl="cpu")
