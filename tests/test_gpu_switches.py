# SPDX-License-Identifier: Apache-2.0
"""What is off until it is measured is on inside its context, and off again after it."""

from __future__ import annotations

import pytest
import torch

import ctxfast
from benchmarks.gpu import switches
from ctxfast._core import capability
from ctxfast.ops.lstm import cuda


def test_rows_in_tiles() -> None:
    before = dict(cuda._MAX_BATCH)
    with switches.rows_in_tiles():
        assert min(cuda._MAX_BATCH.values()) > 1000 and set(cuda._MAX_BATCH) == set(before)
    assert cuda._MAX_BATCH == before


@pytest.mark.skipif(capability.is_triton_interpreted() is False, reason="not on this device: needs the interpreter")
def test_gelu_goes_into_the_product() -> None:
    from ctxfast.ops.shared import triton_product

    x, weight, bias = torch.randn(5, 32).half(), torch.randn(48, 32).half(), torch.randn(48).half()
    calls, plain = [], triton_product.product

    def counted(*args):
        calls.append(args[0].shape)
        return plain(*args)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(triton_product, "product", counted)
        after = ctxfast.linear_act(x, weight, bias, activation="gelu", impl="triton")
        assert not calls
        with switches.all_on():
            inside = ctxfast.linear_act(x, weight, bias, activation="gelu", impl="triton")
        assert len(calls) == 1
        ctxfast.linear_act(x, weight, bias, activation="gelu", impl="triton")
        assert len(calls) == 1
    torch.testing.assert_close(inside, after, rtol=1e-2, atol=2e-2)


def test_full_batches_go_to_sdpa() -> None:
    pytest.importorskip("triton")
    from ctxfast.ops.attention import triton_plan

    before = dict(triton_plan.FULL_BY_SDPA)
    with switches.all_on():
        assert triton_plan.FULL_BY_SDPA[9](32, 512, 12, 64)
    assert triton_plan.FULL_BY_SDPA == before
