# SPDX-License-Identifier: Apache-2.0
"""Swapped models under tools that look at them otherwise than by calling them with numbers."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from support.hf_models import IDS, MASK, tiny_model
from torch import Tensor, nn

import ctxfast
from ctxfast.swap import transformers as swap_transformers

transformers = pytest.importorskip("transformers")


def _tuple_model(**options) -> nn.Module:
    return tiny_model("Bert", return_dict=False, **options)


@torch.no_grad()
def test_trace_is_hugging_faces_and_stands_alone(tmp_path) -> None:
    """A traced swapped encoder holds torch's operators alone, follows other inputs and needs no ctxfast."""
    model = _tuple_model()
    other, mask = IDS.flip(0), MASK.flip(0)
    expected = model(other, mask)[0]
    ctxfast.swap_in(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (IDS, MASK))
    torch.testing.assert_close(traced(other, mask)[0], expected)
    assert "ctxfast::" not in str(traced.inlined_graph)
    traced.save(str(tmp_path / "traced.pt"))
    torch.save((other, mask, expected), tmp_path / "tensors.pt")
    script = (
        "import sys, torch; model = torch.jit.load(sys.argv[1]); a, b, c = torch.load(sys.argv[2]);"
        "assert torch.allclose(model(a, b)[0], c, atol=1e-5) and 'ctxfast' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "traced.pt", tmp_path / "tensors.pt"], check=True, cwd=tmp_path
    )


