# SPDX-License-Identifier: Apache-2.0
"""``attention`` by place: relative bias, windows, rotary angles and grouped queries, against plain loops and Hugging
Face's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ctxfast
from ctxfast._core import registry

SPEC = registry.OPS["attention"]
CASES = {case.id: case for case in SPEC.cases()}
NAMES = ("relative-bias", "relative-bias-clamped", "window", "rotary-partial", "grouped-queries", "all-at-once")


def _by_loops(kwargs: dict) -> Tensor:
    """One query, one key at a time, in float64."""
    qkv, table, window, rotary = (kwargs[name] for name in ("qkv", "relative_bias", "window", "rotary"))
    D = qkv.shape[-1]
    rows = qkv.double() if kwargs["bias"] is None else qkv.double() + kwargs["bias"].double()
    groups = kwargs["num_kv_heads"] or rows.shape[2]
    rows = rows.flatten(1, -2).numpy()
    H = rows.shape[1] - 2 * groups
    scale = kwargs["softmax_scale"] or 1 / math.sqrt(D)

    def turned(row, place: int) -> list[float]:
        row = list(row)
        half = 0 if rotary is None else rotary.shape[2]
        for d in range(half):
            cos, sin = rotary[place, :, d].tolist()
            row[d], row[d + half] = row[d] * cos - row[d + half] * sin, row[d + half] * cos + row[d] * sin
        return row

    out = torch.zeros(len(rows), H, D, dtype=torch.float64)
    offsets = kwargs["cu_seqlens"].tolist()
    for start, end in zip(offsets, offsets[1:]):
        for head in range(H):
            shared = head // (H // groups)
            queries = [turned(rows[start + i, head], i) for i in range(end - start)]
            keys = [turned(rows[start + i, H + shared], i) for i in range(end - start)]
            values = torch.tensor(rows[start:end, H + groups + shared])
            for i, query in enumerate(queries):
                scores = []
                for j, key in enumerate(keys):
                    score = scale * sum(one * two for one, two in zip(query, key))
                    if table is not None:
                        reach = table.shape[1] // 2
                        score += float(table[head, min(max(j - i, -reach), reach) + reach])
                    scores.append(-math.inf if window is not None and abs(i - j) > window else score)
                out[start + i, head] = torch.tensor(scores, dtype=torch.float64).softmax(0) @ values
    return out


@pytest.mark.parametrize("name", NAMES)
def test_the_definition_against_loops(name) -> None:
    kwargs = CASES[name].make("cpu", torch.float32, 5)
    got = ctxfast.attention(**kwargs, impl="reference")
    torch.testing.assert_close(got.double(), _by_loops(kwargs), rtol=1e-5, atol=3e-6)


def test_window_and_angles_are_hugging_faces() -> None:
    """ModernBERT's mask for a config's ``sliding_window``, and its rotation."""
    masking = pytest.importorskip("transformers.masking_utils")
    modeling = pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    torch.manual_seed(0)
    config = modeling.ModernBertConfig(local_attention=6)
    L, H, D = 11, 2, 8
    query, key, value = torch.randn(3, 1, H, L, D)
    angles = torch.arange(L)[:, None] * 0.3 ** torch.arange(D // 2)
    twice = torch.cat((angles, angles), dim=-1)[None]
    turned = modeling.apply_rotary_pos_emb(query, key, twice.cos(), twice.sin())
    is_met = masking.sliding_window_bidirectional_overlay(config.sliding_window)
    mask = is_met(0, 0, torch.arange(L)[:, None], torch.arange(L))
    expected = torch.nn.functional.scaled_dot_product_attention(*turned, value, attn_mask=mask)
    qkv = torch.stack([each[0].transpose(0, 1) for each in (query, key, value)], dim=1)
    rotary = torch.stack((angles.cos(), angles.sin()), dim=1)
    got = ctxfast.attention(qkv, torch.tensor([0, L]), L, window=config.sliding_window, rotary=rotary)
    torch.testing.assert_close(got, expected[0].transpose(0, 1))


def test_autocast_leaves_tables_in_float32() -> None:
    kwargs = CASES["all-at-once"].make("cpu", torch.float32, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ctxfast.attention(**kwargs)
    lowered = kwargs | {name: kwargs[name].bfloat16() for name in ("qkv", "bias")}
    assert got.dtype is torch.bfloat16 and torch.equal(got, ctxfast.attention(**lowered))


@pytest.mark.parametrize("name", ["relative-bias-clamped", "window-across-tiles", "rotary-half-of-40", "all-at-once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_the_sequence_alone(name, dtype) -> None:
    """On the CPU: not on what a sequence is batched with, nor on threads, in results and gradients."""
    kwargs = CASES[name].make("cpu", dtype, 5)

    def computed(kwargs: dict) -> tuple[Tensor, Tensor]:
        qkv = kwargs["qkv"].clone().requires_grad_()
        out = ctxfast.attention(**kwargs | dict(qkv=qkv), impl="cpu")
        return out.detach(), torch.autograd.grad(out, qkv, out.detach())[0]

    expected, before = computed(kwargs), torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, computed(kwargs), expected))
    finally:
        torch.set_num_threads(before)
    offsets = kwargs["cu_seqlens"].tolist()
    for start, end in zip(offsets, offsets[1:]):
        alone = dict(qkv=kwargs["qkv"][start:end], cu_seqlens=torch.tensor([0, end - start]), max_seqlen=end - start)
        for one, two in zip(computed(kwargs | alone), expected):
            assert torch.equal(one, two[start:end])


@pytest.mark.parametrize(
    ("impl", "name"),
    [
        ("cpu", "all-at-once"), ("triton", "tiny-all-at-once"),
        pytest.param("triton", "all-at-once", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_dropout_with_places_is_the_definitions(impl: str, name: str) -> None:
    """A kernel's gradients under its own mask are those of the definition under the same mask, which ``create_graph``
    asks for."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    kwargs = CASES[name].make(device, torch.float32, 5)
    if SPEC.supports(SPEC.impl(impl), SPEC.arguments(**kwargs)) is not None:
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    inputs = [kwargs[each].requires_grad_() for each in ("qkv", "relative_bias")]
    loss = ctxfast.attention(**kwargs, dropout_p=0.3, impl=impl).square().sum()
    by_definition = torch.autograd.grad(loss, inputs, create_graph=True)
    for one, two in zip(torch.autograd.grad(loss, inputs), by_definition):
        torch.testing.assert_close(one, two.detach(), rtol=1e-4, atol=1e-4)
