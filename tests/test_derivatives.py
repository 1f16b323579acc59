# SPDX-License-Identifier: Apache-2.0
"""Gradients of gradients, forward mode and torch.func, by the op table: every implementation gives what the definition
gives in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.parity import (
    CLOSE,
    GRADIENT,
    arguments,
    check,
    combinations,
    converted,
    device_of,
    dtype_of,
    flat,
    public,
    takes,
    wide,
)
from torch import Tensor

import ctxfast
from ctxfast._core import capability, registry

SEED = 11
LARGEST = 40_000  # elements of all inputs: the definition runs three times over them


# Their smallest cases are those of the kernels' own tiles.
_LARGEST_HALF = 300_000


def _small(case: registry.Case, largest: int = LARGEST) -> dict[str, Any] | None:
    """Arguments of a case that has gradients, is small and not empty, draws no dropout and rounds nothing inside."""
    kwargs = case.make("cpu", torch.float32, SEED)
    sizes = [tensor.numel() for tensor in flat(list(kwargs.values()))]
    if not case.grads or not all(sizes) or not 1 < sum(sizes) <= largest:
        return None
    return None if kwargs.get("dropout_p") or case.tolerance is not None else kwargs


def _rows(count: int) -> list:
    """For every kernel its first ``count`` small cases, and of lstm one with everything."""
    rows = []
    for spec, implementation in combinations():
        if implementation.name == "reference":
            continue
        on_gpu, taken = device_of(implementation) == "cuda", 0
        marks = [pytest.mark.gpu] if on_gpu else []
        for case in spec.cases():
            half_only = dtype_of(spec, implementation) != torch.float32
            kwargs = _small(case, _LARGEST_HALF if half_only else LARGEST)
            is_named = case.id == "elmo-like-ragged-state"
            if kwargs is None or (taken >= count and not is_named):
                continue
            if takes(spec, implementation, case, SEED):
                name = f"{spec.name}-{implementation.name}-{case.id}"
                rows.append(pytest.param(spec, implementation, case, id=name, marks=marks))
                taken += 1
    return rows


def _leaves(kwargs: dict[str, Any], names: tuple[str, ...]) -> tuple[dict[str, Any], list[Tensor]]:
    kwargs = converted(kwargs, lambda tensor: tensor.detach().clone())
    return kwargs, [tensor.requires_grad_() for name in names for tensor in flat(kwargs[name])]


def _reached(outputs: list[Tensor]) -> list[Tensor]:
    return [output for output in outputs if output.requires_grad]


def _penalty(op: str, kwargs: dict[str, Any], names: tuple[str, ...], impl: str) -> tuple[list[Tensor], list[Tensor]]:
    """First gradients of a weighted sum of the outputs, and the gradients of these gradients' squares."""
    kwargs, leaves = _leaves(kwargs, names)
    outputs = _reached(flat(public(op)(**kwargs, impl=impl)))
    total = sum((output * torch.linspace(-1, 1, output.numel()).to(output).view_as(output)).sum() for output in outputs)
    first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    first = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(first, leaves)]
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves, allow_unused=True)
    return first, [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(second, leaves)]


@pytest.mark.parametrize(("spec", "implementation", "case"), _rows(2))
def test_gradients_of_gradients(spec, implementation, case) -> None:
    dtype = dtype_of(spec, implementation)
    kwargs = case.make(device_of(implementation), dtype, SEED)
    got = _penalty(spec.name, kwargs, case.grads, implementation.name)
    reference = _penalty(spec.name, kwargs, case.grads, "reference")
    oracle = _penalty(spec.name, wide(kwargs), case.grads, "reference")
    for order, triple in enumerate(zip(got, reference, oracle), 1):
        for i, tensors in enumerate(zip(*triple)):
            tensors = [tensor.detach() for tensor in tensors]
            ceiling = 1e-4 if dtype == torch.float32 else spec.ceiling[dtype]
            check(f"derivative {order} of input {i}", *tensors, dtype, ceiling, order * GRADIENT)


