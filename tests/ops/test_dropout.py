# SPDX-License-Identifier: Apache-2.0
"""Dropout of the ops that have it: the share kept, the scale, repeatability from a seed."""

from __future__ import annotations

import pytest
import torch

import ctxfast

P = 0.25
CU_SEQLENS = torch.tensor([0, 40, 90], dtype=torch.int32)


def _add_layer_norm(p: float) -> torch.Tensor:
    # Rows (1, -1, 1, -1, ...): dropped elements come out nearer to the middle than kept ones.
    x = torch.ones(200, 400)
    x[:, 1::2] = -1
    return ctxfast.add_layer_norm(x, None, torch.ones(400), torch.zeros(400), dropout_p=p)


def _embed_layer_norm(p: float) -> torch.Tensor:
    ids = torch.zeros(200, dtype=torch.int64)
    tables = [torch.randn(1, 400) for _ in range(3)]
    return ctxfast.embed_layer_norm(ids, ids, ids, *tables, torch.ones(400), torch.zeros(400), dropout_p=p)


def _attention(p: float) -> torch.Tensor:
    qkv = torch.zeros(90, 3, 2, 64)
    qkv[:, 2] = 1  # equal weights, values of one: the output is the sum of the kept weights
    return ctxfast.attention(qkv, CU_SEQLENS, 50, dropout_p=p)


OPS = [_add_layer_norm, _embed_layer_norm, _attention]


@pytest.mark.parametrize("op", OPS)
def test_zero_probability_drops_nothing(op) -> None:
    torch.manual_seed(1)
    first = op(0.0)
    torch.manual_seed(1)
    assert torch.equal(op(0.0), first)


@pytest.mark.parametrize("op", OPS)
def test_seed_repeats(op) -> None:
    torch.manual_seed(3)
    first = op(P)
    torch.manual_seed(3)
    again = op(P)
    torch.manual_seed(4)
    other = op(P)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_share_dropped_before_layer_norm() -> None:
    middle = _add_layer_norm(P).abs() < 0.5
    assert abs(float(middle.float().mean()) - P) < 0.01


def test_share_dropped_after_layer_norm() -> None:
    torch.manual_seed(0)
    plain = _embed_layer_norm(0.0)
    torch.manual_seed(0)
    dropped = _embed_layer_norm(P)
    zero = dropped == 0
    assert abs(float(zero.float().mean()) - P) < 0.01
    torch.testing.assert_close(dropped[~zero], plain[~zero] / (1 - P))


def test_attention_weights_keep_their_mean() -> None:
    kept = _attention(P)
    assert abs(float(kept.mean()) - 1) < 0.02
    assert float(kept.std()) > 0.01
