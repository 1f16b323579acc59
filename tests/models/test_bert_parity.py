# SPDX-License-Identifier: Apache-2.0
"""The encoder against Hugging Face's (eager attention, float32) and against stored real-model values."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.hf_models import pair
from torch import Tensor

import ctxfast
from ctxfast.models.bert.modeling import Bert

BASE = dict(
    vocab_size=1000, hidden_size=768, num_attention_heads=12, intermediate_size=3072,
    initializer_range=0.05,
)  # fmt: skip
SMALL = dict(
    vocab_size=120, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=96, initializer_range=0.1,
)  # fmt: skip


def _masks(batch_size: int, seqlen: int) -> dict[str, Tensor | None]:
    ragged = torch.zeros(batch_size, seqlen, dtype=torch.int64)
    for row in range(batch_size):
        ragged[row, : seqlen - row * (seqlen // batch_size)] = 1
    holes = (torch.rand(batch_size, seqlen) < 0.6).long()
    holes[:, 0] = 1
    return {"none": None, "ragged": ragged, "holes": holes}


def _compare(ours: Bert, theirs: torch.nn.Module, mask: Tensor | None, **inputs: Tensor) -> float:
    """Largest difference over all layers at real tokens, and the pooler."""
    with torch.no_grad():
        mine = ours(attention_mask=mask, output_hidden_states=True, **inputs)
        want = theirs(attention_mask=mask, output_hidden_states=True, **inputs)
    assert len(mine.hidden_states) == len(want.hidden_states)
    real = torch.ones(inputs["input_ids"].shape) if mask is None else mask
    real = real.bool()
    worst = 0.0
    for a, b in zip(mine.hidden_states, want.hidden_states):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.isfinite(a).all()
        assert not a[~real].any()
        worst = max(worst, float((a - b)[real].abs().max()))
    assert torch.equal(mine.last_hidden_state, mine.hidden_states[-1])
    assert torch.equal(mine.packed_last_hidden_state, mine.last_hidden_state[real])
    return max(worst, float((mine.pooler_output - want.pooler_output).abs().max()))


@pytest.mark.parametrize("hidden_act", ["gelu", pytest.param("gelu_new", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["none", "ragged", "holes"])
def test_base_shape_agrees_at_every_layer(hidden_act: str, kind: str) -> None:
    ours, theirs = pair("bert", hidden_act=hidden_act, num_hidden_layers=2, **BASE)
    ids, types = torch.randint(1000, (4, 40)), torch.randint(2, (4, 40))
    mask = _masks(4, 40)[kind]
    assert _compare(ours, theirs, mask, input_ids=ids, token_type_ids=types) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
def test_twelve_layers_agree(hidden_act: str) -> None:
    fields = {**BASE, "initializer_range": 0.02}
    ours, theirs = pair("bert", hidden_act=hidden_act, num_hidden_layers=12, **fields)
    ids, types = torch.randint(1000, (6, 128)), torch.randint(2, (6, 128))
    mask = _masks(6, 128)["ragged"]
    assert _compare(ours, theirs, mask, input_ids=ids, token_type_ids=types) <= 1e-5


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_small_shape_with_given_positions(hidden_act: str) -> None:
    ours, theirs = pair("bert", hidden_act=hidden_act, **SMALL)
    ids, mask = torch.randint(120, (3, 11)), _masks(3, 11)["holes"]
    positions = torch.randint(512, (1, 11))
    assert _compare(ours, theirs, mask, input_ids=ids, position_ids=positions) <= 1e-5
    spread = positions.expand(3, 11)
    with torch.no_grad():
        one = ours(ids, mask, position_ids=positions).last_hidden_state
        assert torch.equal(one, ours(ids, mask, position_ids=spread).last_hidden_state)


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta"])
def test_roberta_positions_count_ids_that_are_not_padding(model_type: str) -> None:
    fields = dict(max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5)
    ours, theirs = pair(model_type, **SMALL, **fields)
    ids = torch.randint(2, 120, (4, 20))
    ids[0, 5:9] = 1  # padding ids inside a text, where the mask is 1
    ids[1, :6] = 1  # left padding
    ids[2, 12:] = 1
    for mask in (None, (ids != 1).long(), _masks(4, 20)["holes"]):
        if mask is not None and mask[1, 0] == 0:
            mask[1, 0] = 1  # Hugging Face's pooler reads column 0
        assert _compare(ours, theirs, mask, input_ids=ids) <= 1e-5


def test_ernie_task_types() -> None:
    fields = dict(use_task_id=True, task_type_vocab_size=5, hidden_act="relu")
    ours, theirs = pair("ernie", **SMALL, **fields)
    ids, tasks = torch.randint(120, (3, 9)), torch.randint(5, (3, 9))
    mask = _masks(3, 9)["ragged"]
    types = torch.randint(2, (3, 9))
    inputs = dict(input_ids=ids, token_type_ids=types)
    assert _compare(ours, theirs, mask, task_type_ids=tasks, **inputs) <= 1e-5
    assert _compare(ours, theirs, mask, **inputs) <= 1e-5
    with torch.no_grad():
        moved = ours(ids, task_type_ids=tasks).last_hidden_state - ours(ids).last_hidden_state
    assert float(moved.abs().max()) > 1e-2


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients under the names of the state_dict: fused parameters are split as their values are."""
    double = copy.deepcopy(model)
    with torch.no_grad():
        for target, source in zip(double.parameters(), model.parameters()):
            assert source.grad is not None, target.shape
            target.copy_(source.grad)
    return double.state_dict()