def _function(op: str, kwargs: dict[str, Any], names: tuple[str, ...]) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The op as a function of its differentiable tensors, by the implementation that it chooses, and these tensors."""
    kwargs, leaves = _leaves(kwargs, names)
    leaves = tuple(leaf.detach() for leaf in leaves)

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)

        def replaced(value: Any) -> Any:
            if isinstance(value, Tensor):
                return next(left) if value.is_floating_point() else value
            return type(value)(replaced(item) for item in value) if isinstance(value, (list, tuple)) else value

        changed = {name: replaced(value) if name in names else value for name, value in kwargs.items()}
        # In the order in which _leaves found them.
        return tuple(flat(public(op)(**changed)))

    return function, leaves


@pytest.mark.parametrize("spec", list(registry.OPS.values()), ids=lambda spec: spec.name)
def test_forward_mode_and_transforms(spec) -> None:
    """jvp, a dual number, vmap of a gradient and a Hessian-vector product are those of the definition in float64."""
    case, kwargs = next((case, found) for case in spec.cases() if (found := _small(case)) is not None)
    torch.manual_seed(0)
    function, leaves = _function(spec.name, kwargs, case.grads)
    exact, wide_leaves = _function(spec.name, wide(kwargs), case.grads)
    directions = tuple(torch.randn_like(leaf) for leaf in leaves)
    wide_directions = tuple(direction.double() for direction in directions)

    for name, way in WAYS.items():
        got, expected = way(function, leaves, directions), way(exact, wide_leaves, wide_directions)
        assert len(got) == len(expected) > 0
        for one, two in zip(got, expected):
            scale = max(1e-3, float(two.abs().max()))
            torch.testing.assert_close(
                one.double() / scale, two / scale, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def _loss(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *given: sum(output.sin().sum() for output in function(*given))


def _dual(function: Callable[..., Any], values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.autograd.forward_ad.dual_level():
        pairs = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(values, tangents)]
        with torch.no_grad():  # where calls on plain tensors take their fastest way
            outputs = function(*pairs)
        found = [torch.autograd.forward_ad.unpack_dual(output).tangent for output in outputs]
    assert all(tangent is not None for tangent in found)
    return found


def _hvp_over_reverse(function: Callable[..., Any], values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """By vmap over a backward that is recorded, as torch.autograd.functional's vectorised Hessians go."""
    leaves = [value.clone().requires_grad_() for value in values]
    grads = torch.autograd.grad(_loss(function)(*leaves), leaves, create_graph=True)
    along = torch.stack([torch.zeros(()), torch.ones(())]).to(values[0])
    product = sum((grad * tangent).sum() for grad, tangent in zip(grads, tangents))
    return torch.autograd.grad(product, leaves, along, is_grads_batched=True)


WAYS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, x, v: torch.func.jvp(f, x, v)[1],
    "vjp": lambda f, x, v: torch.func.vjp(_loss(f), *x)[1](torch.ones((), dtype=x[0].dtype)),
    "dual": _dual,
    "hvp": lambda f, x, v: torch.func.jvp(torch.func.grad(_loss(f), tuple(range(len(x)))), x, v)[1],
    "hvp over reverse": _hvp_over_reverse,
    "vmap of grad": lambda f, x, v: torch.func.vmap(torch.func.grad(_loss(f), tuple(range(len(x)))))(
        *(torch.stack((leaf, leaf + 0.1 * direction)) for leaf, direction in zip(x, v))
    ),
}


