# SPDX-License-Identifier: Apache-2.0
"""Bert in 8 bits, and texts that do not feel what they are batched with, on real weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ctxfast
from ctxfast.models.bert.config import BertConfig


def _texts(shared_data: Path) -> list[str]:
    found = json.loads((shared_data / "bert" / "minilm_l6_reference.json").read_text(encoding="utf-8"))
    flat = json.dumps(found, ensure_ascii=False)
    assert len(flat) > 100
    lines = (shared_data / "ner" / "wikigold.tsv").read_text(encoding="utf-8").split("\n\n")
    return [" ".join(row.split("\t")[0] for row in line.splitlines()) for line in lines[:100] if line.strip()]


@pytest.fixture(scope="module")
def embeddings(request: pytest.FixtureRequest) -> tuple:
    minilm, data = request.getfixturevalue("minilm_dir"), request.getfixturevalue("shared_data")
    model, tokenizer = ctxfast.Bert.from_pretrained(minilm), ctxfast.BertTokenizer.from_pretrained(minilm)
    return model, tokenizer.batch(_texts(data), truncation=True, max_length=64)


def _vectors(model: ctxfast.Bert, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        found = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    mean = found.sum(1) / batch["attention_mask"].sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=1)


def test_quality_on_real_sentences(embeddings: tuple) -> None:
    model, batch = embeddings
    wide = _vectors(model, batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.quantize("int8") is model
    cosine = (wide * _vectors(model, batch)).sum(1)
    assert cosine.min() > 0.99 and 0.996 < cosine.mean() < 0.9999
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(_vectors(model.quantize(None), batch), wide)


def test_unknown_kind() -> None:
    model = ctxfast.Bert(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                    intermediate_size=8))  # fmt: skip
    with pytest.raises(ValueError, match="kind is 'int4'; expected 'int8' or None"):
        model.quantize("int4")


@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_texts_bits_do_not_depend_on_the_batch(embeddings: tuple, kind: str | None) -> None:
    model, batch = embeddings
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model.quantize(kind)
    try:
        with torch.no_grad():
            whole = model(ids, mask)
            for row in range(0, ids.shape[0], 9):
                length = int(mask[row].sum())
                alone = model(ids[row : row + 1, :length])
                few = model(ids[row : row + 7], mask[row : row + 7])
                assert torch.equal(whole.last_hidden_state[row, :length], alone.last_hidden_state[0]), row
                assert torch.equal(whole.last_hidden_state[row : row + 7], few.last_hidden_state), row
                assert torch.equal(whole.pooler_output[row], alone.pooler_output[0]), row
    finally:
        model.quantize(None)
