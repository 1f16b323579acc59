# SPDX-License-Identifier: Apache-2.0
"""Bad input to every op: the exact message, and nothing has run before it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from support.parity import arguments, combinations, convert, device_of, public

from ctxfast._core import calls, registry

ARGUMENTS = {op: importlib.import_module(f"support.arguments.{op}") for op in sorted(registry.OPS)}
BAD = [pytest.param(op, *row, id=f"{op}-{i}") for op, own in ARGUMENTS.items() for i, row in enumerate(own.BAD)]


@pytest.mark.parametrize(("op", "change", "kind", "message"), BAD)
def test_bad_input(op, change, kind, message, monkeypatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an implementation ran before the check")

    monkeypatch.setattr(calls, "resolve", never)
    with pytest.raises(kind) as error:
        public(op)(**{**ARGUMENTS[op].GOOD, **change})
    assert str(error.value) == f"ctxfast.{op}: {message}"
    assert type(error.value) is kind


@pytest.mark.parametrize("op", ARGUMENTS)
def test_the_good_arguments_are_good(op) -> None:
    """What a bad row changes is what it fails for, and every op has such rows."""
    own = ARGUMENTS[op]
    public(op)(**own.GOOD)
    registry.OPS[op].check_all(arguments(op, own.GOOD))
    assert len(own.BAD) >= 3


@pytest.mark.parametrize(
    ("op", "impl"),
    [(spec.name, impl.name) for spec, impl in combinations() if impl.name != "reference" and device_of(impl) == "cpu"],
)
def test_kernels_refuse_float64_by_name(op, impl) -> None:
    """The definition takes it; whoever asks for a kernel is told, and nobody gets a rounded result unasked."""
    good = ARGUMENTS[op].GOOD
    given = dict(zip(good, convert(tuple(good.values()), torch.Tensor.double)))
    with pytest.raises(RuntimeError, match=rf"ctxfast\.{op}: impl='{impl}' .* is torch\.float64\."):
        public(op)(**given, impl=impl)
    found = public(op)(**given)
    first = found[0] if isinstance(found, tuple) else found
    assert first.dtype == torch.float64


def test_a_missing_extension_is_said(monkeypatch) -> None:
    from ctxfast._core import capability

    monkeypatch.setattr(capability, "_C", None)
    monkeypatch.setattr(capability, "_IMPORT_ERROR", "No module named 'ctxfast._C'")
    with pytest.raises(RuntimeError, match=r"the compiled extension ctxfast\._C is not there .* pip install \."):
        public("lstm")(**ARGUMENTS["lstm"].GOOD, impl="cpu")
    output, _ = public("lstm")(**ARGUMENTS["lstm"].GOOD)  # the choice says so in explain, and takes the reference
    assert output.shape == (2, 3, 12)
