# SPDX-License-Identifier: Apache-2.0
"""Standing hazards, over every implementation in the table: layouts, uninitialised memory, writes out of bounds,
changed inputs, repeatability, threads, streams, graph capture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.layouts import offset, sliced, strided, transposed
from support.parity import (
    FORWARD,
    arguments,
    cases_of,
    check,
    combinations,
    convert,
    converted,
    device_of,
    dtype_of,
    flat,
    gradients,
    run,
    takes,
    wide,
)
from torch import Tensor

from ctxfast._core import torch_ops

SEED = 5
SENTINEL = 777.0
# The cases a hazard is tried on: sizes that leave remainders, and the empty ones.
CASES_PER_OP, QUICK_CASES = 6, 3


def _parameters() -> list:
    rows = []
    for spec, implementation in combinations():
        device = device_of(implementation)
        marks = [pytest.mark.gpu] if device == "cuda" else []
        chosen = 0
        for case in cases_of(spec, implementation):
            if chosen == CASES_PER_OP or case.id.startswith("large") or not takes(spec, implementation, case, SEED):
                continue
            chosen += 1
            name = f"{spec.name}-{implementation.name}-{case.id}"
            slow = [pytest.mark.slow] if chosen > QUICK_CASES else []
            rows.append(pytest.param(spec, implementation, case, id=name, marks=[*marks, *slow]))
    return rows


every_row = pytest.mark.parametrize(("spec", "implementation", "case"), _parameters())


def _make(spec, implementation, case, seed: int = SEED) -> dict:
    return case.make(device_of(implementation), dtype_of(spec, implementation), seed)


def _compare(spec, implementation, case, kwargs: dict) -> None:
    with torch.no_grad():
        got = run(spec.name, kwargs, implementation.name)
        reference = run(spec.name, kwargs, "reference")
        oracle = run(spec.name, wide(kwargs), "reference")
    dtype = dtype_of(spec, implementation)
    for i, tensors in enumerate(zip(got, reference, oracle)):
        check(f"output {i}", *tensors, dtype, spec.ceiling[dtype], FORWARD)


@every_row
@pytest.mark.parametrize("change", [strided, sliced, offset, transposed])
def test_layouts(spec, implementation, case, change: Callable[[Tensor], Tensor]) -> None:
    kwargs = _make(spec, implementation, case)
    _compare(spec, implementation, case, converted(kwargs, change))


@every_row
@pytest.mark.parametrize("change", [strided, transposed])
def test_layouts_of_integers(spec, implementation, case, change: Callable[[Tensor], Tensor]) -> None:
    """Lengths, offsets, ids and masks."""
    kwargs = _make(spec, implementation, case)
    changed = {
        name: convert(value, change, lambda tensor: not tensor.is_floating_point()) for name, value in kwargs.items()
    }
    _compare(spec, implementation, case, changed)


@pytest.mark.slow
@every_row
@pytest.mark.parametrize("change", [sliced, transposed])
def test_operators_take_any_layout(spec, implementation, case, change: Callable[[Tensor], Tensor], monkeypatch) -> None:
    """Backwards, too: tensors that a launcher gets there come from anywhere, but for those its own forward saved."""
    if implementation.name == "reference":
        pytest.skip("not on this device: the definition has no operators of its own")
    own, plain = [], torch_ops.allocate
    monkeypatch.setattr(torch_ops, "allocate", lambda *how: own.append(plain(*how)) or own[-1])
    args = arguments(spec.name, _make(spec, implementation, case))
    for operator, given in spec.module(implementation.name).raw_calls(args):
        changed = tuple(convert(value, change, lambda each: all(each is not made for made in own)) for value in given)
        for one, two in zip(flat(operator(*given)), flat(operator(*changed))):
            dtype = dtype_of(spec, implementation)
            # Another layout may be summed in another order.
            ceiling = spec.ceiling[dtype]
            check("output", two, one, one.cpu().double(), dtype, ceiling, FORWARD, ceiling)


@every_row
def test_expanded_inputs(spec, implementation, case) -> None:
    """Every row of every input is one and the same row in memory (stride 0)."""

    def expanded(tensor: Tensor) -> Tensor:
        return tensor[:1].expand(tensor.shape) if tensor.dim() > 1 and tensor.shape[0] else tensor

    kwargs = _make(spec, implementation, case)
    _compare(spec, implementation, case, converted(kwargs, expanded))


@every_row
def test_inputs_are_left_alone(spec, implementation, case) -> None:
    """Results are plain tensors, too: nothing is noted on either that another call would find."""
    kwargs = _make(spec, implementation, case)
    before = [tensor.clone() for tensor in flat(list(kwargs.values()))]
    gradients(spec.name, kwargs, case.grads, implementation.name)
    with torch.no_grad():
        run(spec.name, kwargs, implementation.name)
    for old, new in zip(before, flat(list(kwargs.values()))):
        assert torch.equal(old, new)
    leaves = [tensor.requires_grad_() for name in case.grads for tensor in flat(kwargs[name])]
    for tensor in [*run(spec.name, kwargs, implementation.name), *leaves]:
        assert type(tensor) is Tensor and not tensor.__dict__


@every_row
def test_two_runs_are_bitwise_equal(spec, implementation, case) -> None:
    kwargs = _make(spec, implementation, case)
    first, first_grads, given = gradients(spec.name, kwargs, case.grads, implementation.name)
    again, again_grads, _ = gradients(spec.name, kwargs, case.grads, implementation.name, given)
    for one, two in zip(first, again):
        assert torch.equal(one, two)
    for (name, one), (_, two) in zip(first_grads, again_grads):
        assert torch.equal(one, two), name


@every_row
def test_every_element_is_written(spec, implementation, case, monkeypatch) -> None:
    """Outputs start as nan and lie between bands of sentinels: all must be written, and nothing beside them."""
    bands: list[tuple[Tensor, Tensor]] = []
    plain = torch_ops.allocate

    def fenced(size, like, dtype=None) -> Tensor:
        if torch._subclasses.fake_tensor.is_fake(like):
            return plain(size, like, dtype)
        dtype = like.dtype if dtype is None else dtype
        count = int(torch.Size(size).numel())
        pad = 64  # elements: keeps the alignment an allocator would give
        if not dtype.is_floating_point:
            return plain(size, like, dtype)
        memory = torch.full((count + 2 * pad,), SENTINEL, dtype=dtype, device=like.device)
        inside = memory[pad : pad + count]
        inside.fill_(float("nan"))
        bands.append((memory[:pad], memory[pad + count :]))
        return inside.view(tuple(size))

    monkeypatch.setattr(torch_ops, "allocate", fenced)
    kwargs = _make(spec, implementation, case)
    outputs, grads, _ = gradients(spec.name, kwargs, case.grads, implementation.name)
    with torch.no_grad():  # may be another kernel
        outputs = [*outputs, *run(spec.name, kwargs, implementation.name)]
    for tensor in [*outputs, *(grad for _, grad in grads)]:
        assert not torch.isnan(tensor).any()
    for low, high in bands:
        assert (low == SENTINEL).all() and (high == SENTINEL).all()
    # The products of linear_act are torch's own and allocate for themselves.
    if implementation.name != "reference" and spec.name != "linear_act":
        assert bands, "outputs must come from torch_ops.allocate"


@every_row
def test_thread_counts(spec, implementation, case) -> None:
    if device_of(implementation) != "cpu":
        pytest.skip("not on this device: threads are the CPU's")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            _compare(spec, implementation, case, _make(spec, implementation, case))
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@every_row
def test_side_stream(spec, implementation, case) -> None:
    """Work is queued on the caller's stream: inputs that are still being made there are waited for."""
    kwargs = case.make("cuda", dtype_of(spec, implementation), SEED)
    if spec.supports(implementation, arguments(spec.name, kwargs)) is not None:
        pytest.skip("not on this device: the implementation is for the CPU")
    with torch.no_grad():
        expected = run(spec.name, kwargs, implementation.name)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late = converted(kwargs, lambda tensor: tensor.clone())
            got = run(spec.name, late, implementation.name)
        stream.synchronize()
    for one, two in zip(expected, got):
        assert torch.equal(one, two)


@pytest.mark.gpu
@every_row
def test_graph_capture(spec, implementation, case) -> None:
    """A captured call, replayed on other inputs, gives what an eager call gives."""
    kwargs = case.make("cuda", dtype_of(spec, implementation), SEED)
    if implementation.device != "cuda" or spec.supports(implementation, arguments(spec.name, kwargs)) is not None:
        pytest.skip("not on this device: the implementation is not a CUDA one")
    with torch.no_grad():
        run(spec.name, kwargs, implementation.name)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(spec.name, kwargs, implementation.name)
        for tensor, new in zip(
            flat(list(kwargs.values())),
            flat(list(case.make("cuda", dtype_of(spec, implementation), SEED + 1).values())),
        ):
            tensor.copy_(new)
        graph.replay()
        expected = run(spec.name, kwargs, implementation.name)
    for one, two in zip(expected, captured):
        assert torch.equal(one, two)


def test_helpers_keep_values() -> None:
    tensor = torch.randn(3, 5)
    for change in (strided, offset, transposed):
        changed = change(tensor)
        assert torch.equal(changed, tensor)
        assert changed.stride() != tensor.stride() or changed.storage_offset()
    assert convert((tensor, [tensor]), torch.neg)[1][0].equal(-tensor)