@torch.no_grad()
def test_export_and_compile_are_hugging_faces() -> None:
    model = tiny_model("Bert")
    expected = model(IDS, attention_mask=MASK).last_hidden_state
    ctxfast.swap_in(model)
    exported = torch.export.export(model, (IDS,), {"attention_mask": MASK})
    torch.testing.assert_close(exported.module()(IDS, attention_mask=MASK).last_hidden_state, expected)
    compiled = torch.compile(model.encoder, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(compiled(x).last_hidden_state, model.encoder(x).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_torch_func() -> None:
    """Per-sample gradients, and a derivative forwards, of a swapped model are those of the original."""
    model = tiny_model("Bert", attn_implementation="eager")
    plain = copy.deepcopy(model)
    ctxfast.swap_in(model)
    x = torch.randn(3, 4, 16)

    def of(each: nn.Module) -> tuple[Tensor, ...]:
        parameters = {name: value.detach() for name, value in each.encoder.named_parameters()}

        def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
            out = torch.func.functional_call(each.encoder, parameters, (row[None],))
            return out.last_hidden_state.square().sum()

        grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        _, forwards = torch.func.jvp(lambda row: loss(parameters, row), (x[0],), (x[1],))
        return (*grads.values(), forwards)

    for one, other in zip(of(model), of(plain)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_meta_and_fake_tensors() -> None:
    model = tiny_model("Bert")
    ctxfast.swap_in(model)
    assert copy.deepcopy(model).to("meta")(IDS.to("meta")).last_hidden_state.shape == (3, 7, 16)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        states = mode.from_tensor(torch.randn(2, 5, 16))
        assert model.encoder(states).last_hidden_state.shape == (2, 5, 16)


class _Scaled(Tensor):
    """A weight as int8 libraries have them: numbers and a scale, which F.linear alone knows how to use."""

    @staticmethod
    def __new__(cls, whole: Tensor, scale: Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype, requires_grad=False)

    def __init__(self, whole: Tensor, scale: Tensor) -> None:
        self.whole, self.scale = whole, scale

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        if function is nn.functional.linear:
            weight = args[1].whole.to(args[1].scale.dtype) * args[1].scale
            return nn.functional.linear(args[0], weight, *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return _Scaled(args[0].whole, args[0].scale)
        raise NotImplementedError(function)


def _quantise(model: nn.Module) -> None:
    for layer in model.encoder.layer:
        for linear in [each for each in layer.modules() if type(each) is nn.Linear]:
            scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
            whole = (linear.weight.detach() / scale).round().to(torch.int8)
            linear.weight = nn.Parameter(_Scaled(whole, scale), requires_grad=False)


@pytest.mark.parametrize("when", ["before", "afterwards"])
@torch.no_grad()
def test_weights_that_are_tensors_of_their_own_kind(when) -> None:
    model = tiny_model("Bert")
    if when == "afterwards":
        assert ctxfast.swap_in(model).swapped
        model(IDS, attention_mask=MASK)
    _quantise(model)
    plain = tiny_model("Bert")
    _quantise(plain)
    expected = plain(IDS, attention_mask=MASK).last_hidden_state[MASK == 1]
    if when == "before":
        ((path, reason),) = ctxfast.swap_in(model).near_misses
        assert path == "encoder" and reason.startswith("a weight is a _Scaled, a kind of tensor of its own")
    torch.testing.assert_close(
        model(IDS, attention_mask=MASK).last_hidden_state[MASK == 1], expected, rtol=1e-4, atol=1e-5
    )


def test_an_lstm_with_a_bias_of_its_own_kind_is_a_near_miss() -> None:
    module = nn.LSTM(3, 4)
    module._parameters["bias_ih_l0"] = nn.Parameter(
        _Scaled(torch.zeros(16, dtype=torch.int8), torch.ones(16)), requires_grad=False
    )
    ((_, reason),) = ctxfast.swap_in(module).near_misses
    assert "not plain parameters" in reason


def test_patched_torch_modules_are_near_misses(monkeypatch) -> None:
    own = nn.LSTM.forward
    later, x = nn.LSTM(3, 4), torch.randn(2, 5, 3)
    ctxfast.swap_in(later)
    monkeypatch.setattr(nn.LSTM, "forward", lambda self, *args: (own(self, *args)[0] * 2, None))
    ((_, reason),) = ctxfast.swap_in(nn.LSTM(3, 4)).near_misses
    assert reason.startswith("LSTM.forward was replaced")
    found = later(x)[0]
    ctxfast.restore(later)
    torch.testing.assert_close(found, later(x)[0])


def _in_another_process(stream: io.BytesIO) -> None:
    script = (
        "import pickle, sys, torch; sys.path.insert(0, 'tests'); model = pickle.load(sys.stdin.buffer);"
        "from support.hf_models import IDS, MASK; import ctxfast; torch.set_grad_enabled(False);"
        "out = model['query'](IDS, attention_mask=MASK).last_hidden_state;"
        "assert not out[MASK == 0].any() and len(ctxfast.restore(model)) == 2"
    )
    subprocess.run([sys.executable, "-c", script], input=stream.getvalue(), check=True)


@pytest.mark.slow
def test_a_swapped_class_is_made_once() -> None:
    """Two towers, models swapped one after another and in several threads, all share one class and can be pickled."""
    first, second = tiny_model("Bert"), tiny_model("Bert")
    ctxfast.swap_in(first)
    pickle.dumps(first)
    ctxfast.swap_in(second)
    towers = nn.ModuleDict(dict(query=tiny_model("Bert"), document=tiny_model("Bert")))
    ctxfast.swap_in(towers)
    kinds = {type(model.encoder) for model in (first, second, *towers.values())}
    assert len(kinds) == 1
    with torch.no_grad():
        expected = first(IDS, attention_mask=MASK).last_hidden_state
        for each in (first, second):
            found = pickle.loads(pickle.dumps(each))(IDS, attention_mask=MASK).last_hidden_state
            assert torch.equal(found, expected)
    stream = io.BytesIO()
    pickle.dump(towers, stream)
    _in_another_process(stream)


def test_classes_made_in_threads_are_one(monkeypatch) -> None:
    for name in ("RobertaEncoder",):
        monkeypatch.delitem(vars(swap_transformers), name, raising=False)
    made, start = [], threading.Barrier(8)

    def make() -> None:
        start.wait()
        made.append(swap_transformers.packed_class("transformers.models.roberta.modeling_roberta.RobertaEncoder"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 and len(set(made)) == 1


def test_double_backward_of_swapped_models() -> None:
    """A gradient penalty, as WGAN-GP and influence functions have it."""
    model = tiny_model("Bert", attn_implementation="eager")
    plain = copy.deepcopy(model)
    ctxfast.swap_in(model, impl="cpu")

    def penalty(each: nn.Module) -> dict[str, Tensor]:
        x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = each(inputs_embeds=x, attention_mask=MASK).last_hidden_state[MASK == 1]
        (grad,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        grad.pow(2).sum().backward()
        return {name: value.grad for name, value in each.named_parameters() if value.grad is not None}

    found, expected = penalty(model), penalty(plain)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4 * max(scale, 1.0))
