# SPDX-License-Identifier: Apache-2.0
"""Encoders that ``swap_in`` does not know, with their parts beside attention on real tokens alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.hf_models import IDS, MASK
from torch import Tensor, nn

import ctxfast
from ctxfast.swap import rows

transformers = pytest.importorskip("transformers")

REAL = MASK.bool()
_BERTS = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40, pad_token_id=1,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
)  # fmt: skip
_DEBERTA = dict(_BERTS, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0)
# Model -> options, and how many parts are found in its two layers.
MODELS: dict[str, tuple[dict, int]] = {
    "DebertaV2Model": (_DEBERTA, 12),
    "MobileBertModel": (dict(_BERTS, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16), 30),
    "RoFormerModel": (dict(_BERTS), 12),
    "T5EncoderModel": (dict(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2), 10),
    "XLMModel": (dict(vocab_size=40, emb_dim=16, n_layers=2, n_heads=2, dropout=0.0, attention_dropout=0.0), 8),
}


def _model(name: str, head: str = "") -> nn.Module:
    kind = getattr(transformers, head or name)
    torch.manual_seed(4)
    return kind(kind.config_class(**MODELS[name][0])).eval()


def _out(model: nn.Module) -> Tensor:
    return model(IDS, attention_mask=MASK)[0]


def _gradients(model: nn.Module) -> list[Tensor | None]:
    out = _out(model.train())[REAL]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((out * out.detach().cos()).sum(), wanted, allow_unused=True))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every packed call of a part."""
    found, pack = [], rows._packed

    def spied(value, packing):
        found.append(packing.total)
        return pack(value, packing)

    monkeypatch.setattr(rows, "_packed", spied)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_identity(name: str, counted: list[int]) -> None:
    model = _model(name)
    if name == "T5EncoderModel":
        model.config.dropout_rate = 0.0
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            if hasattr(part, "dropout") and isinstance(part.dropout, float):
                part.dropout = 0.0
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = _out(model)[REAL]
    gradients = _gradients(model)
    report = ctxfast.swap_in(model.eval(), unknown="rows")
    assert len(report.swapped) == 1 and report.near_misses == () and "packed but for its attention" in str(report)
    assert sum(isinstance(part, rows.RowWise) for part in model.modules()) == MODELS[name][1]
    assert ctxfast.swap_in(model, unknown="rows").swapped == report.swapped
    counted.clear()
    with torch.no_grad():
        torch.testing.assert_close(_out(model)[REAL], expected, rtol=1e-4, atol=1e-5)
    assert counted and set(counted) == {13}
    for one, two in zip(_gradients(model), gradients, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    ctxfast.restore(model.eval())
    with torch.no_grad():
        assert torch.equal(_out(model)[REAL], expected) and not any(isinstance(p, rows._Class) for p in model.modules())


REFUSED = {
    "ConvBertModel": (dict(_BERTS, embedding_size=16, conv_kernel_size=3), "a small batch's results are"),
    "XLNetModel": (dict(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=32), "works row by row on hidden"),
    "ViTModel": ({key: _BERTS[key] for key in list(_BERTS)[:4]}, "no model of Transformers around it takes ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_so_stays_and_is_named(name: str) -> None:
    options, sentence = REFUSED[name]
    kind = getattr(transformers, name)
    torch.manual_seed(4)
    model = kind(kind.config_class(**options)).train()
    kinds = list(map(type, model.modules()))
    ((_, reason),) = ctxfast.swap_in(model, unknown="rows").near_misses
    assert sentence in reason and list(map(type, model.modules())) == kinds and model.training
    assert ctxfast.swap_in(model).swapped == ()


@torch.no_grad()
def test_a_head_that_may_read_padding_copies_and_calls_that_run_as_before(counted: list[int]) -> None:
    model = _model("DebertaV2Model", "DebertaV2ForTokenClassification")
    expected = _out(model)
    report = ctxfast.swap_in(model, unknown="rows")
    assert "as DebertaV2ForTokenClassification may read" in report.near_misses[0][1]
    counted.clear()
    assert torch.equal(_out(model), expected) and not counted
    assert ctxfast.swap_in(model, unknown="rows", padding="zero").near_misses == ()
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        counted.clear()
        torch.testing.assert_close(_out(other)[REAL], expected[REAL], rtol=1e-4, atol=1e-5)
        assert set(counted) == {13}
    counted.clear()
    model(IDS)
    model(IDS, attention_mask=MASK.flip(1))
    assert not counted


def _shifted(layer: nn.Module) -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.roll(1, dims=1)

    layer.intermediate.dense = nn.Sequential(layer.intermediate.dense, Shift())


def _hook(layer: nn.Module) -> None:
    layer.output.dense.register_forward_hook(lambda module, args, output: output + output.roll(1, dims=1))


@pytest.mark.parametrize("change", [_shifted, _hook])
@torch.no_grad()
def test_parts_that_changed_run_as_before(change) -> None:
    """What is put in later reads neighbours, those at padding too."""
    model = _model("DebertaV2Model")
    other = copy.deepcopy(model)
    ctxfast.swap_in(model, unknown="rows")
    for each in (model, other):
        change(each.encoder.layer[0])
    part = model.encoder.layer[0].intermediate if change is _shifted else model.encoder.layer[0].output
    rows_of_it: list[int] = []
    part.dense.register_forward_pre_hook(lambda module, args: rows_of_it.append(args[0].shape[0]))
    found = _out(model)
    assert rows_of_it == [3]  # the batch with its padding
    torch.testing.assert_close(found[0], _out(other)[0], rtol=1e-4, atol=1e-5)


def test_unknown_is_checked() -> None:
    with pytest.raises(ValueError, match=r"unknown is 'all'; expected None or 'rows'\."):
        ctxfast.swap_in(nn.Linear(1, 1), unknown="all")
