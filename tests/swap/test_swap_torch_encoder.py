# SPDX-License-Identifier: Apache-2.0
"""torch's own encoder after ``swap_in``: it computes what it computed, packed, in evaluation and in training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from support.hf_models import MASK
from torch import Tensor, nn

import ctxfast
from ctxfast.nn import encoder as nn_encoder

PADDING = MASK == 0
REAL = ~PADDING


def _model(kind: str = "encoder", **options) -> nn.Module:
    torch.manual_seed(3)
    options = dict(d_model=16, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=True) | options
    norm = options.pop("norm", None)
    layer = nn.TransformerEncoderLayer(**options)
    is_nested = options["batch_first"]
    model = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=is_nested) if kind == "encoder" else layer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _x(is_first: bool = True) -> Tensor:
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(5))
    return x if is_first else x.transpose(0, 1)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every packed call."""
    found, run = [], nn_encoder.run

    def spied(layers, x, *args, **options):
        found.append(len(x))
        return run(layers, x, *args, **options)

    monkeypatch.setattr(nn_encoder, "run", spied)
    return found


MODELS: dict[str, tuple[str, dict]] = {
    "encoder": ("encoder", {}),
    "gelu, norm after": ("encoder", dict(activation="gelu", norm=nn.LayerNorm(16))),
    "sequence first": ("encoder", dict(batch_first=False)),
    "a module as activation": ("encoder", dict(activation=nn.GELU())),
    "layer": ("layer", {}),
    "norm first": ("encoder", dict(norm_first=True, norm=nn.LayerNorm(16))),
    "a layer with its norm first": ("layer", dict(norm_first=True, activation="gelu")),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_identity(name: str, tokens: list[int]) -> None:
    kind, options = MODELS[name]
    model = _model(kind, **options)
    is_first = options.get("batch_first", True)
    real = REAL if is_first else REAL.T
    x = _x(is_first).requires_grad_()
    state, objects = copy.deepcopy(model.state_dict()), [*map(id, model.parameters()), *map(id, model.modules())]

    def run() -> tuple[Tensor, Tensor, list[Tensor]]:
        with torch.no_grad():
            still = model.eval()(x, src_key_padding_mask=PADDING)[real]
        out = model.train()(x, src_key_padding_mask=PADDING)[real]
        gradients = torch.autograd.grad((out * out.detach().cos()).sum(), [x, *model.parameters()])
        return still, out.detach(), list(gradients)

    expected = run()
    report = ctxfast.swap_in(model)
    assert [path for path, *_ in report.swapped] == ["(the model)"] and report.near_misses == ()
    assert isinstance(model, nn.TransformerEncoder if kind == "encoder" else nn.TransformerEncoderLayer)
    tokens.clear()
    found = run()
    assert tokens == [13, 13]
    for one, two in zip((found[0], found[1], *found[2]), (expected[0], expected[1], *expected[2]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert [*map(id, model.parameters()), *map(id, model.modules())] == objects
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert ctxfast.restore(model) == ("(the model)",)
    assert all(map(torch.equal, run()[:2], expected[:2]))


@torch.no_grad()
def test_masks_in_every_form(tokens: list[int]) -> None:
    model = _model()
    added = torch.zeros(3, 7).masked_fill(PADDING, float("-inf"))
    holes = torch.tensor([[False] * 7, [False, True, False, False, False, False, False], [True] * 3 + [False] * 4])
    causal = torch.triu(torch.full((7, 7), float("-inf")), 1)
    calls = [
        (dict(src_key_padding_mask=added), REAL, 13),
        (dict(src_key_padding_mask=holes), ~holes, 17),
        (dict(src_key_padding_mask=PADDING, mask=causal), REAL, None),
        (dict(mask=causal, is_causal=True), torch.ones_like(REAL), None),
        ({}, torch.ones_like(REAL), 21),
    ]
    expected = [model(_x(), **call)[real] for call, real, _ in calls]
    ctxfast.swap_in(model, impl="cpu")
    for (call, real, rows), right in zip(calls, expected):
        tokens.clear()
        torch.testing.assert_close(model(_x(), **call)[real], right, rtol=1e-4, atol=1e-5)
        assert tokens == ([] if rows is None else [rows])
    tokens.clear()
    with torch.enable_grad():
        found = model(_x(), src_key_padding_mask=added - 0.5), model(_x()[0])
        ctxfast.restore(model)
        assert all(map(torch.equal, found, (model(_x(), src_key_padding_mask=added - 0.5), model(_x()[0]))))
    assert tokens == []


def test_dropout_in_training(tokens: list[int]) -> None:
    """Each of the four places by itself: two calls differ in training, and none in evaluation."""
    for place in ("self_attn", "dropout", "dropout1", "dropout2"):
        model = _model("layer")
        if place == "self_attn":
            model.self_attn.dropout = 0.5
        else:
            getattr(model, place).p = 0.5
        ctxfast.swap_in(model)
        tokens.clear()
        one, two, three, four = (
            model.train(mode)(_x(), src_key_padding_mask=PADDING) for mode in (True, True, False, False)
        )
        assert not torch.equal(one, two) and torch.equal(three, four) and len(tokens) == 4, place


def test_dropout_inside_the_feed_forward_block_has_torchs_mean() -> None:
    torch.manual_seed(0)
    model = _model("layer", dropout=0.0)
    model.dropout.p = 0.4
    ctxfast.swap_in(model)
    with torch.no_grad():
        many = torch.stack([model.train()(_x()) for _ in range(300)])
        ctxfast.restore(model)
        theirs = torch.stack([model.train()(_x()) for _ in range(300)])
    assert not torch.equal(many[0], many[1])
    assert float((many.mean(0) - theirs.mean(0)).square().mean().sqrt()) < 0.06  # of 300 draws
    torch.testing.assert_close(many.std(0).mean(), theirs.std(0).mean(), rtol=0.05, atol=0)


class _Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = _model()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=PADDING).amax(1)


def test_under_somebodys_model_padding_is_as_torch_has_it(tokens: list[int]) -> None:
    """torch drops padding in evaluation without gradients; only there is it dropped unless asked for."""
    model = _Tagger()
    results = [model.eval()(_x())]
    with torch.no_grad():
        results.append(model(_x()))
    report = ctxfast.swap_in(model)
    assert "run as before where torch's own encoder computes values there" in report.near_misses[0][1]
    tokens.clear()
    assert torch.equal(model(_x()), results[0]) and tokens == []
    with torch.no_grad():
        torch.testing.assert_close(model(_x()), results[1], rtol=1e-4, atol=1e-5)
    assert tokens == [13]
    assert ctxfast.swap_in(model, padding="zero").near_misses == ()
    model.train()(_x())
    assert tokens == [13, 13]


@torch.no_grad()
def test_int8_and_copies(tokens: list[int]) -> None:
    model = _model()
    expected = model(_x(), src_key_padding_mask=PADDING)[REAL]
    ctxfast.swap_in(model, weight_dtype="int8")
    found = model(_x(), src_key_padding_mask=PADDING)[REAL]
    assert 0 < float((found - expected).abs().max()) < 0.2
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tokens.clear()
        assert torch.equal(other(_x(), src_key_padding_mask=PADDING)[REAL], found) and tokens == [13]
        assert ctxfast.restore(other) == ("(the model)",) and type(other) is nn.TransformerEncoder


def _hook(model: nn.Module) -> None:
    model.layers[1].linear1.register_forward_hook(lambda module, args, output: output * 2)


def _activation(model: nn.Module) -> None:
    model.layers[0].activation = torch.tanh


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _linear(model: nn.Module) -> None:
    model.layers[0].linear2.__class__ = _Doubled


def _forward(model: nn.Module) -> None:
    model.layers[0].forward = lambda src, **options: src


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "hook": _hook, "activation": _activation, "linear": _linear, "forward": _forward,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changed_afterwards(name: str) -> None:
    """With gradients, where torch calls every module."""
    model = _model()
    ctxfast.swap_in(model)
    before = model(_x(), src_key_padding_mask=PADDING)[REAL]
    CHANGES[name](model)
    found = model(_x(), src_key_padding_mask=PADDING)
    ctxfast.restore(model)
    assert torch.equal(found, model(_x(), src_key_padding_mask=PADDING)) and not torch.allclose(found[REAL], before)


MISSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no bias": (lambda: _model(bias=False), "a LayerNorm of it has no bias."),
    "activation": (lambda: _model(activation=torch.tanh), "is none of ctxfast.linear_act's."),
    "float64": (lambda: _model().double(), "no compiled implementation of attention runs it"),
    "meta": (lambda: _model().to("meta"), "on the meta device"),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("name", MISSES)
def test_near_misses_have_a_sentence(name: str) -> None:
    make, sentence = MISSES[name]
    report = ctxfast.swap_in(make())
    assert not report.swapped and all(sentence in reason for _, reason in report.near_misses) and report.near_misses


def test_other_layers_of_an_encoder_are_swapped_by_themselves() -> None:
    model = _model()
    model.layers[1].__class__ = type("Own", (nn.TransformerEncoderLayer,), {})
    expected = model(_x(), src_key_padding_mask=PADDING)[REAL]
    report = ctxfast.swap_in(model)
    assert [path for path, *_ in report.swapped] == ["layers.0"]
    torch.testing.assert_close(model(_x(), src_key_padding_mask=PADDING)[REAL], expected, rtol=1e-4, atol=1e-5)
