# SPDX-License-Identifier: Apache-2.0
"""``swap_in`` and ``restore`` on torch's own modules, the report, and what is left alone."""

from __future__ import annotations

import copy
import pickle
import sys
import threading

import pytest
import torch
from support.hf_models import tiny_model as _model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ctxfast
from ctxfast.swap.torch_modules import LSTM, LayerNorm

pytest.importorskip("transformers")


def _identities(model: nn.Module) -> dict[str, int]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: id(tensor) for name, tensor in tensors.items()} | {n: id(m) for n, m in model.named_modules() if n}


class _Tagger(nn.Module):
    """Embeddings, two LSTMs of which one is there twice, LayerNorm, a head tied to the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.encoder = nn.LSTM(8, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.again = self.encoder
        self.projected = nn.LSTM(8, 12, proj_size=8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.again(self.encoder(self.words(ids))[0])[0]
        return self.head(self.norm(self.projected(x)[0]))


@pytest.mark.parametrize("training", [False, True])
def test_lstm_swapped_and_restored(training) -> None:
    model = _Tagger().train(training)
    model.encoder.weight_hh_l0.requires_grad_(False)
    seen = []
    model.projected.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    identities, ids = _identities(model), torch.randint(0, 30, (3, 6))
    before = model(ids)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(before.sum(), leaves)
    report = ctxfast.swap_in(model)
    assert [path for path, _, _ in report.swapped] == ["encoder", "projected"]
    assert type(model.encoder) is LSTM and model.again is model.encoder and type(model.norm) is nn.LayerNorm
    found = model(ids)
    torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-6)
    for one, two in zip(torch.autograd.grad(found.sum(), leaves), expected):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert _identities(model) == identities and model.head.weight is model.words.weight
    assert not model.encoder.weight_hh_l0.requires_grad and model.training is training
    assert seen == [nn.LSTM, LSTM]
    assert ctxfast.restore(model) == ("encoder", "projected")
    assert type(model.encoder) is nn.LSTM and _identities(model) == identities
    assert torch.equal(model(ids), before)
    assert set(vars(nn.LSTM(2, 2))) == set(vars(model.encoder))


def test_only_and_layer_norm_by_name() -> None:
    model = _Tagger()
    report = ctxfast.swap_in(model, only="LayerNorm")
    assert [path for path, _, _ in report.swapped] == ["norm"] and type(model.norm) is LayerNorm
    assert type(model.encoder) is nn.LSTM
    x = torch.randn(2, 8)
    torch.testing.assert_close(model.norm(x), nn.LayerNorm(8)(x), rtol=1e-5, atol=1e-6)
    assert len(ctxfast.swap_in(model, only=[nn.LSTM]).swapped) == 3
    assert ctxfast.restore(model) == ("encoder", "projected", "norm")
    with pytest.raises(ValueError, match=r"ctxfast\.swap_in: only holds 'GRU'; expected names of classes among Albert"):
        ctxfast.swap_in(model, only="GRU")


def test_impl_is_passed_on() -> None:
    assert len(ctxfast.swap_in(nn.LSTM(3, 4), impl="cpu").swapped) == 1
    model = nn.Sequential(nn.LSTM(3, 4))
    ctxfast.swap_in(model, impl="reference")
    assert model[0].impl == "reference" and "impl=reference" in repr(model)
    ((_, reason),) = ctxfast.swap_in(nn.LSTM(3, 4, dtype=torch.float64), impl="cpu").near_misses
    assert reason.startswith("impl='cpu' was asked for: it takes float32")
    with pytest.raises(ValueError, match=r"ctxfast\.swap_in: impl is 'gpu'; expected None or one of reference, cpu"):
        ctxfast.swap_in(model, impl="gpu")
    with pytest.raises(TypeError, match=r"^ctxfast\.swap_in: only is 5; expected names of classes, classes, or None"):
        ctxfast.swap_in(model, only=5)
    with pytest.raises(TypeError, match=r"^ctxfast\.restore: model is a int; expected a torch.nn.Module"):
        ctxfast.restore(5)
    # What no op inside has on this device would change nothing.
    for kind, name in ((nn.LayerNorm(4), "LayerNorm"), (nn.LayerNorm(4, elementwise_affine=False), "LayerNorm")):
        ((_, reason),) = ctxfast.swap_in(kind, impl="cuda", only=name).near_misses
        assert reason.startswith("impl='cuda' was asked for, but none of the ops of this model (add_layer_norm) has")
        assert type(kind) is nn.LayerNorm


def test_a_swapped_lstm_is_the_root_and_compiles() -> None:
    """As every torch.nn.LSTM it is in no graph unless torch is told so."""
    module = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    expected = module(x)[0]
    assert ctxfast.swap_in(module).swapped == (("(the model)", "LSTM", "ctxfast.nn.LSTM"),)
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], expected, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x)[0], expected, rtol=1e-4, atol=1e-6)


class _Asking(nn.Module):
    """A model that asks what its encoder is, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.rnn(x)
        return (state[0] if isinstance(self.rnn, nn.LSTM) else state)[-1]


def test_a_swapped_lstm_is_a_torch_lstm() -> None:
    model, x = _Asking(), torch.randn(2, 5, 3)
    expected = model(x)
    ctxfast.swap_in(model)
    assert isinstance(model.rnn, ctxfast.nn.LSTM)
    torch.testing.assert_close(model(x), expected)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(each(x), expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_an_exported_swapped_lstm_is_torchs(grad, strict) -> None:
    model, x = _Asking(), torch.randn(2, 5, 3)
    expected = model(x)
    ctxfast.swap_in(model)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), expected)
    assert "ctxfast" not in str(exported.graph)


