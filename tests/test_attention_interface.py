# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="ctxfast": Transformers' own models with our attention alone."""

from __future__ import annotations

import pytest
import torch
from hf_models import IDS, MASK, tiny_model

import ctxfast
from ctxfast.nn import attention_interface

transformers = pytest.importorskip("transformers")
KINDS = ("Bert", "Roberta", "Electra", "DistilBert", "Ernie", "Camembert", "XLMRoberta")


@pytest.fixture(autouse=True)
def _registered() -> None:
    assert ctxfast.register_attention() == ctxfast.register_attention() == "ctxfast"


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind) -> None:
    model = tiny_model(kind).train()
    found = {}
    for name in ("sdpa", "ctxfast"):
        model.set_attn_implementation(name)
        for mask in (MASK, None):
            out = model(IDS, attention_mask=mask).last_hidden_state
            real = out if mask is None else out[mask == 1]
            model.zero_grad()
            real.square().sum().backward()
            grads = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
            found[name, mask is None] = real, grads
    for is_dense in (False, True):
        (expected, grads), (out, own) = found["sdpa", is_dense], found["ctxfast", is_dense]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert own.keys() == grads.keys()
        for name, value in grads.items():
            torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-4)


def test_real_weights_from_pretrained(minilm_dir) -> None:
    model = transformers.AutoModel.from_pretrained(minilm_dir, attn_implementation="ctxfast").eval()
    other = transformers.AutoModel.from_pretrained(minilm_dir).eval()
    ids = torch.randint(1000, 20000, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        found, expected = (each(ids, attention_mask=mask).last_hidden_state for each in (model, other))
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)


def test_a_mask_is_packed_once_for_all_layers(monkeypatch) -> None:
    model = tiny_model("Bert")
    model.set_attn_implementation("ctxfast")
    calls, make = [], attention_interface.Packing.from_mask
    monkeypatch.setattr(attention_interface.Packing, "from_mask", lambda mask: calls.append(1) or make(mask))
    with torch.no_grad():
        model(IDS, attention_mask=MASK)
        assert len(calls) == 1
        other = MASK.clone()
        first = model(IDS, attention_mask=other).last_hidden_state
        other[0, 5:] = 0  # the same tensor, another mask
        second = model(IDS, attention_mask=other).last_hidden_state
    assert not torch.equal(first[0, 0], second[0, 0])


def test_dropout_in_training() -> None:
    model = tiny_model("Bert", dropout=0.5).train()
    model.set_attn_implementation("ctxfast")
    one, other = (model(IDS, attention_mask=MASK).last_hidden_state for _ in range(2))
    assert not torch.equal(one, other) and one.isfinite().all()


def test_swap_in_takes_such_a_model_too() -> None:
    model = tiny_model("Bert")
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).last_hidden_state
        model.set_attn_implementation("ctxfast")
        assert ctxfast.swap_in(model).swapped
        found = model(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)


def test_what_is_refused() -> None:
    causal = tiny_model("Bert", "LMHeadModel", is_decoder=True)
    causal.set_attn_implementation("ctxfast")
    with pytest.raises(ValueError, match="causal.*; expected"):
        causal(IDS, attention_mask=MASK)
    with pytest.raises(ValueError, match="causal_mask_function; expected bidirectional"):
        attention_interface.padding_mask(3, 7, 7, mask_function=transformers.masking_utils.causal_mask_function)
    model = tiny_model("Bert")
    model.set_attn_implementation("ctxfast")
    per_query = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1, 7, 7\); expected the padding mask"):
        model(IDS, attention_mask=per_query)
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="cross and grouped attention are not supported"):
        attention_interface.attention(model, query, query[:, :1], query[:, :1], None)
    with pytest.raises(ValueError, match="a position bias is asked for"):
        attention_interface.attention(model, query, query, query, None, position_bias=query)
