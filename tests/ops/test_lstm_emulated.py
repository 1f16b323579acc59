# SPDX-License-Identifier: Apache-2.0
"""``lstm``'s CUDA implementations on the emulator: packing, kernels and gradients, against the float64 reference."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support import emulated, layouts, parity
from torch import Tensor

from ctxfast._core import registry
from ctxfast.ops.lstm import reference

pytestmark = pytest.mark.slow  # the kernels are compiled first, a minute
SPEC = registry.OPS["lstm"]
IMPLS = [one.name for one in SPEC.impls if one.device == "cuda"]
HALF = [torch.float16, torch.bfloat16]


def _case(
    dtype: torch.dtype, B: int, T: int, H: int, P: int | None = None, R: int = 2, I: int = 5,  # noqa: E741
    ragged: bool = True, states: bool = True, clip: float | None = None, scale: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    torch.manual_seed(B + 31 * T + H)
    size = H if P is None else P

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * std).to(dtype)

    lengths = torch.randint(0, T + 1, (B,)) if ragged else None
    return dict(
        input=tuple(draw(B, T, I) for _ in range(R)),
        weight_ih=tuple(draw(4 * H, I, std=I**-0.5 * scale) for _ in range(R)),
        weight_hh=tuple(draw(4 * H, size, std=size**-0.5 * scale) for _ in range(R)),
        bias=tuple(draw(4 * H, std=0.1) for _ in range(R)),
        weight_proj=None if P is None else tuple(draw(P, H, std=2 * H**-0.5 * scale) for _ in range(R)),
        lengths=lengths,
        initial_state=(draw(R, B, size, std=0.5), draw(R, B, H, std=0.5)) if states else None,
        cell_clip=clip,
        proj_clip=clip,
    )


SIZES = {
    "small plain": dict(B=3, T=3, H=64),
    "one of everything": dict(B=1, T=1, H=64, R=1, ragged=False, states=False),
    "projected, clipped": dict(B=9, T=3, H=128, P=32, clip=0.3, scale=2.0),
    "projected, one direction": dict(B=2, T=4, H=128, P=32, R=1, ragged=False),
    "rows for several tiles": dict(B=33, T=2, H=64),
    "no input bias, no states": dict(B=5, T=2, H=64, states=False),
}
# Sizes that fit no tile: for implementations that take any.
ODD = {
    "odd": dict(B=3, T=3, H=7),
    "odd, projected": dict(B=9, T=2, H=13, P=5, clip=0.3, scale=2.0),
    "no steps": dict(B=3, T=0, H=8, ragged=False),
}
# For those that hold the weights on chip, in blocks of 16 and 64 cells.
BLOCKS = {
    "blocks, plain": dict(B=3, T=3, H=128),
    "blocks, one of everything": dict(B=1, T=1, H=128, R=1, ragged=False, states=False),
    "blocks, projected, clipped": dict(B=9, T=3, H=512, P=64, clip=0.3, scale=2.0),
    "blocks, projected, one direction": dict(B=2, T=4, H=512, P=64, R=1, ragged=False),
    "blocks, rows for several tiles": dict(B=33, T=2, H=128),
    "blocks, projected, rows for several tiles": dict(B=33, T=2, H=512, P=64, states=False),
}
ALL = {**SIZES, **ODD, **BLOCKS}


def _module(impl: str) -> Any:
    return SPEC.module(impl)


def _call(impl: str, kwargs: dict[str, Any]) -> Any:
    return _module(impl).lstm(**parity.arguments("lstm", kwargs))


def _leaves(kwargs: dict[str, Any]) -> list[Tensor]:
    names = ("input", "weight_ih", "weight_hh", "bias", "weight_proj", "initial_state")
    return [tensor for name in names for tensor in parity.flat(kwargs[name] or ())]


def _gradients(run: Any, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    kwargs = parity.converted(kwargs, lambda tensor: tensor.detach().clone().requires_grad_())
    outputs = parity.flat(run(kwargs))
    given = [grad.to(output.dtype) for output, grad in zip(outputs, parity.grad_outputs(outputs))]
    found = torch.autograd.grad(outputs, _leaves(kwargs), given, allow_unused=True)
    return outputs, [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(_leaves(kwargs), found)]


@functools.cache
def _wanted(dtype: torch.dtype, name: str, with_gradients: bool) -> Any:
    """Reference results in ``dtype`` and in float64."""
    kwargs = _case(dtype, **ALL[name])

    def run(kwargs: dict[str, Any]) -> Any:
        return reference(**parity.arguments("lstm", kwargs))

    if with_gradients:
        return _gradients(run, kwargs), _gradients(run, parity.wide(kwargs))
    return (parity.flat(run(kwargs)), []), (parity.flat(run(parity.wide(kwargs))), [])


def _combinations() -> list[Any]:
    found = []
    for impl in IMPLS:
        on_chip = impl == "cuda"
        for dtype in HALF if on_chip else [*HALF, torch.float32]:
            for name in BLOCKS if on_chip else {**SIZES, **ODD}:
                found.append(pytest.param(impl, dtype, name, id=f"{impl}-{str(dtype)[6:]}-{name}"))
    return found


@pytest.mark.parametrize(("impl", "dtype", "name"), _combinations())
def test_parity(impl: str, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = _case(dtype, **ALL[name])
    with_gradients = name != "no steps"
    (reference_out, reference_grads), (oracle, oracle_grads) = _wanted(dtype, name, with_gradients)
    with emulated.kernels(monkeypatch, _module(impl), seed=1):
        if with_gradients:
            outputs, grads = _gradients(lambda kw: _call(impl, kw), kwargs)
        else:
            outputs, grads = parity.flat(_call(impl, kwargs)), []
    ceiling = SPEC.ceiling[dtype]
    for i, (got, ref, want) in enumerate(zip(outputs, reference_out, oracle)):
        parity.check(f"output {i}", got, ref, want, dtype, ceiling, parity.FORWARD)
    if kwargs["cell_clip"] and dtype != torch.float32:
        return  # half-precision rounding crosses the clips' kinks
    for i, (got, ref, want) in enumerate(zip(grads, reference_grads, oracle_grads)):
        parity.check(f"gradient {i}", got, ref, want, dtype, ceiling * 2, parity.GRADIENT)


@pytest.mark.parametrize("impl", IMPLS)
def test_bits_do_not_depend_on_the_order_of_threads(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = _case(torch.float16, B=9, T=3, H=512, P=64, clip=0.5, scale=2.0)
    found = []
    for seed in (0, 1, 2):
        with emulated.kernels(monkeypatch, _module(impl), seed=seed):
            outputs, grads = _gradients(lambda kw: _call(impl, kw), kwargs)
        found.append([*outputs, *grads])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("impl", IMPLS)
def test_states_of_any_layout(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learned state is one row for all; a slice of a wider state has gaps that 8 divides."""
    kwargs = _case(torch.float16, B=9, T=2, H=512, P=64)
    h_0, c_0 = kwargs["initial_state"]
    with emulated.kernels(monkeypatch, _module(impl), seed=1), torch.no_grad():
        for changed in (h_0[:, :1].expand_as(h_0), layouts.sliced(h_0), layouts.transposed(h_0)):
            kwargs["initial_state"] = (changed, layouts.sliced(c_0))
            found = parity.flat(_call(impl, kwargs))
            kwargs["initial_state"] = (changed.clone(memory_format=torch.contiguous_format), c_0)
            assert all(torch.equal(a, b) for a, b in zip(found, parity.flat(_call(impl, kwargs))))