class _Halved(TorchFunctionMode):
    """Halves what every function named lstm gives."""

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return (out[0] / 2, *out[1:]) if getattr(function, "__name__", "") == "lstm" else out


def test_a_mode_sees_torchs_lstm() -> None:
    module, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    with _Halved():
        expected = module(x)[0]
    assert not torch.equal(expected, module(x)[0])
    ctxfast.swap_in(module)
    with _Halved():
        torch.testing.assert_close(module(x)[0], expected)


KEPT = {
    "LSTM": (lambda: nn.LSTM(3, 4), lambda module: module(torch.ones(5, 2, 3))[0]),
    "LayerNorm": (lambda: nn.LayerNorm(3), lambda module: module(torch.arange(6.0).view(2, 3))),
    "BertEncoder": (lambda: _model("Bert").encoder, lambda module: module(torch.ones(2, 3, 16))[0]),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_forward_that_somebody_kept_outlives_restore(name) -> None:
    """As accelerate's hooks and decorators keep it."""
    make, run = KEPT[name]
    module = make()
    expected = run(module)
    assert ctxfast.swap_in(module, only=name, impl="reference").swapped
    kept = module.forward
    module.forward = lambda *args, **kwargs: kept(*args, **kwargs)
    torch.testing.assert_close(run(module), expected)
    ctxfast.restore(module)
    assert torch.equal(run(module), expected)


@pytest.mark.parametrize("name", KEPT)
@torch.no_grad()
def test_restored_while_another_thread_is_in_it(name) -> None:
    make, run = KEPT[name]
    module, errors, stop = make(), [], threading.Event()
    expected = run(module)

    def work() -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    torch.testing.assert_close(run(module), expected, rtol=1e-4, atol=1e-5)
                except Exception as error:
                    errors.append(error)
                    return

    thread = threading.Thread(target=work)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    for _ in range(100):
        ctxfast.swap_in(module, only=name, impl="reference")
        ctxfast.restore(module)
    stop.set()
    thread.join()
    sys.setswitchinterval(interval)
    assert not errors


# what is left alone, and said


class _Adapted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class _Own(nn.LSTM):
    def forward(self, *args):
        return super().forward(*args)


class _Named(nn.LSTM):
    pass


def _wrapped() -> nn.Module:
    module = nn.LSTM(3, 4)
    module.forward = module.forward
    return module


def _with_linear_of(kind: type) -> nn.Module:
    model = _model("Bert")
    model.encoder.layer[1].output.dense.__class__ = kind
    return model


MISSES = {
    "forward of its own": (lambda: _Own(3, 4), "_Own is a subclass of LSTM with a forward of its own."),
    "subclass": (lambda: _Named(3, 4), "_Named is a subclass of LSTM, which would lose its type."),
    "wrapped": (_wrapped, "its forward was replaced on the object"),
    "float64": (lambda: nn.LSTM(3, 4, dtype=torch.float64), "no compiled implementation of lstm runs it (cpu: "),
    "meta": (lambda: nn.LSTM(3, 4, device="meta"), "its parameters are on the meta device"),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
        "is a subclass of LSTM",
    ),
    "compiled": (lambda: torch.compile(nn.LSTM(3, 4)), "it is compiled already"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Linear(2, 2))), "it is TorchScript"),
    "adapter": (lambda: _with_linear_of(_Adapted), "a layer holds a _Adapted where torch.nn.Linear was"),
    "decoder": (lambda: _model("Bert", is_decoder=True), "it is a decoder"),
    "activation": (lambda: _model("Bert", hidden_act="mish"), "is none of ctxfast.linear_act's"),
    "encoder in float64": (lambda: _model("Bert").double(), "no compiled implementation of attention runs it"),
    "mpnet": (
        lambda: _model("MPNet", relative_attention_num_buckets=40),
        "its table of relative positions is none of 32 buckets",
    ),
}


@pytest.mark.parametrize("name", MISSES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_near_misses_have_a_sentence(name) -> None:
    make, sentence = MISSES[name]
    model = make()
    kinds = [type(module) for module in model.modules()]
    report = ctxfast.swap_in(model)
    assert report.swapped == () and [type(module) for module in model.modules()] == kinds
    assert len(report.near_misses) == 1
    assert sentence in report.near_misses[0][1] and sentence in str(report)
    assert str(report).startswith("nothing to swap:")
    with pytest.raises(ValueError, match=r"ctxfast\.swap_in: nothing to swap: "):
        ctxfast.swap_in(model, strict=True)


def test_quantised_modules_are_refused() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    engine = next((name for name in torch.backends.quantized.supported_engines if name != "none"), None)
    if engine is None:
        pytest.skip("not on this device: torch has no quantised kernels")
    torch.backends.quantized.engine = engine
    with pytest.warns():
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    ((path, reason),) = ctxfast.swap_in(quantised).near_misses
    assert path == "0" and reason.startswith("it is quantised")


def test_nothing_at_all() -> None:
    report = ctxfast.swap_in(nn.Linear(2, 2))
    assert (report.swapped, report.near_misses) == ((), ()) and str(report).startswith("nothing to swap:")
    with pytest.raises(TypeError, match=r"ctxfast\.swap_in: model is a str; expected a torch\.nn\.Module\."):
        ctxfast.swap_in("bert")


def test_one_bad_lstm_does_not_keep_the_others() -> None:
    model = nn.ModuleList([nn.LSTM(3, 4), _Own(3, 4), nn.LSTM(3, 4)])
    report = ctxfast.swap_in(model)
    assert [path for path, _, _ in report.swapped] == ["0", "2"] and [path for path, _ in report.near_misses] == ["1"]
    assert "swapped 2:" in str(report) and "1: _Own is a subclass" in str(report)
