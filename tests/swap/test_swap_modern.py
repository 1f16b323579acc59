# SPDX-License-Identifier: Apache-2.0
"""Encoders that are not built as BERT (norms before, gates, rotary positions, windows) after ``swap_in``: what goes
beyond the table of ``test_swap_kinds``."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.hf_models import IDS, MASK
from torch import Tensor, nn

import ctxfast
from ctxfast.swap import transformers as swap_transformers

transformers = pytest.importorskip("transformers")

REAL = MASK.bool()
SIZES = dict(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=40, pad_token_id=1,
    max_position_embeddings=64, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    bos_token_id=0, eos_token_id=2, mask_token_id=3,
)  # fmt: skip
OPTIONS = {
    "ModernBert": dict(local_attention=4, global_attn_every_n_layers=2, cls_token_id=0, sep_token_id=2),
    "EuroBert": dict(num_attention_heads=4, num_key_value_heads=2),
}


def _model(kind: str, head: str = "Model", **options) -> nn.Module:
    torch.manual_seed(4)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **OPTIONS.get(kind, {}), **options})
    return getattr(transformers, kind + head)(config).eval()


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every call that ran packed."""
    calls, run = [], swap_transformers._run

    def counted(*args, **kwargs):
        calls.append(len(args[2]))
        return run(*args, **kwargs)

    monkeypatch.setattr(swap_transformers, "_run", counted)
    return calls


def _swap(model: nn.Module, packed: list[int], **options) -> None:
    """``swap_in``, whose own run over a small input does not count."""
    report = ctxfast.swap_in(model, **options)
    assert len(report.swapped) == 1 and not report.near_misses
    packed.clear()


def _real(model: nn.Module, **inputs) -> Tensor:
    return model(IDS, attention_mask=MASK, **inputs)[0][REAL]


@pytest.mark.parametrize("kind", ["ModernBert", "NomicBert", "Gte", "EuroBert", "RobertaPreLayerNorm", "MegatronBert"])
def test_thirty_steps_of_training_are_alike(kind: str, packed: list[int]) -> None:
    theirs = _model(kind, "ForSequenceClassification" if kind != "NomicBert" else "ForTokenClassification").train()
    ours = copy.deepcopy(theirs)
    _swap(ours, packed)
    labels = torch.tensor([0, 1, 1]) if kind != "NomicBert" else torch.where(REAL, IDS % 2, -100)
    losses: list[list[float]] = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for step in range(30):
            loss = model(IDS.roll(step, 0) if step < 20 else IDS, attention_mask=MASK, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert len(packed) == 30
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    assert losses[0][-1] < losses[0][20]


@pytest.mark.parametrize(
    ("kind", "head"),
    [("ModernBert", "ForSequenceClassification"), ("ModernBert", "ForMaskedLM"), ("EuroBert", "ForMaskedLM"),
     ("Gte", "ForTokenClassification"), ("JinaEmbeddingsV3", "ForSequenceClassification")],
)  # fmt: skip
@torch.no_grad()
def test_heads(kind: str, head: str, packed: list[int]) -> None:
    model = _model(kind, head)
    expected = model(IDS, attention_mask=MASK)[0]
    _swap(model, packed)
    found = model(IDS, attention_mask=MASK)[0]
    rows = REAL if found.shape[:2] == REAL.shape else slice(None)
    torch.testing.assert_close(found[rows], expected[rows], rtol=1e-4, atol=1e-5)
    assert packed == [MASK.sum()]


@pytest.mark.parametrize(
    "place", ["layers.1", "layers.1.mlp", "layers.2.attn.Wqkv", "rotary_emb", "layers.0.attn_norm"]
)
@torch.no_grad()
def test_parts_that_are_watched_run_themselves(place: str, packed: list[int]) -> None:
    model = _model("ModernBert")
    _swap(model, packed)
    plain, seen = _real(model), []
    model.get_submodule(place).register_forward_hook(lambda module, args, output: seen.append(1))
    torch.testing.assert_close(_real(model), plain, rtol=1e-4, atol=1e-5)
    assert seen and len(packed) == 1


@torch.no_grad()
def test_parts_that_are_replaced_and_settings_that_change_are_noticed(packed: list[int]) -> None:
    model = _model("ModernBert")
    _swap(model, packed)
    before = _real(model)

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    model.layers[0].attn_norm = Half()
    assert not torch.allclose(_real(model), before) and len(packed) == 1
    model.layers[0].attn_norm = nn.Identity()
    torch.testing.assert_close(_real(model), before)
    assert len(packed) == 2
    model.config.local_attention = 2
    found = _real(model)
    ctxfast.restore(model)
    torch.testing.assert_close(found, _real(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before)


@torch.no_grad()
def test_calls_for_the_original(packed: list[int]) -> None:
    model = _model("ModernBert")
    places = torch.arange(7).flip(0)[None]
    calls = [
        dict(position_ids=places),
        dict(output_attentions=True),
        dict(attention_mask={name: None for name in ("full_attention", "sliding_attention")}),
    ]
    calls = [dict(attention_mask=MASK) | call for call in calls]
    expected = [model(IDS, **call) for call in calls]
    _swap(model, packed)
    for call, right in zip(calls, expected):
        with pytest.warns(match="attention weights") if "output_attentions" in call else torch.no_grad():
            found = model(IDS, **call)
        assert found.keys() == right.keys() and torch.equal(found[0], right[0])
    assert not packed
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(attention_mask=MASK)


@torch.no_grad()
def test_other_calls_run_packed(packed: list[int]) -> None:
    model = _model("ModernBert")
    x = torch.randn(3, 7, 16)
    expected = model(inputs_embeds=x, attention_mask=MASK)[0][REAL], model(IDS)[0]
    _swap(model, packed, impl="cpu")
    torch.testing.assert_close(model(None, MASK, None, x)[0][REAL], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(IDS)[0], expected[1], rtol=1e-4, atol=1e-5)
    assert packed == [MASK.sum(), 21]


@torch.no_grad()
def test_copies_pickles_and_int8(packed: list[int]) -> None:
    model = _model("Gte")
    expected = _real(model)
    _swap(model, packed, weight_dtype="int8")
    found = _real(model)
    assert torch.cosine_similarity(found, expected).min() > 0.99 and not torch.allclose(found, expected, atol=1e-5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(_real(other), found)
    assert len(packed) == 3


def test_dropout_inside_the_feed_forward_block_is_the_models_own(packed: list[int]) -> None:
    model = _model("Gte", hidden_dropout_prob=0.3).train()
    _swap(model, packed)
    assert not torch.equal(_real(model), _real(model)) and not packed
    model.eval()
    assert torch.equal(_real(model), _real(model)) and len(packed) == 2


@pytest.mark.parametrize("kind", ["ModernBert", "EuroBert"])
def test_gradient_checkpointing_and_autocast(kind: str, packed: list[int]) -> None:
    model = _model(kind).train()

    def gradient() -> Tensor:
        model.zero_grad()
        _real(model).square().sum().backward()
        grad = next(each.grad for each in model.parameters() if each.dim() == 2)
        assert grad is not None
        return grad.clone()

    expected = gradient()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow = _real(model)
    _swap(model, packed)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-4)
    assert packed == [MASK.sum()]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert _real(model).dtype == narrow.dtype
        torch.testing.assert_close(_real(model), narrow, rtol=0.1, atol=0.1)