@pytest.mark.parametrize("model_type", ["bert", "roberta", "ernie"])
def test_gradients_of_every_parameter(model_type: str) -> None:
    extra = dict(use_task_id=True) if model_type == "ernie" else {}
    ours, theirs = pair(model_type, **SMALL, **extra)
    ids, mask = torch.randint(2, 120, (4, 13)), _masks(4, 13)["ragged"]
    ids[0, 3] = ours.config.pad_token_id  # that word row must get no gradient
    ids[mask == 0] = ours.config.pad_token_id
    weight, pooled_weight = torch.randn(4, 13, 48) * mask[..., None], torch.randn(4, 48)
    for model in (ours, theirs):
        output = model(ids, attention_mask=mask)
        loss = (output.last_hidden_state * weight).sum()
        (loss + (output.pooler_output * pooled_weight).sum()).backward()
    mine, want = _gradients(ours), _gradients(theirs)
    assert mine.keys() == want.keys()
    for name in want:
        # A key's bias shifts every score of a query alike, so its gradient is zero but for
        # rounding.
        like = name.replace("key.bias", "query.bias")
        scale = float(want[like].abs().max())
        error = float((mine[name] - want[name]).abs().max())
        assert scale > 0 and error <= 1e-4 * scale, (name, error, scale)


def test_real_minilm_weights(minilm_dir: Path, shared_data: Path) -> None:
    stored = np.load(shared_data / "bert" / "minilm_l6_reference.npz")
    ids, types, mask = (
        torch.from_numpy(stored[name]).long() for name in ("input_ids", "token_type_ids", "attention_mask")
    )
    model = Bert.from_pretrained(minilm_dir)
    with torch.no_grad():
        output = model(ids, mask, types, output_hidden_states=True)
        packing = output.packing
        sums = torch.zeros(len(ids), 384).index_add_(0, packing.rows, output.packed_last_hidden_state)
    mean = torch.nn.functional.normalize(sums / torch.tensor(packing.lengths)[:, None])
    real = mask.bool()
    for name, value in {
        "embeddings": output.hidden_states[0][real],
        "hidden_1": output.hidden_states[1][real],
        "last_hidden_state": output.last_hidden_state[real],
        "pooler_output": output.pooler_output,
        "mean_pooled": mean,
    }.items():
        want = torch.from_numpy(stored[name])
        want = want[real] if want.dim() == 3 else want
        assert float((value - want).abs().max()) <= 1e-5, name


def test_old_bin_checkpoint(shared_data: Path) -> None:
    folder = shared_data / "bert" / "xsmall_dummy"
    ours = Bert.from_pretrained(folder)
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ids, mask = torch.randint(250, (3, 8)), _masks(3, 8)["ragged"]
    assert _compare(ours, theirs, mask, input_ids=ids) <= 1e-5


def test_reference_implementations_agree_too() -> None:
    ours, theirs = pair("bert", **SMALL)
    ids, mask = torch.randint(120, (3, 11)), _masks(3, 11)["holes"]
    with ctxfast.use_impl("reference"):
        assert _compare(ours, theirs, mask, input_ids=ids) <= 1e-5


def test_saved_model_opens_in_hugging_face(tmp_path: Path) -> None:
    ours, _ = pair("bert", **SMALL)
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.BertModel.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids, mask = torch.randint(120, (3, 9)), _masks(3, 9)["ragged"]
    assert _compare(ours, theirs.eval(), mask, input_ids=ids) <= 1e-5
