# SPDX-License-Identifier: Apache-2.0
"""The Triton product with bias and GELU in its epilogue: by the parity rule of ``linear_act``, and who calls it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.parity import FORWARD, check, run, wide

import ctxfast
from ctxfast._core import capability, registry

if not torch.cuda.is_available() and not capability.is_triton_interpreted():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from ctxfast.ops.shared import triton_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SPEC = registry.OPS["linear_act"]
# The interpreter gets products of bfloat16 wrong.
DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]


def _arguments(M: int, N: int, K: int, dtype: torch.dtype, with_bias: bool = True) -> dict:
    generator = torch.Generator().manual_seed(M)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((M, K), (N, K), (N,)))
    given = dict(x=x, weight=weight / math.sqrt(K), bias=bias if with_bias else None)
    given = {name: value if value is None else value.to(DEVICE, dtype) for name, value in given.items()}
    return given | dict(activation="gelu")


@pytest.fixture
def always(monkeypatch) -> list:
    """Every product goes through the kernel; the list has one entry for each."""
    calls: list[tuple] = []
    monkeypatch.setattr(
        triton_product, "FASTER", {major: lambda *given: calls.append(given) or True for major in (8, 9)}
    )
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 8, 8), (129, 72, 200), (260, 257, 64), (33, 40, 41), (5, 300, 1)], ids=str)
def test_parity(sizes, dtype, always) -> None:
    """Sizes off the tiles on every side; rows of 41 elements cannot be described and are read by pointers."""
    for with_bias in (True, False):
        kwargs = _arguments(*sizes, dtype, with_bias)
        got, plain, right = (
            run("linear_act", given, impl)[0]
            for given, impl in ((kwargs, "triton"), (kwargs, "reference"), (wide(kwargs), "reference"))
        )
        check("output", got, plain, right, dtype, SPEC.ceiling[dtype], FORWARD)
        assert torch.equal(got, run("linear_act", kwargs, "triton")[0])  # repeatable
    assert len(always) == 4


def test_rows_with_gaps_and_more_dimensions(always) -> None:
    kwargs = _arguments(24, 40, 64, torch.float16)
    expected = run("linear_act", kwargs, "triton")[0]
    gaps = torch.full((24, 100), float("nan"), device=DEVICE, dtype=torch.float16)
    for first in (16, 17):  # 17: no multiple of 16 bytes
        gaps[:, first : first + 64] = kwargs["x"]
        got = run("linear_act", {**kwargs, "x": gaps[:, first : first + 64]}, "triton")[0]
        assert torch.equal(got, expected)
    cube = run("linear_act", {**kwargs, "x": kwargs["x"].view(2, 12, 64)}, "triton")[0]
    assert torch.equal(cube, expected.view(2, 12, 40))
    assert run("linear_act", {**kwargs, "x": kwargs["x"][:0]}, "triton")[0].shape == (0, 40)


def test_gelu_far_out_and_near_zero(always) -> None:
    """Its error function is an approximation: small in every part of the curve, the negative tail too."""
    z = torch.cat([torch.linspace(-12, 12, 2001), torch.linspace(-1e-3, 1e-3, 99)]).half().to(DEVICE)
    x = torch.zeros(z.numel(), 8, dtype=torch.float16, device=DEVICE)
    x[:, 0] = z
    weight = torch.eye(8, dtype=torch.float16, device=DEVICE)
    got = ctxfast.linear_act(x, weight, activation="gelu", impl="triton")[:, 0].double()
    right = F.gelu(z.double())
    assert len(always) == 1
    torch.testing.assert_close(got, right, rtol=6e-4, atol=1e-7)


def test_only_gelu_in_16_bits_without_gradients_takes_it(always) -> None:
    half, single = (_arguments(4, 8, 8, dtype) for dtype in (torch.float16, torch.float32))
    ctxfast.linear_act(**single, impl="triton")
    ctxfast.linear_act(**{**half, "activation": "relu"}, impl="triton")
    half["weight"].requires_grad_()
    ctxfast.linear_act(**half, impl="triton").sum().backward()
    assert not always
    with torch.no_grad():
        ctxfast.linear_act(**half, impl="triton")
        second = torch.randn(8, 8, device=DEVICE, dtype=torch.float16)
        ctxfast.feed_forward(half["x"], half["weight"], half["bias"], second, activation="gelu", impl="triton")
    assert always == [(4, 8, 8)] * 2


def test_no_gpu_has_measured_it() -> None:
    assert not triton_product.FASTER