@pytest.mark.parametrize(("spec", "implementation", "case"), _rows(1))
def test_backward_under_vmap(spec, implementation, case) -> None:
    """A kernel's own graph, walked back once for two gradients at a time."""
    dtype = dtype_of(spec, implementation)
    kwargs, leaves = _leaves(case.make(device_of(implementation), dtype, SEED), case.grads)
    outputs = _reached(flat(public(spec.name)(**kwargs, impl=implementation.name)))
    torch.manual_seed(0)
    given = [torch.randn(2, *output.shape).to(output) for output in outputs]

    def back(grads: list[Tensor], **how: bool) -> list[Tensor]:
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True, **how)

    for i in range(2):
        expected = back([grad[i] for grad in given])
        for one, two in zip(back(given, is_grads_batched=True), expected):
            rtol, atol = (10 * each for each in CLOSE[dtype])
            torch.testing.assert_close(one[i], two, rtol=rtol, atol=atol * max(1.0, float(two.abs().max())))


def _dropout_calls() -> list:
    sample = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=sample)

    rows = torch.arange(37)
    return [
        ("attention", dict(qkv=normal(50, 3, 2, 16), cu_seqlens=torch.tensor([0, 45, 50]), max_seqlen=45), "qkv"),
        ("add_layer_norm", dict(x=normal(2, 9, 50), residual=None, weight=normal(50), bias=normal(50)), "x"),
        (
            "embed_layer_norm",
            dict(
                input_ids=rows, position_ids=rows, token_type_ids=rows % 2, word_embeddings=normal(37, 24),
                position_embeddings=normal(37, 24), token_type_embeddings=normal(2, 24), weight=normal(24),
                bias=normal(24),
            ),
            "word_embeddings",
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "kwargs", "name"), _dropout_calls(), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_dropout_has_one_mask(op, kwargs, name, impl) -> None:
    """A backward that is differentiated drops what the forward dropped."""
    if impl == "triton" and not capability.is_triton_interpreted():
        pytest.skip("the kernels run on the CPU in Triton's interpreter alone")
    kwargs = {**kwargs, "dropout_p": 0.4, name: kwargs[name].clone().requires_grad_()}
    objection = registry.OPS[op].supports(registry.OPS[op].impl(impl), arguments(op, kwargs))
    if objection is not None:
        assert "dropout" in objection
        return
    output = public(op)(**kwargs, impl=impl)
    grad = torch.linspace(-1, 1, output.numel()).view_as(output)
    (plain,) = torch.autograd.grad(output, kwargs[name], grad, retain_graph=True)
    (recorded,) = torch.autograd.grad(output, kwargs[name], grad, create_graph=True)
    torch.testing.assert_close(recorded.detach(), plain, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(recorded.sin().sum(), kwargs[name])[0].abs().max() > 0


def test_an_implementation_asked_for_by_name_says_why_not() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    words = "impl='cpu' was asked for and cannot run this call: a torch.func transform"
    with pytest.raises(RuntimeError, match=words):
        torch.func.vmap(lambda row: ctxfast.functional.linear_act(row, weight, impl="cpu"))(x)
    with torch.autograd.forward_ad.dual_level():
        told = ctxfast.explain("linear_act", x, weight)
    assert told.used == "reference"
    assert "the definition is differentiated" in dict((row[0], row[2]) for row in told.rows)["cpu"]
    assert ctxfast.explain("linear_act", x, weight).used == "cpu"


def test_an_input_made_from_another_takes_its_own_share() -> None:
    """Of two arguments, one computed from the other, each has the gradient of its place alone."""
    weight = torch.randn(4, 4, requires_grad=True)
    x = weight.tanh()

    def both(impl: str) -> tuple[Tensor, ...]:
        out, _ = ctxfast.lstm(x[None], [torch.cat([weight] * 4)], [torch.cat([weight.t()] * 4)], impl=impl)
        (first,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), weight, retain_graph=True)

    for one, two in zip(both("cpu"), both("reference")):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_view_with_the_other_sign_is_read_right() -> None:
    """The imaginary part of a conjugate is a view whose values lie in memory with the other sign."""
    x = torch.randn(3, 4, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    weight = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(ctxfast.functional.linear_act(x, weight), ctxfast.functional.linear_act(x.clone(), weight))
