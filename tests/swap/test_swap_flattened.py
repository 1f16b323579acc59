# SPDX-License-Identifier: Apache-2.0
"""Calls of swapped encoders that are packed already: each text has the values that it has in a batch with padding."""

from __future__ import annotations

import pytest
import torch
from support.hf_models import IDS, MASK, tiny_model
from torch import Tensor, nn

import ctxfast

transformers = pytest.importorskip("transformers")

LENGTHS = MASK.sum(1).tolist()


def _flattened(**options) -> dict[str, Tensor]:
    """The rows of IDS as DataCollatorWithFlattening lays them out."""
    texts = [{"input_ids": row[:length]} for row, length in zip(IDS.tolist(), LENGTHS)]
    batch = transformers.DataCollatorWithFlattening(return_seq_idx=True, **options)(texts, return_tensors="pt")
    return {name: value for name, value in batch.items() if name != "labels"}


def _padded(model: nn.Module) -> Tensor:
    return model(IDS, attention_mask=MASK).last_hidden_state[MASK.bool()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["Bert", "Albert", "Data2VecText"])
def test_flattened_batches_have_the_values_of_padded_ones(kind: str, attention: str) -> None:
    model = tiny_model(kind, attn_implementation=attention)
    expected = _padded(model)
    right = torch.autograd.grad(expected.square().sum(), list(model.encoder.parameters()))
    ctxfast.swap_in(model)
    call = _flattened(return_flash_attn_kwargs=True, position_ids_start=2 if kind == "Data2VecText" else 0)
    found = model(**call).last_hidden_state
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    few = {name: call[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q")}
    assert torch.equal(model(**few).last_hidden_state, found)
    gradients = torch.autograd.grad(found.square().sum(), list(model.encoder.parameters()))
    for one, two in zip(gradients, right, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_position_ids_alone_say_so_to_flash_attention_alone() -> None:
    model = tiny_model("Bert")
    call = _flattened()
    del call["seq_idx"]
    before, expected = model(**call).last_hidden_state, _padded(model)
    ctxfast.swap_in(model)
    assert torch.equal(model(**call).last_hidden_state, before)
    model.config._attn_implementation = "flash_attention_2"  # by whose function no call of a swapped encoder goes
    torch.testing.assert_close(model(**call).last_hidden_state[0], expected, rtol=1e-4, atol=1e-5)
    one = dict(input_ids=IDS[:1], position_ids=torch.arange(7)[None])
    with pytest.raises(ImportError):  # one text: a call as any other, which a batch without padding leaves to torch's
        model(**one)


@pytest.mark.parametrize(
    "offsets",
    [[0, 7, 11], [1, 7, 13], [0, 11, 7, 13], [[0, 7, 11, 13]], [0.0, 7.0, 11.0, 13.0]],
    ids=["too short", "late", "back", "two dimensions", "floats"],
)
@torch.no_grad()
def test_offsets_that_do_not_fit_run_as_before(offsets: list) -> None:
    model = tiny_model("Bert")
    call = _flattened(return_flash_attn_kwargs=True) | {"cu_seq_lens_q": torch.tensor(offsets), "cu_seq_lens_k": None}
    before = model(**call).last_hidden_state
    ctxfast.swap_in(model)
    assert torch.equal(model(**call).last_hidden_state, before)


@torch.no_grad()
def test_keys_of_other_texts_and_batches_of_rows_run_as_before() -> None:
    model = tiny_model("Bert")
    other = _flattened(return_flash_attn_kwargs=True)
    other["cu_seq_lens_k"] = torch.tensor([0, 6, 11, 13])
    rows = dict(input_ids=IDS, cu_seq_lens_q=torch.tensor([0, 7, 14, 21]))
    before = [model(**call).last_hidden_state for call in (other, rows)]
    ctxfast.swap_in(model)
    for call, right in zip((other, rows), before):
        assert torch.equal(model(**call).last_hidden_state, right)
