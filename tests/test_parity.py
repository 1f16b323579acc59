# SPDX-License-Identifier: Apache-2.0
"""Every (op, implementation, dtype, case) of the table against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from support.parity import (
    FORWARD,
    GRADIENT,
    MADE_FOR,
    arguments,
    cases_of,
    check,
    combinations,
    converted,
    device_of,
    dtype_of,
    flat,
    gradients,
    run,
    wide,
)

from ctxfast._core import registry

SEED = 11


def _accepted(spec: registry.OpSpec, implementation: registry.Impl, dtype: torch.dtype, case: registry.Case) -> bool:
    """Whether the implementation takes this case; one for a GPU that is not here is taken at its word in the test."""
    if device_of(implementation) == "cuda" and not torch.cuda.is_available():
        return True
    kwargs = case.make(device_of(implementation), dtype, SEED)
    return spec.supports(implementation, arguments(spec.name, kwargs)) is None


def _parameters() -> list:
    rows = []
    for spec, implementation in combinations():
        marks = [pytest.mark.gpu] if device_of(implementation) == "cuda" else []
        for number, case in enumerate(cases_of(spec, implementation)):
            # Triton's interpreter takes most of the time of all rows together.
            slow = [pytest.mark.slow] if implementation.name == "triton" and number % 3 else []
            for dtype in case.dtypes:
                if _accepted(spec, implementation, dtype, case):
                    name = f"{spec.name}-{implementation.name}-{str(dtype).removeprefix('torch.')}-{case.id}"
                    rows.append(pytest.param(spec, implementation, dtype, case, id=name, marks=[*marks, *slow]))
    return rows


ROWS = _parameters()


def _skip_refused(spec: registry.OpSpec, implementation: registry.Impl, kwargs: dict) -> None:
    objection = spec.supports(implementation, arguments(spec.name, kwargs))
    if objection is not None:
        pytest.skip(f"not on this device: {objection}")


@pytest.mark.parametrize(("spec", "implementation", "dtype", "case"), ROWS)
def test_forward(spec, implementation, dtype, case) -> None:
    kwargs = case.make(device_of(implementation), dtype, SEED)
    _skip_refused(spec, implementation, kwargs)
    with torch.no_grad():
        got = run(spec.name, kwargs, implementation.name)
        reference = run(spec.name, kwargs, "reference")
        oracle = run(spec.name, wide(kwargs), "reference")
    assert len(got) == len(oracle) > 0
    for i, tensors in enumerate(zip(got, reference, oracle)):
        # A loss comes out of half-precision logits as float32: its error is still that of the inputs' dtype.
        assert tensors[0].dtype == tensors[1].dtype
        check(f"output {i}", *tensors, dtype, spec.ceiling[dtype], FORWARD, case.tolerance)


_GRADIENT_ROWS = [row for row in ROWS if row.values[3].grads and row.values[2] in row.values[3].grad_dtypes]


@pytest.mark.parametrize(("spec", "implementation", "dtype", "case"), _GRADIENT_ROWS)
def test_backward(spec, implementation, dtype, case) -> None:
    kwargs = case.make(device_of(implementation), dtype, SEED)
    _skip_refused(spec, implementation, kwargs)
    _, got, given = gradients(spec.name, kwargs, case.grads, implementation.name)
    _, reference, _ = gradients(spec.name, kwargs, case.grads, "reference", given)
    _, oracle, _ = gradients(spec.name, wide(kwargs), case.grads, "reference", given)
    assert [name for name, _ in got] == [name for name, _ in oracle] != []
    for (name, mine), (_, plain), (_, right) in zip(got, reference, oracle):
        check(f"gradient of {name}", mine, plain, right, dtype, spec.ceiling[dtype], GRADIENT, case.tolerance)


@pytest.mark.parametrize(
    ("spec", "implementation", "dtype", "case"),
    [
        row
        for row in ROWS
        if row.values[2] is torch.float32 and row.values[0].name == "lstm" and "ragged" in row.values[3].id
    ],
)
@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2]], ids=["output", "h_n", "c_n", "output-and-c_n"])
def test_backward_with_outputs_unused(spec, implementation, dtype, case, used) -> None:
    """Only some outputs enter the loss: the others' gradients are absent, not garbage."""
    kwargs = case.make(device_of(implementation), dtype, SEED)
    _skip_refused(spec, implementation, kwargs)

    def pick(outputs: list) -> list:
        return [outputs[i] for i in used]

    _, got, given = gradients(spec.name, kwargs, case.grads, implementation.name, used=pick)
    _, reference, _ = gradients(spec.name, kwargs, case.grads, "reference", given, used=pick)
    _, oracle, _ = gradients(spec.name, wide(kwargs), case.grads, "reference", given, used=pick)
    for (name, mine), (_, plain), (_, right) in zip(got, reference, oracle):
        check(f"gradient of {name}", mine, plain, right, dtype, spec.ceiling[dtype], GRADIENT, case.tolerance)


