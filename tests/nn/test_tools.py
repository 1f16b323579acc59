# SPDX-License-Identifier: Apache-2.0
"""Modules under tools that take models apart: every tool gets the right numbers out of every module, or a sentence."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tool_modules import (
    MODULES,
    First,
    Tagger,
    Upto,
    first,
    ids,
    made,
    mask_of,
    normal,
    swapped,
    tiny_bert,
    tiny_elmo,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree

import ctxfast

# TorchScript and torch.ao are on their way out and say so at every call.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


every_module = pytest.mark.parametrize("name", MODULES)


def _close(one: Tensor, two: Tensor, bound: float = 1e-5) -> None:
    torch.testing.assert_close(one, two, rtol=bound, atol=bound)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    return pytree.tree_map(lambda each: change(each) if isinstance(each, Tensor) else each, value)


@every_module
def test_trace(name) -> None:
    """A trace is torch's own operations, is the same with gradients and without, and right for other sizes."""
    model, given, other = made(name)
    traced = torch.jit.trace(model, given)
    assert "ctxfast::" not in str(traced.inlined_graph) and "prim::PythonOp" not in str(traced.inlined_graph)
    for call in (given, other):
        _close(traced(*call), model(*call))


def test_a_traced_lstm_is_torchs() -> None:
    model, given, _ = made("swapped LSTM")
    plain = copy.deepcopy(model)
    ctxfast.restore(plain)
    kinds = [[node.kind() for node in torch.jit.trace(each, given).inlined_graph.nodes()] for each in (model, plain)]
    assert kinds[0] == kinds[1] and "aten::lstm" in kinds[0]


