# SPDX-License-Identifier: Apache-2.0
"""``swap_in`` on AllenNLP's ELMo and its relatives, known by their names and parts."""

from __future__ import annotations

import copy
import json
import pickle

import h5py
import pytest
import torch
from support import allennlp_like as like
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import ctxfast
from ctxfast.models.elmo.bilm import ElmoBiLm
from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.weights import load_weights

OPTIONS = {
    "lstm": {"dim": 10, "projection_dim": 6, "n_layers": 2, "cell_clip": 0.5, "proj_clip": 0.4},
    "char_cnn": {
        "embedding": {"dim": 4},
        "filters": [[1, 3], [2, 4], [3, 5]],
        "n_highway": 2,
        "activation": "relu",
        "max_characters_per_token": 20,
    },
}
BATCHES = [
    [["the", "cat", "sat"], ["a"], ["dogs", "bark"]],
    [["it", "rained"], ["and", "then", "it", "stopped", "."]],
    [["one"], ["two", "words"], [], ["four", "rows", "now", "the"]],
]


def _elmo(**options) -> like.Elmo:
    torch.manual_seed(3)
    return like.Elmo(OPTIONS, **options)


def _run(model: nn.Module) -> list[torch.Tensor]:
    """Three batches of different sizes, the state carried on."""
    ids = [ctxfast.batch_to_ids(batch, max_characters=20) for batch in BATCHES]
    return [model(one)["elmo_representations"][0] for one in ids]


def test_elmo_with_its_carried_state() -> None:
    plain, model = _elmo().eval(), _elmo().eval()
    state = copy.deepcopy(model.state_dict())
    objects = {name: id(module) for name, module in model.named_modules()}
    report = ctxfast.swap_in(model, strict=True)
    assert [(path, kind) for path, kind, _ in report.swapped] == [
        ("_elmo_lstm._token_embedder", "_ElmoCharacterEncoder"),
        ("_elmo_lstm._elmo_lstm", "ElmoLstm"),
    ]
    with torch.no_grad():
        for one, other in zip(_run(model), _run(plain)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        for one, other in zip(model._elmo_lstm._elmo_lstm._states, plain._elmo_lstm._elmo_lstm._states):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert {name: id(module) for name, module in model.named_modules()} == objects
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert ctxfast.swap_in(model).swapped == report.swapped
    assert set(ctxfast.restore(model)) == {path for path, _, _ in report.swapped}
    assert type(model._elmo_lstm._elmo_lstm) is like.ElmoLstm
    with torch.no_grad():
        for each in (model, plain):
            each._elmo_lstm._elmo_lstm.reset_states()
        for one, other in zip(_run(model), _run(plain)):
            assert torch.equal(one, other)


def test_gradients_where_it_is_trained() -> None:
    plain, model = (_elmo(dropout=0.0).requires_grad_(True).train() for _ in range(2))
    ctxfast.swap_in(model)
    for each in (plain, model):
        sum(out.square().sum() for out in _run(each)).backward()
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-5, msg=name)
    frozen = _elmo()
    ctxfast.swap_in(frozen)
    sum(out.sum() for out in _run(frozen)).backward()
    assert frozen.gamma.grad is not None and all(p.grad is None for p in frozen._elmo_lstm.parameters())


def test_recurrent_dropout_and_dropout_in_training() -> None:
    torch.manual_seed(1)
    model = like.ElmoLstm(4, 4, 6, 2, dropout=0.5)
    ctxfast.swap_in(model)
    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    model.train()
    one, other = model(x, mask), model(x, mask)
    assert not torch.equal(one, other)
    model.eval()
    model.reset_states()
    one = model(x, mask)
    model.reset_states()
    assert torch.equal(one, model(x, mask))


def test_swapping_disturbs_nothing() -> None:
    model = _elmo().train()
    model._elmo_lstm._elmo_lstm(torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool))
    states = [state.clone() for state in model._elmo_lstm._elmo_lstm._states]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    ctxfast.swap_in(model)
    assert torch.equal(torch.rand(3), expected) and all(module.training for module in model.modules())
    for one, other in zip(model._elmo_lstm._elmo_lstm._states, states):
        assert torch.equal(one, other)


