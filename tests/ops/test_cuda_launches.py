# SPDX-License-Identifier: Apache-2.0
"""What CUDA launchers pass, against what their kernels take it for: on a stand-in for the extension, no GPU needed.

A kernel gets addresses. All it knows of the tensors behind them are the strides that are passed beside them; the rest
(order of dimensions, no gaps, dtype) is its header's word, which the launcher has to keep for every layout that callers
may bring. Here launchers run on tensors of many layouts, and what a kernel would read at each address is compared with
the tensor that the address was asked of.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import pytest
import torch
from support import emulated, layouts
from support.parity import arguments
from torch import Tensor

from ctxfast import forget_packed
from ctxfast._core import capability, registry, torch_ops
from ctxfast.ops.lstm import cuda_step

FLOAT, BYTES = torch.float32, torch.uint8
# Argument -> shape by the launcher's other arguments, in the order in which the kernel walks it, and dtype where it is
# not the call's: csrc/<op>/*.h once more. "4 hidden" is one dimension; None: any, in one piece.
LSTM = {
    "weight_hh": ("4 hidden, size",),
    "weight_proj": ("size, hidden",),
    "lengths": ("batch", torch.int64),
    "h_0": ("directions, batch, size",),
    "c_0": ("directions, batch, hidden", FLOAT),
    "output": ("batch, steps, directions size",),
    "h_n": ("directions, batch, size",),
    "c_n": ("directions, batch, hidden", FLOAT),
    "cells": ("directions, batch, steps, hidden", FLOAT),
    "grad_output": ("batch, steps, directions size",),
    "grad_h_n": ("directions, batch, size", FLOAT),
    "grad_c_n": ("directions, batch, hidden", FLOAT),
    "grad_hidden": ("directions, batch, steps, size",),
    "grad_h_0": ("directions, batch, size", FLOAT),
    "grad_c_0": ("directions, batch, hidden", FLOAT),
    "workspace": (None, BYTES),
    "packed": (None, BYTES),
}
# (batch, steps, hidden, 4) as tensors.
GATES = dict.fromkeys(("gates", "z", "grad_gates"), ("batch, steps, 4, hidden",))
CONTRACTS: dict[str, dict[str, tuple]] = {
    "lstm_persistent_forward": LSTM | GATES,
    "lstm_persistent_backward": LSTM | GATES,
    "lstm_step_pack": LSTM,
    "lstm_step_forward": LSTM | GATES,
    "lstm_step_backward": LSTM | GATES,
    "char_cnn_cuda_forward": {
        "ids": ("words, characters", torch.int64),
        "table": ("vocabulary, size",),
        "weight": ("filters, size, width",),
        "bias": ("filters",),
        "y": ("words, columns",),
        "at": ("words, columns", torch.int32),
    },
    "scalar_mix_forward": {
        "inputs": ("numel",),
        "weights": ("num_inputs", FLOAT),
        "output": ("numel",),
    },
}
CONTRACTS["char_cnn_cuda_backward"] = CONTRACTS["char_cnn_cuda_forward"] | {
    "grad": ("words, columns", FLOAT),
    "grad_words": ("words, characters, size", FLOAT),
    "grad_weight": ("filters, size, width", FLOAT),
    "grad_bias": ("filters", FLOAT),
}
CONTRACTS["scalar_mix_backward"] = CONTRACTS["scalar_mix_forward"] | {
    "grad_output": ("numel",),
    "grad_inputs": ("numel",),
    "grad_weights": ("num_inputs", FLOAT),
    "workspace": (None, BYTES),
}
CASES_PER_OP = 6


class Address(int):
    """What ``Tensor.data_ptr`` returns meanwhile: it remembers whose."""

    tensor: Tensor


class StandIn:
    """In place of the extension: plans any call, and notes the launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.endswith("_plan"):
            return lambda *args, **named: dict(refusal="", workspace_bytes=64)
        if name.endswith("_bytes"):
            return lambda *args, **named: 64
        if name == "lstm_persistent_device":
            return lambda ordinal: (132, 9, 0, 227 * 1024, True, 66)
        assert name in CONTRACTS, f"no contract says what {name} takes"
        return lambda **named: self.launches.append((name, named))


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    plain, standing = Tensor.data_ptr, StandIn()

    def data_ptr(tensor: Tensor) -> Address:
        found = Address(plain(tensor))
        found.tensor = tensor
        return found

    def drawn(size: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randint(0, 100, tuple(size)).to(like.dtype if dtype is None else dtype)

    monkeypatch.setattr(Tensor, "data_ptr", data_ptr)
    monkeypatch.setattr(torch_ops, "allocate", drawn)  # of outputs, too, each element has its place
    monkeypatch.setattr(capability, "extension", lambda: standing)
    return standing


def _size(words: str, named: dict[str, Any]) -> int:
    return prod([int(word) if word.isdigit() else named[word] for word in words.split()])


def _passed(named: dict[str, Any]) -> Iterator[tuple[str, Address, tuple[int, ...], dict[str, Any]]]:
    """Name, address, strides of the first dimensions, and sizes of every tensor of a launch."""
    for name, value in named.items():
        if name == "filters":
            for width, count, *addresses in value:
                for part, address in zip(("weight", "bias", "grad_weight", "grad_bias"), addresses):
                    yield part, address, (), named | dict(width=width, filters=count)
            continue
        addresses = value if isinstance(value, (list, tuple)) else [value]
        if not any(isinstance(each, Address) for each in addresses):
            continue
        strides: Any = named.get(f"{name}_strides", named.get(f"{name}_stride", ()))
        for i, address in enumerate(addresses):
            own = strides[i] if isinstance(value, (list, tuple)) and strides else strides
            yield name, address, (own,) if isinstance(own, int) else tuple(own), named


def _check(launcher: str, named: dict[str, Any], dtype: torch.dtype) -> None:
    for name, address, strides, sizes in _passed(named):
        if not isinstance(address, Address):
            assert address == 0, f"{launcher}: {name} is {address}, which is no tensor's address"
            continue
        assert name in CONTRACTS[launcher], f"{launcher}: no contract says what {name} is"
        shape, *kind = CONTRACTS[launcher][name]
        tensor, wanted = address.tensor, kind[0] if kind else dtype
        if name == "ids" and not sizes["is_int64"]:
            wanted = torch.int32
        assert tensor.dtype == wanted, f"{launcher}: {name} is {tensor.dtype}"
        if name in GATES:
            tensor = tensor.transpose(2, 3)
        extent = (tensor.numel(),) if shape is None else tuple(_size(each, sizes) for each in shape.split(", "))
        dense = list(itertools.accumulate([1, *extent[:0:-1]], lambda a, b: a * b))[::-1]
        read = torch.as_strided(tensor, extent, (*strides, *dense[len(strides) :]), tensor.storage_offset())
        assert torch.equal(read, tensor.reshape(extent)), (
            f"{launcher}: {name} has strides {tensor.stride()} and the kernel walks {extent} by {read.stride()}"
        )


def _every(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_every(each, change) for each in value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("change", [layouts.plain, *layouts.ALL])
@pytest.mark.parametrize(
    ("spec", "implementation"),
    [
        pytest.param(spec, one, id=f"{spec.name}-{one.name}")
        for spec in registry.OPS.values()
        for one in spec.impls
        if one.device == "cuda" and one.name != "triton"
    ],
)
def test_kernels_read_what_they_are_given(
    spec, implementation, change: Callable[[Tensor], Tensor], extension: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = spec.module(implementation.name)
    cases = [case for case in spec.cases() if not case.id.startswith("large") and torch.float16 in case.dtypes]
    seen = set()
    with emulated.operators(monkeypatch, module), torch.no_grad():
        for case in cases[-CASES_PER_OP:]:
            args = arguments(spec.name, case.make("cpu", torch.float16, 5))
            calls = module.raw_calls(args)
            extension.launches.clear()
            for operator, given in calls:
                operator(*_every(given, change))
            for launcher, named in extension.launches:
                _check(launcher, named, torch.float16)
                seen.add(launcher)
    assert {launcher.rpartition("_")[2] for launcher in seen} >= {"forward", "backward"}


def _packings(extension: StandIn, call: Callable[[], Any]) -> list[tuple[bool, int]]:
    """Whether the weights were known, and where they were packed, in one call."""
    extension.launches.clear()
    call()
    return [(named["is_known"], named["packed"]) for name, named in extension.launches if name == "lstm_step_pack"]


def test_weights_are_packed_once(extension: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda_step: what the host cannot see of a change, the kernel that gets ``is_known`` looks for."""
    case = next(case for case in registry.OPS["lstm"].cases() if case.id == "elmo-like")
    kwargs = case.make("cpu", torch.float16, 5)
    args = arguments("lstm", kwargs)
    weight = args["weight_hh"][0]

    def call() -> None:
        cuda_step.lstm(**args)

    with emulated.operators(monkeypatch, cuda_step), torch.no_grad():
        ((is_known, place),) = _packings(extension, call)
        assert not is_known
        assert _packings(extension, call) == [(True, place)]
        weight.data.mul_(2)
        assert _packings(extension, call) == [(True, place)]
        weight.mul_(2)
        assert not _packings(extension, call)[0][0]
        assert _packings(extension, call)[0][0]
        for stream in range(1, 9):  # each has its own, and few are kept
            with monkeypatch.context() as patch:
                patch.setattr(torch_ops, "launching", lambda tensor, stream=stream: contextlib.nullcontext(stream))
                assert not _packings(extension, call)[0][0]
                assert _packings(extension, call)[0][0]
        assert not _packings(extension, call)[0][0]
        with monkeypatch.context() as patch:
            patch.setattr(cuda_step, "_is_captured", lambda tensor: True)
            assert not _packings(extension, call)[0][0]
        forget_packed(weight)
        assert not _packings(extension, call)[0][0]


def test_a_gradient_packs_the_transposes_once(extension: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in registry.OPS["lstm"].cases() if case.id == "elmo-like")
    args = arguments("lstm", case.make("cpu", torch.float16, 5))
    args["weight_proj"][0].requires_grad_()

    def call() -> None:
        cuda_step.lstm(**args)[0].sum().backward()

    with emulated.operators(monkeypatch, cuda_step):
        forward, backward = _packings(extension, call)
        assert not forward[0] and not backward[0] and forward[1] != backward[1]
        assert _packings(extension, call) == [(True, forward[1]), (True, backward[1])]
        with torch.no_grad():
            args["weight_proj"][0].add_(1)  # an optimiser's step
        assert [is_known for is_known, _ in _packings(extension, call)] == [False, False]


def test_the_check_sees_a_tensor_that_is_taken_for_another(extension: StandIn) -> None:
    state = torch.randn(2, 3, 16, dtype=torch.float16)
    named = dict(directions=2, batch=3, size=8)
    _check("lstm_persistent_forward", named | dict(h_0=state[..., :8].contiguous().data_ptr()), torch.float16)
    with pytest.raises(AssertionError, match=r"h_0 has strides \(48, 16, 1\)"):
        _check("lstm_persistent_forward", named | dict(h_0=state[..., :8].data_ptr()), torch.float16)
    with pytest.raises(RuntimeError, match="out of bounds"):
        expanded = torch.randn(8).half().expand(2, 3, 8)
        _check("lstm_persistent_forward", named | dict(h_0=expanded.data_ptr()), torch.float16)
