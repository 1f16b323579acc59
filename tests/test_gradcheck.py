# SPDX-License-Identifier: Apache-2.0
"""Every reference's gradients against finite differences in float64: the parity suite's oracle is itself checked."""

from __future__ import annotations

import pytest
import torch
from support.parity import converted, flat, public, wide

from ctxfast._core import registry

# Finite differences cost two runs per input element.
LARGEST = 500


def _parameters() -> list:
    rows = []
    for spec in registry.OPS.values():
        for case in spec.cases():
            kwargs = wide(case.make("cpu", torch.float32, 2))
            size = sum(tensor.numel() for name in case.grads for tensor in flat(kwargs[name]))
            if 0 < size <= LARGEST:
                rows.append((size, pytest.param(spec, case, id=f"{spec.name}-{case.id}")))
    # The smallest four of every op.
    kept: dict[str, int] = {}
    chosen = []
    for _, row in sorted(rows, key=lambda item: item[0]):
        name = row.values[0].name
        kept[name] = kept.get(name, 0) + 1
        if kept[name] <= 4:
            chosen.append(row)
    assert set(kept) == set(registry.OPS), "an op without a case small enough"
    return chosen


@pytest.mark.parametrize(("spec", "case"), _parameters())
def test_gradcheck(spec, case) -> None:
    kwargs = converted(wide(case.make("cpu", torch.float32, 2)), torch.Tensor.detach)
    leaves = [tensor.requires_grad_() for name in case.grads for tensor in flat(kwargs[name])]

    def function(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = flat(public(spec.name)(**kwargs, impl="reference"))
        return tuple(output for output in outputs if output.requires_grad)

    # gradcheck moves the leaves in place, which the closure sees.
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-4, nondet_tol=0.0)


def test_clipped_values_pass_no_gradient() -> None:
    """Away from the bound: an lstm whose every cell is clipped has no gradient but through the output gate."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    w_ih = torch.full((4, 4), 0.0, dtype=torch.float64)
    w_hh = torch.zeros(4, 1, dtype=torch.float64)
    bias = torch.tensor([9.0, 9.0, 9.0, 9.0], dtype=torch.float64, requires_grad=True)
    _, (_, c_n) = public("lstm")(x, w_ih, w_hh, bias, cell_clip=0.5, impl="reference")
    assert (c_n == 0.5).all()
    (grad,) = torch.autograd.grad(c_n.sum(), bias)
    assert (grad == 0).all()