def test_copies_and_pickles() -> None:
    model = _elmo().eval()
    ctxfast.swap_in(model)
    with torch.no_grad():
        expected = _run(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other._elmo_lstm._elmo_lstm.reset_states()
            for one, two in zip(_run(other), expected):
                assert torch.equal(one, two)
            assert len(ctxfast.restore(other)) == 2 and type(other._elmo_lstm._elmo_lstm) is like.ElmoLstm


@pytest.mark.parametrize("training", [False, True])
def test_stacked_lstm(training) -> None:
    torch.manual_seed(2)
    model = like.StackedBidirectionalLstm(5, 4, 3, use_highway=False).train(training)
    plain = copy.deepcopy(model)
    assert ctxfast.swap_in(model, strict=True).swapped[0][1] == "StackedBidirectionalLstm"
    x = torch.randn(4, 6, 5)
    results = []
    for each in (plain, model):
        leaf = x.clone().requires_grad_(True)
        packed = pack_padded_sequence(leaf, [6, 5, 2, 1], batch_first=True)
        output, (h, c) = each(packed)
        padded, lengths = pad_packed_sequence(output, batch_first=True)
        (padded.square().sum() + h.sum() + c.sum()).backward()
        results.append([padded, h, c, leaf.grad, *(p.grad for p in each.parameters())])
        assert lengths.tolist() == [6, 5, 2, 1]
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_near_misses_have_a_sentence() -> None:
    class ElmoLstm(like.ElmoLstm):
        def forward(self, inputs, mask):
            return super().forward(inputs, mask) * 1.01

    class _ElmoCharacterEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(2, 2)

    highway = like.StackedBidirectionalLstm(5, 4, 1, use_highway=True)
    meta = like.ElmoLstm(4, 4, 6, 1).to("meta")
    model = nn.ModuleList([ElmoLstm(4, 4, 6, 1), _ElmoCharacterEncoder(), highway, meta])
    report = ctxfast.swap_in(model)
    reasons = dict(report.near_misses)
    assert not report.swapped and "results differ from those of AllenNLP's ElmoLstm" in reasons["0"]
    assert "is not built as AllenNLP's _ElmoCharacterEncoder is (AttributeError" in reasons["1"]
    assert "highway connections" in reasons["2"] and "meta device" in reasons["3"]
    with pytest.raises(ValueError, match="nothing to swap"):
        ctxfast.swap_in(model, strict=True)
    assert len(ctxfast.swap_in(like.ElmoLstm(4, 4, 6, 1), only="ElmoLstm").swapped) == 1
    assert not ctxfast.swap_in(like.ElmoLstm(4, 4, 6, 1), only="LSTM").swapped


def test_copies_that_forget_or_raise_are_left_alone() -> None:
    class ElmoLstm(like.ElmoLstm):
        def forward(self, inputs, mask):
            self._states = None
            return super().forward(inputs, mask)

    forgets, raises = ElmoLstm(4, 4, 6, 1), like.ElmoLstm(4, 4, 6, 1)
    (miss,) = ctxfast.swap_in(forgets).near_misses
    assert "results differ" in miss[1]

    class ElmoLstm(like.ElmoLstm):  # noqa: F811
        def forward(self, inputs, mask):
            raise AssertionError("no such input")

    raises.__class__ = ElmoLstm
    (miss,) = ctxfast.swap_in(raises).near_misses
    assert "AssertionError: no such input" in miss[1]


class _Gated(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


def _gated(linear: nn.Linear) -> None:
    linear.__class__ = _Gated


def _scaled(module: nn.Module) -> None:
    own = type(module).forward
    module.forward = lambda *args: own(module, *args) * 0.5


# What somebody changes inside an ElmoLstm: seen before swap_in and after it, in the module and in its copies.
CHANGES = {
    "a linear layer of another class": lambda m: _gated(m.forward_layer_0.input_linearity),
    "a projection put in its place": lambda m: setattr(
        m.backward_layer_1, "state_projection", nn.Sequential(m.backward_layer_1.state_projection, nn.Tanh())
    ),
    "a hook inside": lambda m: m.forward_layer_1.state_linearity.register_forward_hook(lambda *args: args[2] * 0.5),
    "a forward on a part": lambda m: _scaled(m.backward_layer_0.state_linearity),
    "one cell's clip": lambda m: setattr(m.backward_layer_1, "memory_cell_clip_value", 0.01),
    "every cell's clip": lambda m: (
        [setattr(cell, "state_projection_clip_value", 0.01) for cell in m.children()] and None
    ),
    "one layer fewer": lambda m: setattr(m, "num_layers", 1),
}


def _lstm_outputs(module: nn.Module) -> torch.Tensor:
    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    module.reset_states()
    with torch.no_grad():
        return torch.stack([module(x, mask)[-1], module(x, mask)[-1]])


@pytest.mark.parametrize("when", ["before", "afterwards", "in a copy"])
@pytest.mark.parametrize("name", CHANGES)
def test_changed_inside(name, when) -> None:
    torch.manual_seed(5)
    plain = like.ElmoLstm(4, 4, 6, 2, cell_clip=0.5, proj_clip=0.4).eval()
    model = copy.deepcopy(plain)
    before = _lstm_outputs(plain)
    if when != "before":
        assert ctxfast.swap_in(model).swapped
        torch.testing.assert_close(_lstm_outputs(model), before, rtol=1e-4, atol=1e-6)
    for each in (plain, model):
        CHANGES[name](each)
    expected = _lstm_outputs(plain)
    assert (expected - before).abs().max() > 1e-4
    if when == "before":
        report = ctxfast.swap_in(model)
        assert report.swapped or report.near_misses
    elif when == "in a copy":
        model = copy.deepcopy(model)
    torch.testing.assert_close(_lstm_outputs(model), expected, rtol=1e-4, atol=1e-6)


def test_tracing_and_transforms_run_the_original() -> None:
    module = like.ElmoLstm(4, 4, 6, 1).eval()
    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    right = torch.func.jvp(lambda x: (module.reset_states(), module(x, mask))[1], (x,), (x,))
    ctxfast.swap_in(module)
    found = torch.func.jvp(lambda x: (module.reset_states(), module(x, mask))[1], (x,), (x,))
    for one, other in zip(found, right):
        torch.testing.assert_close(one, other)


def test_ours_are_left_alone() -> None:
    config = ElmoConfig(6, 10, 2, ((1, 3),), 4)
    assert not ctxfast.swap_in(ElmoBiLm(config)).swapped


def test_real_fixture(shared_data) -> None:
    """AllenNLP's own expected values through a swapped look-alike, the state carried over ten batches."""
    folder = shared_data / "elmo" / "allennlp_tiny"
    options = json.loads((folder / "options.json").read_text())
    model = like._ElmoBiLm(options).eval()
    _, state = load_weights(folder / "lm_weights.hdf5", ElmoConfig.from_file(folder / "options.json"))
    model.load_state_dict(state)
    ctxfast.swap_in(model, strict=True)
    lanes = json.loads((folder / "sentences.json").read_text())
    files = [h5py.File(folder / f"lm_embeddings_{lane}.hdf5") for lane in range(3)]
    with torch.no_grad():
        for number in range(10):
            texts = [lane[number].split() for lane in lanes]
            found = model(ctxfast.batch_to_ids(texts))
            top = found["activations"][-1]
            for lane, text in enumerate(texts):
                expected = torch.from_numpy(files[lane][str(number)][...])
                own = top[lane, 1 : len(text) + 1]
                both = torch.stack([own[:, :16], own[:, 16:]])
                torch.testing.assert_close(both, expected, rtol=1e-5, atol=2e-6)
