# SPDX-License-Identifier: Apache-2.0
"""Registered operators and the functions around them, under opcheck, torch.compile, torch.export and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.parity import (
    CLOSE,
    FORWARD,
    GRADIENT,
    arguments,
    cases_of,
    check,
    combinations,
    converted,
    device_of,
    dtype_of,
    flat,
    gradients,
    public,
    run,
    takes,
    wide,
)
from torch import nn

from ctxfast._core import registry

SEED = 7


def _rows(count: int, *, kernels_only: bool = False, quick: int | None = None) -> list:
    """The first ``count`` cases that are not degenerate, for every implementation; all but ``quick`` of the CPU's
    kernels are slow."""
    rows = []
    for spec, implementation in combinations():
        if kernels_only and implementation.name == "reference":
            continue
        device = device_of(implementation)
        marks = [pytest.mark.gpu] if device == "cuda" else []
        taken = 0
        for case in cases_of(spec, implementation):
            if not case.grads or "large" in case.id or not takes(spec, implementation, case, SEED):
                continue
            if "real" not in case.id and _is_degenerate(case):
                continue
            name = f"{spec.name}-{implementation.name}-{case.id}"
            is_quick = quick is None or (taken < quick and implementation.name == "cpu")
            slow = [] if is_quick else [pytest.mark.slow]
            rows.append(pytest.param(spec, implementation, case, id=name, marks=[*marks, *slow]))
            taken += 1
            if taken == count:
                break
    return rows


def _is_degenerate(case: registry.Case) -> bool:
    return any(tensor.numel() == 0 for tensor in flat(list(case.make("cpu", torch.float32, SEED).values())))


def _make(spec: registry.OpSpec, implementation: registry.Impl, case: registry.Case) -> dict[str, Any]:
    return case.make(device_of(implementation), dtype_of(spec, implementation), SEED)


@pytest.mark.parametrize(("spec", "implementation", "case"), _rows(4, kernels_only=True, quick=1))
def test_opcheck(spec, implementation, case) -> None:
    args = arguments(spec.name, _make(spec, implementation, case))
    with torch.no_grad():
        calls = spec.module(implementation.name).raw_calls(args)
    assert calls
    for operator, operands in calls:
        result = torch.library.opcheck(
            operator, operands, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        )
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("spec", "implementation", "case"), _rows(1, kernels_only=True))
def test_raw_operators_refuse_gradients(spec, implementation, case) -> None:
    args = arguments(spec.name, _make(spec, implementation, case))
    with torch.no_grad():
        calls = spec.module(implementation.name).raw_calls(args)
    for operator, operands in calls:
        wanting = [
            [None if t is None else t.detach().clone().requires_grad_(t.is_floating_point()) for t in operand]
            if isinstance(operand, list) and operand
            else operand.detach().clone().requires_grad_()
            if isinstance(operand, torch.Tensor) and operand.is_floating_point()
            else operand
            for operand in operands
        ]
        with pytest.raises(RuntimeError, match="is the raw kernel and has no gradient of its own"):
            operator(*wanting)


@pytest.mark.parametrize(("spec", "implementation", "case"), _rows(2, quick=1))
@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, id="static", marks=pytest.mark.slow), pytest.param(True, id="dynamic")]
)
def test_compile_fullgraph(spec, implementation, case, dynamic) -> None:
    """Forward and backward through one graph give what an eager call gives."""
    torch._dynamo.reset()
    kwargs = _make(spec, implementation, case)
    eager, eager_grads, given = gradients(spec.name, kwargs, case.grads, implementation.name)
    function = public(spec.name)
    compiled = torch.compile(
        lambda **kwargs: function(**kwargs, impl=implementation.name),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    leaves = []
    for name in case.grads:
        leaves += [tensor.requires_grad_() for tensor in flat(kwargs[name])]
    outputs = flat(compiled(**kwargs))
    found = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    rtol, atol = CLOSE[dtype_of(spec, implementation)]
    for one, two in zip(outputs, eager):
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol)
    for one, (name, two) in zip(found, eager_grads):
        one = torch.zeros_like(two) if one is None else one
        torch.testing.assert_close(
            one, two, rtol=10 * rtol, atol=10 * atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "implementation", "case"), _rows(1))
def test_compile_inductor(spec, implementation, case) -> None:
    """The code torch.compile generates around an operator, by default, obeys the parity rule too."""
    if spec.name == "lstm" and implementation.name == "reference":
        kwargs = next(c for c in spec.cases() if c.id == "one").make("cpu", torch.float32, SEED)
    else:
        kwargs = _make(spec, implementation, case)
    torch._dynamo.reset()
    function = public(spec.name)
    with torch.no_grad():
        compiled = torch.compile(lambda **kwargs: function(**kwargs, impl=implementation.name), fullgraph=True)
        got = flat(compiled(**kwargs))
        reference = run(spec.name, kwargs, "reference")
        oracle = run(spec.name, wide(kwargs), "reference")
    dtype = dtype_of(spec, implementation)
    for i, tensors in enumerate(zip(got, reference, oracle)):
        check(f"output {i}", *tensors, dtype, spec.ceiling[dtype], FORWARD)


class _Call(nn.Module):
    """One op as a module: its floating tensors become inputs."""

    def __init__(self, op: str, impl: str, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.impl, self.kwargs = op, impl, kwargs

    def forward(self, tensors: dict[str, Any]) -> Any:
        return public(self.op)(**{**self.kwargs, **tensors}, impl=self.impl)


@pytest.mark.parametrize(("spec", "implementation", "case"), _rows(1))
def test_export(spec, implementation, case) -> None:
    kwargs = _make(spec, implementation, case)
    tensors = {name: kwargs.pop(name) for name in list(kwargs) if flat(kwargs[name])}
    module = _Call(spec.name, implementation.name, kwargs)
    with torch.no_grad():
        program = torch.export.export(module, (tensors,))
        got = flat(program.module()(tensors))
        expected = flat(module(tensors))
    rtol, atol = CLOSE[dtype_of(spec, implementation)]
    for one, two in zip(got, expected):
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol)
    if implementation.name != "reference":
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert any(name.startswith(f"ctxfast.{spec.name}_{implementation.name}") for name in names), names


@pytest.mark.parametrize("spec", list(registry.OPS.values()), ids=lambda spec: spec.name)
def test_autocast_column(spec) -> None:
    """Under autocast an op computes in the dtype its column of the table says."""
    case = next(case for case in spec.cases() if case.grads and "no-" not in case.id and "empty" not in case.id)
    kwargs = case.make("cpu", torch.float32, SEED)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = run(spec.name, kwargs, "reference")[0]
    if spec.autocast == "lower":
        kwargs = converted(kwargs, torch.Tensor.bfloat16)
    with torch.no_grad():
        if callable(spec.autocast):
            expected = flat(spec.reference(**spec.autocast(spec.arguments(**kwargs), torch.bfloat16)))[0]
        else:
            expected = run(spec.name, kwargs, "reference")[0]
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["bert-base", "mixed"])
def test_autocast_of_layer_norm_is_float32_of_inputs_as_they_are(name) -> None:
    spec = registry.OPS["add_layer_norm"]
    case = next(case for case in spec.cases() if case.id == name)
    kwargs = case.make("cpu", torch.bfloat16, SEED)
    out_dtype = kwargs.pop("out_dtype", None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = run("add_layer_norm", kwargs, "reference")[0]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, run("add_layer_norm", kwargs, "cpu")[0])
        assert run("add_layer_norm", converted(kwargs, torch.Tensor.double), "reference")[0].dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(run("add_layer_norm", converted(kwargs, torch.Tensor.float), "reference")[0], found)
        if out_dtype is None:
            assert run("add_layer_norm", kwargs, "reference")[0].dtype == torch.bfloat16


def test_gradient_factor_is_wider() -> None:
    assert GRADIENT > FORWARD >= 1