@pytest.mark.slow
def test_traces_load_without_ctxfast(tmp_path) -> None:
    calls = {}
    for i, name in enumerate(("LSTM", "LSTM, clips", "Bert")):
        model, given, other = made(name)
        with torch.no_grad():
            torch.jit.save(torch.jit.trace(model, given), tmp_path / f"{i}.pt")
            calls[f"{i}.pt"] = (other, model(*other))
    torch.save(calls, tmp_path / "calls")
    code = (
        "import sys, torch\n"
        f"for name, (given, expected) in torch.load({str(tmp_path / 'calls')!r}).items():\n"
        f"    found = torch.jit.load({str(tmp_path)!r} + '/' + name)(*given)\n"
        "    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)\n"
        "assert 'ctxfast' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@every_module
@pytest.mark.filterwarnings("ignore:ctxfast.nn.LSTM")
def test_script(name) -> None:
    model, given, other = made(name)
    model = model.module if name != "swapped LSTM" else model
    if name in ("LayerNorm", "swapped LSTM"):
        model = model.module if isinstance(model, First) else model
        scripted = torch.jit.script(copy.deepcopy(model))
        _close(scripted(*other), model(*other))
    elif name == "LSTM":
        scripted = torch.jit.script(nn.Sequential(copy.deepcopy(model)))
        for one, two in zip(pytree.tree_leaves(scripted(*other)), pytree.tree_leaves(model(*other))):
            _close(one, two)
    else:
        with pytest.raises(RuntimeError, match=r"^ctxfast\.[\w.]+: .*torch\.jit\.trace records it"):
            torch.jit.script(model)


def test_a_scripted_model_keeps_torchs_lstm_and_says_so() -> None:
    model = swapped()
    with pytest.warns(UserWarning, match=r"TorchScript cannot call ctxfast.*script copy.deepcopy\(model\)"):
        torch.jit.script(model)
    assert type(model.lstm) is nn.LSTM
    prune.random_unstructured(model.lstm, "weight_hh_l0", 0.5)
    ctxfast.swap_in(model)
    module = ctxfast.nn.LSTM(3, 4)
    prune.random_unstructured(module, "weight_hh_l0", 0.5)
    with pytest.raises(RuntimeError, match=r"ctxfast.nn.LSTM: weights are computed at every call"):
        torch.jit.script(module)


@every_module
def test_fx_records_one_call(name) -> None:
    model, given, other = made(name)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = model.module

    def forward(self: nn.Module, x: Any) -> Any:
        return self.held(x)

    def forward_two(self: nn.Module, x: Any, y: Any) -> Any:
        return self.held(x, y)

    Holder.forward = forward if len(given) == 1 else forward_two
    traced = torch.fx.symbolic_trace(Holder())
    if not isinstance(model.module, (Tagger, Upto)):
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["held"]
    _close(first(traced(*other)), model(*other))


def test_fx_cannot_look_inside() -> None:
    with pytest.raises(TypeError, match=r"^ctxfast.nn.LSTM: torch.fx was asked to trace it"):
        torch.fx.symbolic_trace(ctxfast.nn.LSTM(3, 4))


@every_module
def test_tensors_without_values(name) -> None:
    """On the meta device, and as FakeTensors, shapes come out."""
    model, given, _ = made(name)
    shape = model(*given).shape
    if name == "Bert":
        for device in ("meta", "fake"):
            mask = (
                torch.ones(2, 7, device="meta")
                if device == "meta"
                else torch._subclasses.FakeTensorMode().from_tensor(mask_of(7, 4))
            )
            with pytest.raises(TypeError, match=r"^ctxfast.Packing: attention_mask is .*tokens cannot be counted"):
                ctxfast.packing.Packing.from_mask(mask)
        given = given[:1]
    meta, on_meta = copy.deepcopy(model).to("meta"), _map(lambda tensor: tensor.to("meta"), given)
    assert meta(*on_meta).shape == shape
    with torch.no_grad():
        assert meta(*on_meta).shape == shape
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {key: mode.from_tensor(value) for key, value in model.named_parameters()}
        fakes |= {key: mode.from_tensor(value) for key, value in model.named_buffers()}
        assert torch.func.functional_call(model, fakes, _map(mode.from_tensor, given)).shape == shape


@every_module
def test_other_default_device_and_dtype(name) -> None:
    """What is allocated inside lies where the inputs lie, whatever the process has for its defaults."""
    model, given, _ = made(name)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = model(*given)
    grads = torch.autograd.grad(expected.sum(), leaves, allow_unused=True)
    other = copy.deepcopy(model)  # with nothing packed
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            with torch.no_grad():
                _close(other(*given), expected.detach())
            found = other(*given)
            leaves = [parameter for parameter in other.parameters() if parameter.requires_grad]
            found_grads = torch.autograd.grad(found.sum(), leaves, allow_unused=True)
        finally:
            torch.set_default_dtype(torch.float32)
    _close(found, expected)
    for one, two in zip(found_grads, grads):
        assert (one is None) == (two is None)
        if one is not None:
            _close(one, two, 1e-4)


class _Held(Tensor):
    """A weight that keeps its values elsewhere, as quantised and sharded ones do: there is no address to read."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor) -> _Held:
        return Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype)

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "ctxfast" not in str(func), "a kernel was called on a tensor without values of its own"
        args, kwargs = _map(lambda each: each.value if isinstance(each, _Held) else each, (args, kwargs or {}))
        found = func(*args, **kwargs)
        return _Held(found) if func is torch.ops.aten.detach.default else found


@every_module
def test_weights_of_a_tensor_subclass(name) -> None:
    model, given, _ = made(name)
    expected = model(*given).detach()
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(_Held(parameter.detach()), requires_grad=False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = model(*given)
            _close(found.value if isinstance(found, _Held) else found, expected)


def _penalties(model: nn.Module, given: tuple[Any, ...]) -> list[Tensor | None]:
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = torch.autograd.grad(model(*given).square().sum(), leaves, create_graph=True, allow_unused=True)
    total = sum(grad.square().sum() for grad in first if grad is not None)
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


@every_module
def test_gradients_of_gradients(name) -> None:
    model, given, _ = made(name)
    found = _penalties(model, given)
    with ctxfast.use_impl("reference"):
        expected = _penalties(model, given)
    assert any(grad is not None and grad.abs().max() > 0 for grad in expected)
    for one, two in zip(found, expected):
        assert (one is None) == (two is None)
        if one is not None:
            _close(one, two, 1e-3 * max(1.0, float(two.abs().max())))


def test_gradients_of_gradients_in_training_with_dropout() -> None:
    """One seed, one mask in attention: what is recorded is what was dropped."""
    model = First(tiny_bert()).train()
    model.module.embeddings.dropout = 0.0
    for module in model.modules():
        if isinstance(module, ctxfast.nn.AddLayerNorm):
            module.dropout = 0.0
    leaves, call = list(model.module.encoder.parameters()), (ids(2, 7), mask_of(7, 4))
    loss = model(*call).sin().sum()
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    recorded = torch.autograd.grad(loss, leaves, create_graph=True)
    for one, two in zip(recorded, plain):
        _close(one.detach(), two, 1e-4)


def test_lstm_packed_has_all_derivatives() -> None:
    """A PackedSequence: penalty, forward mode and a Hessian-vector product are torch's."""
    torch.manual_seed(0)
    plain = nn.LSTM(4, 5, 2, bidirectional=True, batch_first=True).double()
    own = copy.deepcopy(plain).float()
    ctxfast.swap_in(nn.ModuleList([own]))
    x = torch.randn(3, 6, 4, dtype=torch.float64)

    # torch has no forward mode for pack_padded_sequence, but for the rows that it picks.
    places = torch.arange(18).view(3, 6, 1)
    places, *how = pack_padded_sequence(places, [2, 6, 3], batch_first=True, enforce_sorted=False)

    def run(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            packed = PackedSequence(x.flatten(0, 1)[places[:, 0]], *how)
            return model(packed)[0].data.sin().sum()

        return loss

    hvp, *others = (
        lambda f, x: torch.autograd.functional.hvp(f, x, torch.ones_like(x))[1],
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f, x: torch.func.jacrev(torch.func.grad(f))(x),
    )
    _close(hvp(run(own), x.float()).double(), hvp(run(plain), x), 1e-4)
    exact = copy.deepcopy(own).double()  # the definition: torch's LSTM has no forward mode
    for way in others:
        _close(way(run(own), x.float()).double(), way(run(exact), x), 1e-4)


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name not in ("SelfAttention", "TransformerLayer", "ScalarMix")]
)
def test_gradients_of_every_sample(name) -> None:
    """torch.func: functional_call, grad, vmap."""
    model, given, _ = made(name)
    given = given[:1] if name in ("Bert", "ElmoLstm") else given
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, sample).square().sum()

    samples = _map(lambda tensor: tensor[:, None], given)
    of_sample = torch.func.grad(loss)
    found = torch.func.vmap(of_sample, in_dims=(None, *[0] * len(given)))(parameters, *samples)
    for i in (0, 1):
        expected = of_sample(parameters, *_map(lambda tensor, i=i: tensor[i], samples))
        for key, value in expected.items():
            _close(found[key][i], value, 1e-4)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_losses_of_every_sample(kind) -> None:
    torch.manual_seed(0)
    model = getattr(ctxfast, kind)(tiny_bert().config).eval()
    words, labels = ids(2, 7), ids(2, 7) if kind == "BertForMaskedLM" else torch.tensor([0, 1])
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], words: Tensor, labels: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (words[None],), {"labels": labels[None]}).loss

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, words, labels)
    for i in (0, 1):
        for key, value in torch.func.grad(loss)(parameters, words[i], labels[i]).items():
            _close(found[key][i], value, 1e-4)


