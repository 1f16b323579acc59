# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels over rows: dropout masks read out and differentiated, rows without variance, activations far out,
the loss of an output layer in chunks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.parity import FORWARD, GRADIENT, check, gradients, run, wide
from torch import Tensor

import ctxfast
from ctxfast._core import capability, registry
from ctxfast.ops.linear_cross_entropy import chunks
from ctxfast.ops.shared import philox

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
P = 0.25

needs_triton = pytest.mark.skipif(
    capability.why_no_triton(torch.device(DEVICE)) is not None, reason="needs a GPU, or TRITON_INTERPRET=1"
)


def _normal(*size: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(*size, device=DEVICE).requires_grad_(requires_grad)


@needs_triton
@pytest.mark.parametrize("has_bias", [False, True])
def test_add_layer_norm_dropout(has_bias) -> None:
    """The mask, read from the backward, is the forward's; the share dropped is p; another call draws another."""
    x, residual, weight, bias = _normal(60, 130), _normal(60, 130), _normal(130), _normal(130)
    x_bias = _normal(130) if has_bias else None
    leaves = [x, residual, weight, bias, *([x_bias] if has_bias else [])]
    given = torch.randn(60, 130, device=DEVICE)

    out = ctxfast.add_layer_norm(x, residual, weight, bias, x_bias, dropout_p=P, impl="triton")
    grads = torch.autograd.grad(out, leaves, given)
    kept = grads[0] != 0
    assert abs(float(kept.float().mean()) - (1 - P)) < 0.02
    for share in (kept.float().mean(0), kept.float().mean(1)):
        assert 0.4 < float(share.min()) < float(share.max()) <= 1

    moved = x + x_bias if has_bias else x
    right = F.layer_norm(residual + kept * moved / (1 - P), (130,), weight, bias, 1e-12)
    torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)
    for one, two in zip(grads, torch.autograd.grad(right, leaves, given)):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)

    again = ctxfast.add_layer_norm(x, residual, weight, bias, x_bias, dropout_p=P, impl="triton")
    assert not torch.equal(again, out)


@needs_triton
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_add_layer_norm_with_a_copy(dropout_p, low) -> None:
    """The copy is the result rounded once; its gradient counts as much as the result's own, unrounded."""
    kernels = registry.OPS["add_layer_norm"].module("triton")
    x, residual = torch.randn(60, 130, device=DEVICE).to(low), torch.randn(60, 130, device=DEVICE)
    weight, bias, x_bias = (torch.randn(130, device=DEVICE) for _ in range(3))
    seeds = philox.draw_seeds(x, dropout_p)
    given = (x, residual, weight, bias, x_bias, 1e-12, dropout_p, seeds)
    out, copy, mean, rstd = kernels.forward(*given, torch.float32, low, True)
    plain, none, *_ = kernels.forward(*given, torch.float32, None, True)
    assert out.dtype == torch.float32 and torch.equal(out, plain) and none.numel() == 0
    step = torch.finfo(low).eps  # the interpreter cuts bfloat16 off where a GPU rounds it
    torch.testing.assert_close(copy, out.to(low), rtol=step, atol=0)

    grad, low_grad = torch.randn_like(out), torch.randn_like(copy)
    rest = (x, residual, weight, x_bias, mean, rstd, dropout_p, seeds, True)
    found = kernels.backward(grad, low_grad, *rest)
    right = kernels.backward(grad + low_grad.float(), None, *rest)
    for one, two in zip(found, right, strict=True):
        assert torch.equal(one, two)
    grad_sum, grad_x = found[:2]
    assert grad_sum.dtype == torch.float32 and grad_x.dtype == low
    kept = grad_x != 0 if dropout_p else torch.ones_like(x, dtype=torch.bool)
    torch.testing.assert_close(grad_x, (grad_sum * kept / (1 - dropout_p)).to(low), rtol=2 * step, atol=0)


@needs_triton
def test_dropout_masks_of_many_calls() -> None:
    """Elements are independent: neighbours, in one draw or two, are kept together as often as chance has it."""
    x = torch.ones(64, 512, device=DEVICE, requires_grad=True)
    zero, one = torch.zeros(512, device=DEVICE), torch.ones(512, device=DEVICE)
    counts = torch.zeros(64, 512, device=DEVICE)
    together = 0.0
    for _ in range(8):
        residual = torch.randn(64, 512, device=DEVICE)
        out = ctxfast.add_layer_norm(x, residual, one, zero, dropout_p=0.5, impl="triton")
        (grad,) = torch.autograd.grad(out, x, torch.randn_like(out))
        kept = (grad != 0).float()
        counts += kept
        together += float((kept[:, 1:] * kept[:, :-1]).mean()) / 8
    assert abs(together - 0.25) < 0.01
    # Binomial(8, 1/2): all or none of eight calls, 2 in 256 elements.
    assert 0.004 < float(((counts == 0) | (counts == 8)).float().mean()) < 0.012


