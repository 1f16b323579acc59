# SPDX-License-Identifier: Apache-2.0
"""torch.export of modules: kernels for inference, operations of torch's own where gradients are wanted."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.tool_modules import MODULES, made, mask_of, normal
from torch import Tensor

import ctxfast


def _close(one: Tensor, two: Tensor, bound: float = 1e-5) -> None:
    torch.testing.assert_close(one, two, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_export_with_gradients_can_be_trained(name, strict) -> None:
    """It records torch's own operations, and says so where ctxfast has a kernel."""
    model, given, _ = made(name)
    leaves = {path: each.requires_grad_() for path, each in model.named_parameters() if each.is_floating_point()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        program = torch.export.export(model, given, strict=strict)
    assert not any("ctxfast" in str(node.target) for node in program.graph.nodes)
    if name not in ("swapped LSTM", "ScalarMix"):  # these have no kernel in any export on a CPU
        assert any("under torch.no_grad() to record ctxfast's kernels" in str(each.message) for each in said)
    exported = program.module()
    expected, found = model(*given), exported(*given)
    _close(found, expected)
    weight = normal(*expected.shape)
    wanted = torch.autograd.grad((expected * weight).sum(), list(leaves.values()), allow_unused=True)
    (found * weight).sum().backward()
    for path, gradient in zip(leaves, wanted):
        other = dict(exported.named_parameters())[path]
        assert (other.grad is None) == (gradient is None), path
        if gradient is not None:
            _close(other.grad, gradient, 1e-4)


def test_an_implementation_asked_for_by_name_refuses_an_export_with_gradients() -> None:
    layer = ctxfast.nn.LSTM(3, 4, batch_first=True, cell_clip=1.0, impl="cpu")
    with pytest.raises(RuntimeError, match=r"impl='cpu' was asked for .*Export under torch.no_grad\(\) for inference"):
        torch.export.export(layer, (normal(2, 5, 3),), strict=False)
    with torch.no_grad():
        program = torch.export.export(layer, (normal(2, 5, 3),), strict=False)
    assert any("ctxfast.lstm_cpu_fwd" in str(node.target) for node in program.graph.nodes)
    with pytest.raises(RuntimeError, match="exported under torch.no_grad.* is called under it"):
        program.module()(normal(2, 5, 3))


def test_bert_exports_with_a_mask() -> None:
    """One exported graph, packing and kernels in it, for every mask and size."""
    model, given, other = made("Bert")
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(model, given, dynamic_shapes=((sizes, sizes),))
        assert any("ctxfast" in str(node.target) for node in program.graph.nodes)
        for call in (given, other, (given[0], mask_of(1, 7)), (given[0], torch.ones(2, 7, dtype=torch.long))):
            _close(program.module()(*call), model(*call))