@pytest.mark.parametrize(
    ("spec", "implementation"),
    [
        pytest.param(
            *pair,
            id=f"{pair[0].name}-{pair[1].name}",
            marks=[pytest.mark.gpu] if device_of(pair[1]) == "cuda" else [],
        )
        for pair in combinations()
    ],
)
def test_accepts_most_of_its_cases(spec, implementation) -> None:
    """A kernel that refuses nearly everything would pass the tests above by taking none."""
    dtype, cases = dtype_of(spec, implementation), cases_of(spec, implementation)
    taken = {case.id for case in cases if _accepted(spec, implementation, dtype, case)}
    made_for = MADE_FOR.get((spec.name, implementation.name))
    if made_for is None:
        assert len(taken) >= 0.6 * len(cases)
    else:
        assert taken >= {case.id for case in cases if case.id.startswith(made_for)} != set()
    assert implementation.name != "reference" or len(taken) == len(cases)


@pytest.mark.parametrize("spec", list(registry.OPS.values()), ids=lambda spec: spec.name)
def test_cases_are_distinct_and_repeatable(spec) -> None:
    cases = spec.cases()
    assert len({case.id for case in cases}) == len(cases) >= 8
    for case in cases:
        first, again = case.make("cpu", torch.float32, 3), case.make("cpu", torch.float32, 3)
        for one, two in zip(flat(list(first.values())), flat(list(again.values()))):
            assert torch.equal(one, two)
        assert set(case.grads) <= set(first)


def test_clip_cases_clip() -> None:
    """At least one case clips over 5 % of cells and of outputs, or the clips would go untested."""
    spec = registry.OPS["lstm"]
    case = next(case for case in spec.cases() if case.id == "clips-hit")
    kwargs = case.make("cpu", torch.float32, SEED)
    output, (_, c_n) = spec.reference(**arguments("lstm", kwargs))
    assert (output.abs() == kwargs["proj_clip"]).float().mean() > 0.05
    assert (c_n.abs() == kwargs["cell_clip"]).float().mean() > 0.05


def test_the_rule_catches_a_wrong_result() -> None:
    """The check itself: an error a little above the bound fails, one below passes, nan fails."""
    oracle = torch.linspace(-1, 1, 11, dtype=torch.float64)
    reference = oracle.float()
    check("fine", reference, reference, oracle, torch.float32, 1e-5, FORWARD)
    wrong = reference.clone()
    wrong[3] += 2e-6
    with pytest.raises(AssertionError, match=r"off: largest error .* at \(3,\)"):
        check("off", wrong, reference, oracle, torch.float32, 1e-5, FORWARD)
    bad = reference.clone()
    bad[0] = float("nan")
    with pytest.raises(AssertionError, match="not finite"):
        check("nan", bad, reference, oracle, torch.float32, 1e-5, FORWARD)
    # A reference as bad as the kernel does not excuse it beyond the ceiling.
    far = reference + 1e-3
    with pytest.raises(AssertionError, match="largest error"):
        check("both bad", far, far, oracle, torch.float32, 1e-5, FORWARD)


def test_wide_starts_from_the_same_numbers() -> None:
    kwargs = {"x": torch.randn(3).half(), "y": [torch.randn(2)], "n": torch.tensor([1])}
    lifted = wide(kwargs)
    assert lifted["x"].dtype == torch.float64 and torch.equal(lifted["x"].half(), kwargs["x"])
    assert lifted["y"][0].dtype == torch.float64 and lifted["n"].dtype == torch.int64
    assert converted(kwargs, torch.Tensor.double)["x"].dtype == torch.float64