@needs_triton
def test_embed_layer_norm_dropout() -> None:
    ids = [torch.randint(0, rows, (70,), device=DEVICE) for rows in (9, 20, 2)]
    tables = [_normal(rows, 130) for rows in (9, 20, 2)]
    weight, bias = _normal(130), _normal(130)
    out = ctxfast.embed_layer_norm(
        *ids, *tables, weight, bias, padding_idx=3, position_padding_idx=-1, dropout_p=P, impl="triton"
    )
    kept = (out != 0).float()
    assert abs(float(kept.mean()) - (1 - P)) < 0.02
    x = F.embedding(ids[0], tables[0], 3) + F.embedding(ids[1], tables[1], -1) + F.embedding(ids[2], tables[2])
    right = F.layer_norm(x, (130,), weight, bias, 1e-12) * kept / (1 - P)
    torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)
    given, leaves = torch.randn(70, 130, device=DEVICE), [*tables, weight, bias]
    found = torch.autograd.grad(out, leaves, given)
    for one, two in zip(found, torch.autograd.grad(right, leaves, given)):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert (found[0][3] == 0).all() and (found[1][19] == 0).all()


@needs_triton
@pytest.mark.parametrize("size", [65, 768, 1023])
def test_rows_of_equal_values_have_no_variance(size) -> None:
    """With eps 1e-12 the last bit of the mean would show in the result."""
    x = torch.tensor([0.1, 5.0, -3000.7, 0.0], device=DEVICE)[:, None].expand(4, size)
    weight, bias = torch.ones(size, device=DEVICE), torch.full((size,), 0.5, device=DEVICE)
    for dtype in (torch.float16, torch.bfloat16):
        args = [x.to(dtype), None, weight.to(dtype), bias.to(dtype)]
        assert torch.isfinite(ctxfast.add_layer_norm(*args, impl="triton")).all()
    exact = x.half()[1::2].float()  # sums of few bits are exact in any order
    assert (ctxfast.add_layer_norm(exact, None, weight, bias, impl="triton") == 0.5).all()


@needs_triton
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "tanh"])
def test_activations_far_out_and_near_zero(activation) -> None:
    points = torch.cat([torch.linspace(-30, 30, 301), torch.tensor([-1e4, 1e4, 0.0, 1e-6, -1e-6, 0.1499, 0.1501])])
    points = points.to(DEVICE)
    one = torch.eye(1, device=DEVICE)
    x = points[:, None].requires_grad_()
    out = ctxfast.linear_act(x, one, torch.zeros(1, device=DEVICE), activation=activation, impl="triton")
    (slope,) = torch.autograd.grad(out.sum(), x)
    wide_x = points[:, None].double().requires_grad_()
    right = ctxfast.linear_act(wide_x, one.double(), None, activation=activation, impl="reference")
    (right_slope,) = torch.autograd.grad(right.sum(), wide_x)
    torch.testing.assert_close(out.double(), right, rtol=2e-6, atol=3e-7)
    torch.testing.assert_close(slope.double(), right_slope, rtol=2e-6, atol=1e-6)


def _kept(run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What a call returns, and what autograd keeps of it."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        return run(), kept


@needs_triton
def test_linear_act_keeps_the_product_alone() -> None:
    x, weight, bias = _normal(6, 8), _normal(10, 8), _normal(10)
    _, kept = _kept(lambda: ctxfast.linear_act(x, weight, bias, activation="gelu", impl="triton"))
    made = [tensor for tensor in kept if all(tensor is not given for given in (x, weight, bias))]
    assert sum(tensor.shape == (6, 10) for tensor in made) == 1


# linear_cross_entropy: both implementations take rows in chunks

IMPLS = ["cpu", pytest.param("triton", marks=needs_triton)]
SPEC = registry.OPS["linear_cross_entropy"]


def _loss_case(reduction: str, dtype: torch.dtype, device: str) -> dict:
    labels = torch.randint(0, 70, (50,))
    labels[torch.rand(50) < 0.3] = -100
    given = dict(
        hidden=torch.randn(50, 24), weight=torch.randn(70, 24) / 5, labels=labels, bias=torch.randn(70) / 2,
        reduction=reduction,
    )  # fmt: skip
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }


