# SPDX-License-Identifier: Apache-2.0
"""What is peculiar to ``feed_forward``: what it saves for the backward, gradients of some inputs, who calls it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from support.hf_models import IDS, MASK, tiny_model
from torch import Tensor, nn

import ctxfast
from ctxfast._core import calls, capability, registry
from ctxfast.ops.shared.packed_weights import CACHE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
needs_triton = pytest.mark.skipif(
    capability.why_no_triton(torch.device(DEVICE)) is not None, reason="needs a GPU, or TRITON_INTERPRET=1"
)
IMPLS = ["cpu", pytest.param("triton", marks=needs_triton)]
T, N, M = 6, 8, 20


def _given(impl: str, has_bias: bool = True, wide: int = M) -> list[Tensor | None]:
    device = "cpu" if impl == "cpu" else DEVICE
    shapes = ((T, N), (wide, N), (wide,), (N, wide), (N,))
    given = [torch.randn(*shape, device=device).requires_grad_() for shape in shapes]
    return given if has_bias else [given[0], given[1], None, given[3], None]


def _kept(run: Callable[[], Tensor], given: list[Tensor | None]) -> tuple[Tensor, int]:
    """What a call returns, and bytes of what autograd keeps of it beside ``given``; a piece of memory counts once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in given if tensor is not None}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return out, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "tanh"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_one_wide_tensor_is_kept(impl, activation, has_bias) -> None:
    """Two calls of linear_act keep two where the slope cannot be had from the result alone. The gradients are plain
    PyTorch's, in every walk back the same."""
    given = _given(impl, has_bias)
    out, kept = _kept(lambda: ctxfast.feed_forward(*given, activation=activation, impl=impl), given)
    assert kept == T * M * 4

    def apart() -> Tensor:
        wide = ctxfast.linear_act(*given[:3], activation=activation, impl=impl)
        return ctxfast.linear_act(wide, *given[3:])

    twice = impl == "triton" or activation.startswith("gelu")
    assert _kept(apart, given)[1] == (1 + twice) * kept
    leaves, grad = [tensor for tensor in given if tensor is not None], torch.randn_like(out)
    expected = ctxfast.feed_forward(*given, activation=activation, impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    for one, two in zip(found, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)
    for one, two in zip(found, torch.autograd.grad(out, leaves, grad), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpointing_leaves_nothing_of_the_wide_size(impl) -> None:
    """Non-reentrant checkpointing drops the product too, and makes it again to the same bits."""
    given = _given(impl, wide=M + 1)  # what other tests left has other shapes

    def run(*given: Tensor) -> Tensor:
        return ctxfast.feed_forward(*given, impl=impl)

    plain = torch.autograd.grad(run(*given).sum(), given)
    out = torch.utils.checkpoint.checkpoint(run, *given, use_reentrant=False)
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, Tensor) and each.shape == (T, M + 1)]
    for one, two in zip(plain, torch.autograd.grad(out.sum(), given), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_is_wanted_gets_a_gradient(impl) -> None:
    """Frozen layers, an input without a gradient, a block of which the last bias alone learns: every choice of five."""
    given = _given(impl)
    grad = torch.randn(T, N, device=given[0].device)
    for activation in ("gelu", "tanh", "relu"):
        whole = torch.autograd.grad(ctxfast.feed_forward(*given, activation=activation, impl=impl), given, grad)
        for wanted in product((False, True), repeat=5):
            leaves = [tensor.detach().requires_grad_(wants) for tensor, wants in zip(given, wanted)]
            out = ctxfast.feed_forward(*leaves, activation=activation, impl=impl)
            assert out.requires_grad == any(wanted)
            if any(wanted):
                out.backward(grad)
            for leaf, wants, expected in zip(leaves, wanted, whole):
                assert (leaf.grad is not None) == wants
                assert not wants or torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_under_autocast(impl) -> None:
    """Products in 16 bits, gradients in the parameters' dtype; also where the backward is differentiated."""
    dtype = torch.bfloat16 if impl == "cpu" else torch.float16
    given = _given(impl)
    with torch.autocast(given[0].device.type, dtype):
        out = ctxfast.feed_forward(*given, impl=impl)
    assert out.dtype == dtype
    exact = ctxfast.feed_forward(*given, impl="reference")
    torch.testing.assert_close(out.detach().float(), exact.detach(), rtol=0, atol=0.3)
    grad = torch.randn_like(exact)
    wanted = torch.autograd.grad(exact, given, grad)
    for is_recorded in (False, True):
        found = torch.autograd.grad(out, given, grad.to(dtype), create_graph=is_recorded, retain_graph=True)
        for one, two in zip(found, wanted, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one.detach(), two, rtol=0, atol=5e-2 * float(two.abs().max()))


@needs_triton
def test_the_parts_without_autograd() -> None:
    """For a Function over more than this op: the same bits, and nothing that it is given changes."""
    triton = registry.OPS["feed_forward"].module("triton")
    given = _given("triton")
    out = ctxfast.feed_forward(*given, impl="triton")
    grad = torch.randn_like(out)
    with torch.no_grad():
        found, kept = triton.forward(*given, "gelu")
        before = [tensor.clone() for tensor in (grad, kept, *given)]
        grads = triton.backward(grad, *given[:4], kept, "gelu", False, (True,) * 5)
        assert torch.equal(found, out)
        for one, two in zip((grad, kept, *given), before, strict=True):
            assert torch.equal(one, two)
        for one, two in zip(grads, torch.autograd.grad(out, given, grad), strict=True):
            assert torch.equal(one, two)
        # It is written to in place, however it lies.
        plain = torch.randn(T, M, device=DEVICE)
        turned = plain.t().contiguous().t()
        for one in (plain, turned):
            triton._activation_backward(one, kept, given[2], "gelu", True, True)
        assert torch.equal(plain, turned)


@needs_triton
def test_what_triton_leaves_to_others() -> None:
    x, up, _, down, _ = (tensor.detach() for tensor in _given("triton"))
    with pytest.raises(RuntimeError, match="there is no activation to fuse or recompute"):
        ctxfast.feed_forward(x, up, None, down, activation="none", impl="triton")
    with pytest.raises(RuntimeError, match="int8 products run on the CPU"):
        ctxfast.feed_forward(x, up, None, down, weight_dtype=torch.int8, impl="triton")


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.int8)]
)
@pytest.mark.parametrize("rows", [1, 16, 130])
def test_the_cpu_gives_the_bits_of_two_linear_layers(dtype, weight_dtype, rows) -> None:
    shapes = ((rows, 96), (390, 96), (390,), (96, 390), (96,))
    x, up, up_bias, down, down_bias = (torch.randn(*shape).to(dtype) for shape in shapes)
    options = dict(weight_dtype=weight_dtype, impl="cpu")
    for activation in ("gelu", "none"):
        wide = ctxfast.linear_act(x, up, up_bias, activation=activation, **options)
        expected = ctxfast.linear_act(wide, down, down_bias, **options)
        found = ctxfast.feed_forward(x, up, up_bias, down, down_bias, activation=activation, **options)
        assert torch.equal(found, expected)


