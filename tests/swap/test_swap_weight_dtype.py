# SPDX-License-Identifier: Apache-2.0
"""``swap_in(model, weight_dtype=...)``: products in 8 or 16 bits, of modules that stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from support import allennlp_like
from support.hf_models import IDS, MASK, tiny_model
from torch import Tensor, nn

import ctxfast

pytest.importorskip("transformers")
X = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
BOUNDS = {torch.bfloat16: 2e-2, torch.int8: 5e-2}


def _lstm() -> nn.Module:
    torch.manual_seed(3)
    return nn.LSTM(8, 12, num_layers=2, bidirectional=True, proj_size=4, batch_first=True).eval()


def _elmo() -> nn.Module:
    torch.manual_seed(3)
    model = allennlp_like.ElmoLstm(8, 8, 16, 2, proj_clip=3.0, cell_clip=3.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


def _run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        if isinstance(model, nn.LSTM):
            return model(X)[0]
        if hasattr(model, "reset_states"):
            model.reset_states()
            return model(X, torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5], dtype=torch.bool))
        return model(input_ids=IDS, attention_mask=MASK).last_hidden_state * MASK[..., None]


CASES = [
    *((_lstm, dtype) for dtype in BOUNDS),
    *((_elmo, dtype) for dtype in BOUNDS),
    *((lambda kind=kind: tiny_model(kind), torch.int8) for kind in ("Bert", "DistilBert", "Electra")),
]


@pytest.mark.parametrize(("make", "dtype"), CASES)
def test_rounds_as_asked_and_back(make, dtype: torch.dtype) -> None:
    model = make()
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = _run(model)
    name = str(dtype).removeprefix("torch.")
    assert f", {name} products" in str(ctxfast.swap_in(model, weight_dtype=name))
    found = _run(model)
    apart = float((found - before).abs().max() / before.abs().max())
    assert 1e-5 < apart < BOUNDS[dtype]
    assert torch.equal(_run(copy.deepcopy(model)), found)
    assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())
    assert "products" not in str(ctxfast.swap_in(model))  # a second call decides anew
    torch.testing.assert_close(_run(model), before, rtol=1e-4, atol=1e-5)
    ctxfast.swap_in(model, weight_dtype=dtype)
    assert torch.equal(_run(model), found)
    ctxfast.restore(model)
    assert torch.equal(_run(model), before)


def test_as_the_modules_of_this_package() -> None:
    """The same bits as ``ctxfast.nn.LSTM`` and a quantised ``ctxfast.Bert``."""
    for dtype in BOUNDS:
        model, own = (
            _lstm(),
            ctxfast.nn.LSTM(8, 12, 2, bidirectional=True, proj_size=4, batch_first=True, weight_dtype=dtype),
        )
        own.load_state_dict(model.state_dict())
        ctxfast.swap_in(model, weight_dtype=dtype)
        with torch.no_grad():
            assert torch.equal(model(X)[0], own(X)[0])
    theirs = tiny_model("Bert")
    ours = ctxfast.Bert(ctxfast.BertConfig.from_dict(theirs.config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    ctxfast.swap_in(theirs, weight_dtype=torch.int8)
    with torch.no_grad():
        wanted = ours.quantize("int8")(IDS, MASK).last_hidden_state
    torch.testing.assert_close(_run(theirs), wanted, rtol=1e-5, atol=1e-5)


def test_full_batches_too() -> None:
    """Without padding the original is left alone for speed, but not where fewer bits were asked for."""
    model = tiny_model("Bert")
    with torch.no_grad():
        before = model(input_ids=IDS).last_hidden_state
        ctxfast.swap_in(model, weight_dtype="int8")
        apart = float((model(input_ids=IDS).last_hidden_state - before).abs().max())
    assert 1e-4 < apart


def test_training_goes_straight_through() -> None:
    model = tiny_model("Bert", initializer_range=0.1)
    wanted = torch.autograd.grad(
        model(input_ids=IDS).last_hidden_state.square().sum(), model.parameters(), allow_unused=True
    )
    ctxfast.swap_in(model, weight_dtype="int8")
    found = torch.autograd.grad(
        model(input_ids=IDS).last_hidden_state.square().sum(), model.parameters(), allow_unused=True
    )
    for one, other in zip(found, wanted):
        if other is not None and float(other.norm()) > 1e-3:
            assert float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)) > 0.9


class _Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert, self.lstm = tiny_model("Bert"), _lstm()


def test_refusals() -> None:
    model = _Both()
    report = ctxfast.swap_in(model, weight_dtype=torch.bfloat16)
    assert [path for path, *_ in report.swapped] == ["lstm"]
    assert "expected torch.int8 for an encoder. Convert the model, model.to(torch.bfloat16)" in str(report)
    ctxfast.restore(model)
    with pytest.raises(ValueError, match=r"weight_dtype is torch\.bfloat16; expected a model with a part that can"):
        ctxfast.swap_in(model.bert, weight_dtype="bfloat16")
    assert ctxfast.restore(model) == ()  # nothing was swapped
    with pytest.raises(ValueError, match="weight_dtype is 'int4'; expected None, torch.bfloat16 or torch.int8"):
        ctxfast.swap_in(model, weight_dtype="int4")
    with pytest.raises(ValueError, match="no compiled implementation of"):
        ctxfast.swap_in(tiny_model("Bert").double(), weight_dtype="int8")
    ctxfast.swap_in(model)
    report = ctxfast.swap_in(model, weight_dtype="bfloat16")  # what is swapped stays so, and is told
    assert len(report.swapped) == 2 and "expected torch.int8 for an encoder" in str(report)
