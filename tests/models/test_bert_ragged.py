# SPDX-License-Identifier: Apache-2.0
"""Ragged batches through a tiny Bert on the CPU: each text's bits are its own, whatever stands beside it."""

from __future__ import annotations

import random

import pytest
import torch

import ctxfast

EDGES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 511, 512)


@pytest.fixture(scope="module")
def model() -> ctxfast.Bert:
    torch.manual_seed(3)
    config = ctxfast.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        initializer_range=0.2,
    )  # fmt: skip
    return ctxfast.Bert(config).eval()


def _batch(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(max(lengths), 1)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.randint(0, 50, (len(lengths), width)), mask.long()


def _check(model: ctxfast.Bert, lengths: list[int], kind: str | None, texts: int) -> None:
    ids, mask = _batch(lengths)
    model.quantize(kind)
    try:
        with torch.no_grad():
            found = model(ids, mask)
            assert torch.isfinite(found.last_hidden_state).all()
            assert not found.last_hidden_state[mask == 0].any()
            for row in random.Random(len(lengths)).sample(range(len(lengths)), min(texts, len(lengths))):
                length = lengths[row]
                if length == 0:
                    assert not found.pooler_output[row].any()
                    continue
                alone = model(ids[row : row + 1, :length])
                assert torch.equal(found.last_hidden_state[row, :length], alone.last_hidden_state[0]), (row, length)
                assert torch.equal(found.pooler_output[row], alone.pooler_output[0]), (row, length)
            if kind is None:
                with ctxfast.use_impl("reference"):
                    plain = model(ids, mask)
                torch.testing.assert_close(found.last_hidden_state, plain.last_hidden_state, rtol=1e-4, atol=2e-5)
    finally:
        model.quantize(None)


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("length", EDGES)
def test_one_text_of_an_edge_length(model: ctxfast.Bert, length: int, kind: str | None) -> None:
    _check(model, [length], kind, 1)


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("seed", range(4))
def test_random_mixtures_of_edge_lengths(model: ctxfast.Bert, seed: int, kind: str | None) -> None:
    _check(model, random.Random(seed).choices(EDGES, k=3 + 4 * seed), kind, 8)


@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_thousand_texts(model: ctxfast.Bert, kind: str | None) -> None:
    _check(model, [min(int(random.Random(i).expovariate(0.1)), 70) for i in range(1000)], kind, 30)


def test_nothing_but_padding(model: ctxfast.Bert) -> None:
    _check(model, [0, 0, 0], None, 3)


def test_bad_input_is_refused_after_good_input_of_the_same_shape(model: ctxfast.Bert) -> None:
    """What was checked once is not checked again, but for what the tensors hold."""
    from ctxfast import functional

    table, ids = torch.randn(5, 8), torch.tensor([0, 4, 1])
    rest = (torch.zeros(3, dtype=torch.int64),) * 2, (table,) * 3, (torch.ones(8), torch.zeros(8))
    qkv, offsets = torch.randn(6, 3, 2, 4), torch.tensor([0, 2, 6])
    with torch.no_grad():
        for _ in range(2):
            functional.embed_layer_norm(ids, *rest[0], *rest[1], *rest[2])
            functional.attention(qkv, offsets, 4)
            model(ids[None])
        for wrong in (-1, 5):
            with pytest.raises(ValueError, match=f"input_ids holds {wrong}"):
                functional.embed_layer_norm(torch.tensor([0, wrong, 1]), *rest[0], *rest[1], *rest[2])
        with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 5"):
            functional.attention(qkv, torch.tensor([0, 2, 5]), 4)
        with pytest.raises(ValueError, match="max_seqlen is 4"):
            functional.attention(qkv, torch.tensor([0, 1, 6]), 4)
        with pytest.raises(ValueError, match="input_ids holds 50"):
            model(torch.tensor([[0, 50, 1]]))
        with pytest.raises(ValueError, match="decoder masks"):
            model(ids[None], torch.ones(1, 1, 3, 3))


def test_ids_are_checked_inside_compiled_programs() -> None:
    operator = torch.ops.ctxfast.embed_layer_norm_cpu_fwd.default
    table, ids = torch.randn(5, 8), torch.tensor([0, 5])
    with pytest.raises(ValueError, match="an id is 5; expected 0..4"):
        operator([ids, ids.clamp(max=1)], [table, table], torch.ones(8), torch.zeros(8), 1e-5)