def _compare_loss(kwargs: dict, impl: str) -> None:
    names, dtype = ("hidden", "weight", "bias"), kwargs["hidden"].dtype
    mine, mine_grads, given = gradients("linear_cross_entropy", kwargs, names, impl)
    plain, plain_grads, _ = gradients("linear_cross_entropy", kwargs, names, "reference", given)
    right, right_grads, _ = gradients("linear_cross_entropy", wide(kwargs), names, "reference", given)
    check("loss", mine[0], plain[0], right[0].detach(), dtype, SPEC.ceiling[dtype], FORWARD)
    for (name, one), (_, two), (_, three) in zip(mine_grads, plain_grads, right_grads):
        check(f"gradient of {name}", one, two, three, dtype, SPEC.ceiling[dtype], GRADIENT)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loss_in_chunks(impl, reduction, dtype, monkeypatch) -> None:
    """Chunks of eight rows; the logits of one chunk are all that is ever held."""
    device = "cpu" if impl == "cpu" else DEVICE
    kwargs = _loss_case(reduction, dtype, device)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 8 * 128 * dtype.itemsize)
    shapes: list[tuple[int, ...]] = []
    plain = chunks.torch_ops.allocate
    monkeypatch.setattr(
        chunks.torch_ops, "allocate", lambda size, *rest: shapes.append(tuple(size)) or plain(size, *rest)
    )
    _compare_loss(kwargs, impl)
    held = [shape for shape in shapes if len(shape) == 2 and shape[1] == 128]
    assert held and all(shape[0] <= 8 for shape in held)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@needs_triton
def test_loss_without_reading_the_number_of_labels(reduction, monkeypatch) -> None:
    """What a stream under capture does: all rows, those without a label with a gradient of zero."""
    monkeypatch.setattr(chunks, "labelled", lambda labels, ignore_index: None)
    _compare_loss(_loss_case(reduction, torch.float32, DEVICE), "triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_is_wanted_gets_a_gradient(impl) -> None:
    kwargs = _loss_case("mean", torch.float32, "cpu" if impl == "cpu" else DEVICE)
    kwargs["hidden"].requires_grad_()
    ctxfast.linear_cross_entropy(**kwargs, impl=impl).backward()
    assert kwargs["hidden"].grad is not None and kwargs["weight"].grad is None
    (grad,) = torch.autograd.grad(ctxfast.linear_cross_entropy(**kwargs, impl="reference"), kwargs["hidden"])
    torch.testing.assert_close(kwargs["hidden"].grad, grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_small_gradients_of_float16_survive_a_loss_scale(impl) -> None:
    """A scaled loss lifts gradients above what float16 can hold, as it does for the reference."""
    kwargs = _loss_case("mean", torch.float16, "cpu" if impl == "cpu" else DEVICE)
    kwargs["hidden"] = kwargs["hidden"] * 1e-3
    names, scale = ("hidden", "weight"), [torch.tensor(2.0**14)]
    _, mine, _ = gradients("linear_cross_entropy", kwargs, names, impl, scale)
    _, right, _ = gradients("linear_cross_entropy", wide(kwargs), names, "reference", scale)
    for (name, one), (_, two) in zip(mine, right):
        error = (one.cpu().double() - two).norm() / two.norm()
        assert error < 5e-3, name


@pytest.mark.parametrize("impl", IMPLS)
def test_outcome_is_what_run_gives(impl) -> None:
    """Without autograd the losses are the same to the last bit."""
    kwargs = _loss_case("none", torch.float32, "cpu" if impl == "cpu" else DEVICE)
    with torch.no_grad():
        plain = run("linear_cross_entropy", kwargs, impl)[0]
    kwargs["weight"].requires_grad_()
    assert torch.equal(run("linear_cross_entropy", kwargs, impl)[0].detach(), plain)


@needs_triton
def test_longest_rows() -> None:
    """The sum over x's rows is then made beside the kernel."""
    leaves = [_normal(3, 8192), _normal(3, 8192), _normal(8192), _normal(8192), _normal(8192)]
    given = torch.randn(3, 8192, device=DEVICE)
    for p in (0.0, P):
        out = ctxfast.add_layer_norm(*leaves, dropout_p=p, impl="triton")
        found = torch.autograd.grad(out, leaves, given)
        torch.testing.assert_close(found[4], found[0].sum(0), rtol=1e-5, atol=1e-5)
        if p == 0:
            right = ctxfast.add_layer_norm(*leaves, impl="reference")
            torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)
            for one, two in zip(found, torch.autograd.grad(right, leaves, given)):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="it takes rows of at most 8192 elements and x has 8193"):
        one = torch.ones(8193, device=DEVICE)
        ctxfast.add_layer_norm(one[None], None, one, one, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_differentiated_twice_adds_up(impl) -> None:
    """The gradient kept from the forward is handed out, not used up; any other gradient of the loss scales it."""
    kwargs = _loss_case("mean", torch.float32, "cpu" if impl == "cpu" else DEVICE)
    weight = kwargs["weight"].requires_grad_()
    loss = ctxfast.linear_cross_entropy(**kwargs, impl=impl)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 2 * once)
    (3 * loss).backward()
    torch.testing.assert_close(weight.grad, 5 * once)