@pytest.mark.parametrize("impl", IMPLS)
def test_inference_stores_no_cells_and_agrees(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = _case(torch.float16, B=3, T=3, H=128)
    with emulated.kernels(monkeypatch, _module(impl)):
        with torch.no_grad():
            plain = parity.flat(_call(impl, kwargs))
        trained, _ = _gradients(lambda kw: _call(impl, kw), kwargs)
    assert all(torch.equal(a, b) for a, b in zip(plain, trained))


@pytest.mark.parametrize("impl", IMPLS)
def test_changed_weights_are_seen(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = _case(torch.float16, B=2, T=2, H=64, R=1)
    with emulated.kernels(monkeypatch, _module(impl)), torch.no_grad():
        before = _call(impl, kwargs)[0]
        for name in ("weight_ih", "weight_hh", "bias"):
            kwargs[name][0].mul_(-1)
            after = _call(impl, kwargs)[0]
            assert not torch.equal(before, after)
            fresh = {key: parity.convert(value, torch.clone) for key, value in kwargs.items()}
            assert torch.equal(after, _call(impl, fresh)[0])
            before = after


def test_gradients_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both implementations share what differentiates a backward: see ``device.recurrence``."""
    case = _case(torch.float32, **ODD["odd, projected"])

    def penalty(run: Any, kwargs: dict[str, Any]) -> list[Tensor]:
        kwargs = parity.converted(kwargs, lambda tensor: tensor.detach().clone().requires_grad_())
        outputs = parity.flat(run(kwargs))
        first = torch.autograd.grad(sum(y.sin().sum() for y in outputs), _leaves(kwargs), create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), _leaves(kwargs))
        return [grad.detach() for grad in (*first, *second)]

    def definition(kwargs: dict[str, Any]) -> Any:
        return reference(**parity.arguments("lstm", kwargs))

    with emulated.kernels(monkeypatch, _module("cuda_step"), seed=1):
        found = penalty(lambda kwargs: _call("cuda_step", kwargs), case)
    for one, two, exact in zip(found, penalty(definition, case), penalty(definition, parity.wide(case))):
        parity.check("derivative", one, two, exact, torch.float32, 1e-4, 2 * parity.GRADIENT)


def test_every_implementation_of_the_table_is_here() -> None:
    assert [one.name for one in registry.OPS["lstm"].impls if one.device == "cuda"] == IMPLS and IMPLS
