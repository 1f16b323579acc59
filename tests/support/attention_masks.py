# SPDX-License-Identifier: Apache-2.0
"""Dropout masks of ``attention``, read out of a kernel's result, and what must hold for them in every kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import ctxfast

H = 2


def packed(lengths: list[int], heads: int, D: int, dtype: torch.dtype, device: str, seed: int = 0) -> dict:
    """Arguments of ``ctxfast.attention``."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return dict(
        qkv=torch.randn(sum(lengths), 3, heads, D, generator=generator).to(device, dtype),
        cu_seqlens=offsets.to(device),
        max_seqlen=max(lengths, default=0),
        bias=(0.3 * torch.randn(3, heads, D, generator=generator)).to(device, dtype),
    )


def read(
    lengths: list[int], p: float, seed: int, impl: str, device: str = "cpu", *,
    dtype: torch.dtype = torch.float32, max_seqlen: int = 0,
) -> list[Tensor]:  # fmt: skip
    """What dropout makes of every weight, (H, length, length) per sequence: 0 or 1 / (1 - p).

    Equal scores, and values that are the columns of a unit matrix: the result is the weights themselves.
    """
    D = 64
    parts = []
    for first in range(0, max(lengths), D):
        qkv = torch.zeros(sum(lengths), 3, H, D, device=device, dtype=dtype)
        at = 0
        for length in lengths:
            for key in range(first, min(first + D, length)):
                qkv[at + key, 2, :, key - first] = 1
            at += length
        offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        torch.manual_seed(seed)
        with torch.no_grad():
            most = max(max_seqlen, *lengths)
            parts.append(ctxfast.attention(qkv, offsets, most, dropout_p=p, impl=impl).float())
    weights = torch.cat(parts, dim=2)
    found, at = [], 0
    for length in lengths:
        found.append(weights[at : at + length, :, :length].transpose(0, 1) * length)
        at += length
    return found


def check_gradients(
    lengths: list[int], impl: str, device: str = "cpu", dtype: torch.dtype = torch.float32, tolerance: float = 1e-4
) -> None:
    """The mask read out of the forward, put into plain PyTorch, gives the result and the gradients."""
    p, seed = 0.3, 5
    masks = read(lengths, p, seed, impl, device, dtype=torch.float16)
    kept = torch.cat([(mask > 0).float().flatten() for mask in masks])
    assert abs(float(kept.mean()) - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
    for mask in masks:
        torch.testing.assert_close(mask[mask > 0], torch.full_like(mask[mask > 0], 1 / (1 - p)), rtol=2e-3, atol=0)

    kwargs = packed(lengths, H, 32, dtype, device)
    qkv, bias = kwargs["qkv"].requires_grad_(), kwargs["bias"].requires_grad_()
    torch.manual_seed(seed)
    got = ctxfast.attention(**kwargs, dropout_p=p, impl=impl)
    grad = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, (qkv, bias), grad)

    wide_qkv, wide_bias = (tensor.detach().double().requires_grad_() for tensor in (qkv, bias))
    expected = []
    for rows, mask in zip((wide_qkv + wide_bias).split(lengths), masks):
        query, key, value = rows.permute(1, 2, 0, 3)
        weights = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(32), dim=-1)
        expected.append(((weights * (mask > 0).double() / (1 - p)) @ value).transpose(0, 1))
    expected = torch.cat(expected)
    right = torch.autograd.grad(expected, (wide_qkv, wide_bias), grad.double())
    torch.testing.assert_close(
        got.double(), expected, rtol=tolerance, atol=tolerance / 10 * float(expected.detach().abs().max())
    )
    for one, two in zip(got_grads, right):
        torch.testing.assert_close(one.double(), two, rtol=tolerance, atol=tolerance / 5 * float(two.abs().max()))


def check_independence(impl: str, device: str = "cpu") -> None:
    """Neighbouring weights, heads, sequences and calls: what weights of one draw share must not show."""
    mask = torch.stack(read([48, 48], 0.5, 3, impl, device)) > 0  # (sequence, head, query, key)
    other = torch.stack(read([48, 48], 0.5, 4, impl, device)) > 0
    signs = mask.float() * 2 - 1
    pairs = {
        "next key": (signs[..., 1:], signs[..., :-1]),
        "key 8 further": (signs[..., 8:], signs[..., :-8]),
        "key 16 further": (signs[..., 16:], signs[..., :-16]),
        "next query": (signs[..., 1:, :], signs[..., :-1, :]),
        "query 4 further": (signs[..., 4:, :], signs[..., :-4, :]),
        "query 8 further": (signs[..., 8:, :], signs[..., :-8, :]),
        "key and query swapped": (signs, signs.transpose(-1, -2)),
        "head": (signs[:, 0], signs[:, 1]),
        "sequence": (signs[0], signs[1]),
        "call": (signs, other.float() * 2 - 1),
    }
    for what, (one, two) in pairs.items():
        product = one * two
        if what == "key and query swapped":
            product = product[..., ~torch.eye(48, dtype=torch.bool, device=device)]
        assert abs(float(product.mean())) < 5 / math.sqrt(product.numel()), what
