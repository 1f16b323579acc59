# SPDX-License-Identifier: Apache-2.0
"""Encoders of Transformers that ``swap_in`` does not run: none stays without a word."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from torch import nn

import ctxfast
from ctxfast.swap import unknown_encoders

transformers = pytest.importorskip("transformers")

_BERTS = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40)
# Model -> options, where its stacks are, and what is said of the first.
NAMED = {
    "DebertaV2Model": (_BERTS, ["encoder"], "terms of relative positions"),
    "FunnelModel": (
        dict(block_sizes=[1, 1], d_model=16, n_head=2, d_head=8),
        ["encoder", "decoder"],
        "its layers pool",
    ),
    "GPT2Model": (dict(n_embd=16, n_layer=2, n_head=2), ["(the model)"], "it is a decoder"),
    "LongformerModel": (dict(_BERTS, attention_window=4), ["encoder"], "over some keys only"),
    "SwinModel": (
        dict(embed_dim=8, depths=[1, 1], num_heads=[1, 1]),
        ["encoder"],
        "its layers, SwinStage, are none of",
    ),
    "T5Model": (dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2), ["encoder", "decoder"], "position bias"),
    "XLMModel": (dict(emb_dim=16, n_layers=2, n_heads=2), ["(the model)"], "its layers, MultiHeadAttention, are none"),
    "XLNetModel": (dict(d_model=16, n_layer=2, n_head=2, d_inner=32), ["(the model)"], "terms of relative positions"),
}


def _on_meta(name: str, options: dict) -> nn.Module:
    kind = getattr(transformers, name)
    with torch.device("meta"):
        return kind(kind.config_class(**options))


@pytest.mark.parametrize("name", NAMED)
def test_a_stack_of_attention_layers_is_named_once_with_a_reason(name: str) -> None:
    options, paths, sentence = NAMED[name]
    model = _on_meta(name, options)
    report = ctxfast.swap_in(model)
    assert not report.swapped and [path for path, _ in report.near_misses] == paths
    assert sentence in report.near_misses[0][1] and sentence in str(report)
    assert ctxfast.swap_in(model, only="LSTM").near_misses == ()


def test_a_stack_of_somebodys_own_under_transformers_models() -> None:
    class Attention(nn.Module):
        pass

    class Own(transformers.BertPreTrainedModel):
        def __init__(self) -> None:
            super().__init__(transformers.BertConfig())
            self.blocks = nn.ModuleList([nn.ModuleDict({"mixer": Attention()})])

    assert ctxfast.swap_in(Own()).near_misses == (
        ("(the model)", "its layers, Attention, are none of those that ctxfast computes packed."),
    )


def test_swapped_encoders_and_their_groups_are_not_named() -> None:
    model = transformers.AlbertModel(transformers.AlbertConfig(**_BERTS, embedding_size=8)).eval()
    for _ in range(2):
        report = ctxfast.swap_in(model)
        assert [path for path, *_ in report.swapped] == ["encoder"] and report.near_misses == ()


def _names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found = (name if isinstance(name, str) else name[0] for name in MODEL_MAPPING_NAMES.values())
    return sorted(set(found))


@pytest.mark.slow
def test_every_model_of_transformers_is_named() -> None:
    """Of default configurations, without memory: where a class is called an attention, something is said."""
    silent, looked_at = [], 0
    for name in _names():
        model = None
        with contextlib.suppress(Exception):  # some cannot be built so, for lack of a package or of a configuration
            model = _on_meta(name, {})
        if model is None:
            continue
        looked_at += 1
        has_attention = any(re.search("attention", type(each).__name__, re.IGNORECASE) for each in model.modules())
        report = ctxfast.swap_in(model)
        if has_attention and not report.swapped and not report.near_misses:
            silent.append(name)
    assert looked_at > 200 and not silent


def test_reasons_are_for_classes_that_are_not_swapped() -> None:
    from ctxfast.swap.transformers_kinds import ENCODERS

    assert not unknown_encoders._REASONS.keys() & {kind.name for kind in ENCODERS.values()}