def test_large_highways_under_transforms() -> None:
    """Above the size at which a thread gets rows of its own."""
    model, x = ctxfast.nn.Highway(64).requires_grad_(False), normal(2, 600, 64)
    with torch.no_grad():
        _close(torch.func.vmap(model)(x), model(x))
        tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
    _close(tangent.sum(0), torch.func.jvp(lambda x: model(x).sum(0), (x,), (torch.ones_like(x),))[1], 1e-4)


def test_a_mask_cannot_be_counted_under_vmap() -> None:
    words = r"^ctxfast.Packing: attention_mask is batched by torch.func.vmap, where its tokens cannot be counted"
    with pytest.raises(TypeError, match=words):
        torch.func.vmap(lambda mask: ctxfast.packing.Packing.from_mask(mask).total)(torch.ones(2, 3, 4))


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


@every_module
@pytest.mark.parametrize("how", ["pruned", "parametrised"])
def test_computed_weights(name, how) -> None:
    """Weights that are computed before each call count as computed, after a step of an optimiser too."""
    model, given, _ = made(name)
    expected = copy.deepcopy(model)
    for changed, plain in zip(list(model.modules()), list(expected.modules())):
        for key, parameter in list(plain._parameters.items()):
            if parameter is None or parameter.dim() != 2:
                continue
            plain._parameters[key] = nn.Parameter(parameter.detach() * 0.25)
            if how == "pruned":
                prune.custom_from_mask(changed, key, torch.full_like(parameter, 0.5))
            else:
                parametrize.register_parametrization(changed, key, _Halved())
    with torch.no_grad():
        model(*given)
        for key, parameter in model.named_parameters():
            if key.endswith("_orig") or key.endswith(".original"):
                parameter.mul_(0.5)
        _close(model(*given), expected(*given))
    _close(model(*given), expected(*given))


