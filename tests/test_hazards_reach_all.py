# SPDX-License-Identifier: Apache-2.0
"""Families of tests that walk the op table reach every implementation: in the dtype they use, on its device, it takes
at least one of the family's cases. A kernel for 16 bits in a family of float32 would be left out in silence.

Without a GPU an implementation for one is asked with tensors that have a shape, a dtype and that device, and no memory.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import test_derivatives
import test_layouts
import test_parity
import test_registration
import torch
from support.parity import arguments, combinations, convert, device_of, dtype_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ctxfast._core import capability, registry
from ctxfast.ops.lstm import cuda

H100 = (132, 9, 0, 227 * 1024, True, 66)
FAMILIES = {
    "layouts, streams, capture, bands, repeatability": test_layouts._parameters(),
    "opcheck": test_registration._rows(4, kernels_only=True, quick=2),
    "torch.compile": test_registration._rows(2, quick=1),
    "torch.export": test_registration._rows(1),
    "derivatives": test_derivatives._rows(2),
    "parity": test_parity.ROWS,
    "gradients": test_parity._GRADIENT_ROWS,
}
ALL = [pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name}") for pair in combinations()]


@pytest.fixture
def _an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        return
    if not hasattr(capability.extension(), "lstm_persistent_forward_plan"):
        pytest.skip("not on this device: the extension was built without CUDA, which knows what fits a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: H100[1:3])
    monkeypatch.setattr(capability, "compute_capability", lambda index: H100[1:3])
    monkeypatch.setattr(capability, "why_no_cuda", lambda arch=None: None)
    monkeypatch.setattr(cuda, "_facts", lambda ordinal: H100)


def _rows(family: str, spec: registry.OpSpec, implementation: registry.Impl) -> list[tuple[registry.Case, torch.dtype]]:
    """A family's cases for an implementation, each with the dtype it is tried in."""
    found = []
    for row in FAMILIES[family]:
        if row.values[:2] == (spec, implementation):
            has_dtype = isinstance(row.values[2], torch.dtype)
            dtype = row.values[2] if has_dtype else dtype_of(spec, implementation)
            found.append((row.values[-1], dtype))
    return found


def _objection(
    spec: registry.OpSpec, implementation: registry.Impl, case: registry.Case, dtype: torch.dtype
) -> str | None:
    if dtype not in case.dtypes:
        return f"the case is not for {dtype}."
    device = device_of(implementation)
    if device == "cpu" or torch.cuda.is_available():
        return spec.supports(implementation, arguments(spec.name, case.make(device, dtype, 1)))
    with FakeTensorMode():
        kwargs = case.make("cpu", dtype, 1)

        def there(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        kwargs = {name: convert(value, there, lambda tensor: True) for name, value in kwargs.items()}
        return spec.supports(implementation, arguments(spec.name, kwargs))


def _is_exempt(family: str, spec: registry.OpSpec, implementation: registry.Impl) -> bool:
    """References are what others are held to; an op without gradients has none to check."""
    if implementation.name == "reference":
        return family in ("opcheck", "derivatives")
    return family in ("derivatives", "gradients", "opcheck") and not any(case.grads for case in spec.cases())


@pytest.mark.parametrize(("spec", "implementation"), ALL)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_reaches_it(family: str, spec, implementation, _an_h100) -> None:
    if _is_exempt(family, spec, implementation):
        return
    rows = _rows(family, spec, implementation)
    assert rows, f"no test of {family} is one of {spec.name} by {implementation.name}"
    objections = set()
    for case, dtype in rows:
        objection = _objection(spec, implementation, case, dtype)
        if objection is None:
            return
        objections.add(objection)
    raise AssertionError(f"it takes no case of {family}: {objections}")


@pytest.mark.parametrize(
    ("spec", "implementation"),
    [row for row in ALL if row.values[0].name == "lstm" and row.values[1].device == "cuda"],
)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "derivatives"])
def test_real_sizes_are_reached(family: str, spec, implementation, _an_h100) -> None:
    """ELMo's layer, which takes every multiprocessor and most registers, runs in every family."""
    rows = [(case, dtype) for case, dtype in _rows(family, spec, implementation) if case.id == "real-elmo"]
    assert rows, f"ELMo's layer is not among the cases of {family}"
    assert _objection(spec, implementation, *rows[-1]) is None


def test_what_reaches_nothing_is_noticed(monkeypatch, _an_h100) -> None:
    """As it was: the persistent kernels, asked in float32."""
    spec = registry.OPS["lstm"]
    (implementation,) = [each for each in spec.impls if each.name == "cuda"]
    for case, _ in _rows("opcheck", spec, implementation):
        said = _objection(spec, implementation, case, torch.float32)
        assert said is not None and ("torch.float32" in said or "is not for" in said)


def test_tests_that_choose_a_gpu_are_marked() -> None:
    """``make gpu`` runs what is marked: a file whose tests run on a GPU where there is one marks them all."""
    folder = Path(__file__).parent
    files = [path for path in folder.rglob("test_*.py") if re.search(r"^DEVICE = ", path.read_text(), re.MULTILINE)]
    assert len(files) >= 3
    for path in files:
        assert 'pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []' in path.read_text(), path