def test_int8_is_for_inference() -> None:
    given = _given("cpu")
    with pytest.raises(RuntimeError, match="its int8 product has no gradient"):
        ctxfast.feed_forward(*given, weight_dtype=torch.int8, impl="cpu")
    assert ctxfast.feed_forward(*given, weight_dtype=torch.int8).requires_grad  # the reference has


def test_weights_in_training_are_not_kept_packed() -> None:
    given = _given("cpu")
    before = len(CACHE)
    ctxfast.feed_forward(*given, impl="cpu").sum().backward()
    assert len(CACHE) == before
    given[1].requires_grad_(False)  # met again, the same
    ctxfast.feed_forward(*given, impl="cpu").sum().backward()
    assert len(CACHE) == before + 1
    with torch.no_grad():
        ctxfast.feed_forward(*given, impl="cpu")
    assert len(CACHE) == before + 2


# who calls it


@contextmanager
def _ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ops that are called inside, in their order."""
    ran: list[str] = []
    prepared = calls.prepared
    with monkeypatch.context() as patch:
        patch.setattr(calls, "prepared", lambda spec, *rest: ran.append(spec.name) or prepared(spec, *rest))
        yield ran


def test_a_block_is_one_call(monkeypatch) -> None:
    block, x = ctxfast.nn.FeedForward(N, M), torch.randn(T, N)
    dense, out = block.intermediate.dense, block.output.dense
    with _ops(monkeypatch) as ran:
        found = block(x)
    assert ran == ["feed_forward", "add_layer_norm"]
    wide = nn.functional.gelu(dense(x))
    torch.testing.assert_close(found, nn.functional.layer_norm(x + out(wide), (N,), eps=1e-12), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"ctxfast\.feed_forward: impl='triton' was asked for"):
        ctxfast.nn.FeedForward(N, M, activation="none", impl="triton")(x)


def _hook(part: str) -> Callable[[nn.Module], None]:
    return lambda block: block.get_submodule(part).register_forward_hook(lambda module, args, output: output * 2)


def _pre_hook(block: nn.Module) -> None:
    block.output.register_forward_pre_hook(lambda module, args: (args[0] * 2, args[1]))


def _other_forward(block: nn.Module) -> None:
    plain = block.intermediate.forward
    block.intermediate.forward = lambda x: plain(x) * 2


class _Twice(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *given: Tensor) -> Tensor:
        return self.inside(*given) * 2


def _replace(block: nn.Module) -> None:
    block.intermediate = _Twice(block.intermediate)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "hook of the first half": _hook("intermediate"),
    "hook of its linear layer": _hook("intermediate.dense"),
    "hook of the second half": _hook("output"),
    "hook of its linear layer too": _hook("output.dense"),
    "pre-hook": _pre_hook,
    "forward of an object": _other_forward,
    "another module": _replace,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whoever_looks_into_a_block_sees_its_halves(monkeypatch, change) -> None:
    block, x = ctxfast.nn.FeedForward(N, M, activation="relu"), torch.randn(T, N)
    before = block(x)
    change(block)
    with _ops(monkeypatch) as ran:
        after = block(x)
    assert "feed_forward" not in ran
    assert (after - before).abs().max() > 1e-2


def test_halves_that_were_asked_for_different_things_are_two_calls(monkeypatch) -> None:
    x = torch.randn(T, N)
    for change in (dict(impl="reference"), dict(weight_dtype=torch.int8)):
        block = ctxfast.nn.FeedForward(N, M)
        vars(block.intermediate).update(change)
        with torch.no_grad(), _ops(monkeypatch) as ran:
            block(x)
        assert ran == ["linear_act", "linear_act", "add_layer_norm"]


@pytest.mark.parametrize("kind", ["whole", "a part by name"])
def test_a_layer_in_training_calls_it(monkeypatch, kind) -> None:
    layer = ctxfast.nn.TransformerLayer(N, 2, M)
    if kind != "whole":
        layer.attention.self.impl = "reference"  # the layer's parts are called then
    with _ops(monkeypatch) as ran:
        layer(torch.randn(T, N), torch.tensor([0, T], dtype=torch.int32), T)
    assert ran == ["linear_act", "attention", "linear_act", "add_layer_norm", "feed_forward", "add_layer_norm"]


def test_use_impl_for_it_alone_opens_the_one_call(monkeypatch) -> None:
    layer = ctxfast.nn.TransformerLayer(N, 2, M)
    with torch.no_grad(), ctxfast.use_impl(feed_forward="reference"), _ops(monkeypatch) as ran:
        layer(torch.randn(T, N), torch.tensor([0, T], dtype=torch.int32), T)
    assert ran.count("feed_forward") == 1 and "transformer_layers" not in ran


@pytest.mark.parametrize("kind", ["Bert", "DistilBert"])
def test_a_swapped_encoder_in_training_calls_it(monkeypatch, kind) -> None:
    pytest.importorskip("transformers")
    model = tiny_model(kind)
    expected = model(IDS, attention_mask=MASK).last_hidden_state
    ctxfast.swap_in(model)
    with _ops(monkeypatch) as ran:
        found = model(IDS, attention_mask=MASK).last_hidden_state
    assert ran.count("feed_forward") == 2  # a layer each
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)