def test_quantisation_by_type() -> None:
    """torch.ao finds no torch.nn.LSTM in a swapped model, and is told the way; linear layers that it replaces run."""
    model = swapped()
    with pytest.warns(UserWarning, match=r"^ctxfast.nn.LSTM: torch.ao.quantization .*ctxfast.restore\(model\) first"):
        found = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.Linear})
    assert isinstance(found.lstm, ctxfast.nn.LSTM) and type(found.out) is not nn.Linear
    ctxfast.restore(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ctxfast")
        found = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    assert ".quantized" in type(found.lstm).__module__

    for name in ("FeedForward", "Highway", "Bert"):
        plain, given, _ = made(name)
        found = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
        difference = (found(*given) - plain(*given)).abs().max()
        assert 0 < difference < 0.05, name
    elmo, given, _ = made("Elmo")
    with pytest.raises(
        RuntimeError, match=r"^ctxfast.nn.ElmoLstm: forward_layer_0.input_linearity is a .*weight_dtype"
    ):
        torch.ao.quantization.quantize_dynamic(elmo, {nn.Linear})(*given)


def test_a_replaced_linear_layer_is_called() -> None:
    """An adapter in the place of a linear layer adds what it adds."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 1

    for activation in ("none", "gelu", "gelu_tanh", "relu", "tanh"):
        block = ctxfast.nn.FeedForward(4, 8, activation=activation)
        x, dense = normal(3, 4), block.intermediate.dense
        block.intermediate.dense = Adapter(dense)
        found = block(x)
        shifted = copy.deepcopy(block)
        shifted.intermediate.dense = dense
        with torch.no_grad():
            shifted.intermediate.dense.bias += 1
            _close(found, shifted(x))


def test_onnx_is_torchs_own_operations() -> None:
    """What torch.onnx.export reads: LSTM's operator, no ctxfast's; the older road is told apart from a trace."""
    from torch.onnx._internal.exporter import _flags

    model, given, _ = made("swapped LSTM")

    @_flags.set_onnx_exporting_flag
    def exported(model: nn.Module, given: tuple[Any, ...]) -> set[str]:
        program = torch.export.export(model, given)
        return {str(node.target) for node in program.graph.nodes}

    assert "aten.lstm.input" in exported(model, given)
    for name in ("LSTM, clips", "Highway", "CharCnn", "Elmo"):
        model, given, _ = made(name)
        assert not any("ctxfast" in target for target in exported(model, given))


def test_a_trace_keeps_no_state() -> None:
    elmo = tiny_elmo()
    elmo._elmo_lstm.state = "carry"
    with pytest.raises(RuntimeError, match=r"^ctxfast.Elmo: state is 'carry' under torch.jit.trace"):
        torch.jit.trace(First(elmo), (ids(2, 3, 50),))


@pytest.mark.slow
def test_many_modules_compile_in_one_process() -> None:
    """torch.compile counts how often it compiled a piece of code: modules do not share one."""
    torch._dynamo.reset()
    kinds = [
        ctxfast.nn.LSTM(3, 4, batch_first=True), ctxfast.nn.LayerNorm(3), ctxfast.nn.AddLayerNorm(3),
        ctxfast.nn.Highway(3), ctxfast.nn.FeedForward(3, 4),
    ]  # fmt: skip
    codes = [type(module).forward.__code__ for module in kinds]
    assert all(one is not other for i, one in enumerate(codes) for other in codes[:i])
    for size in range(2, 6):
        for make in (ctxfast.nn.LayerNorm, ctxfast.nn.AddLayerNorm, ctxfast.nn.Highway):
            compiled = torch.compile(make(size), backend="eager", fullgraph=True)
            x = torch.randn(2, size)
            assert compiled(x).shape == (2, size)
