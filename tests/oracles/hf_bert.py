# SPDX-License-Identifier: Apache-2.0
"""Tiny random Hugging Face models, and the normal form of their tensor names, for file tests.

Importing it skips the importing test module where transformers is not installed.
"""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers, the peer")

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}


def hf_model(name: str, **changes):
    """A tiny randomly filled Hugging Face model of that class; every tensor differs."""
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def normal_name(name: str) -> str:
    """The normal form of a name of Hugging Face's classes, written down a second time."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        return "bert." + name
    for theirs, ours in (
        ("roberta.", "bert."),
        ("ernie.", "bert."),
        ("lm_head.dense.", "cls.predictions.transform.dense."),
        ("lm_head.layer_norm.", "cls.predictions.transform.LayerNorm."),
        ("lm_head.bias", "cls.predictions.bias"),
        ("lm_head.decoder.", "cls.predictions.decoder."),
        ("classifier.dense.", "bert.pooler.dense."),
        ("classifier.out_proj.", "classifier."),
    ):
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def expected_tensors(model) -> dict[str, torch.Tensor]:
    """The model's tensors as a loaded checkpoint must have them."""
    tensors = {normal_name(name): tensor for name, tensor in model.state_dict().items()}
    return {k: v for k, v in tensors.items() if not k.startswith("cls.predictions.decoder.")}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, same bits."""
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
