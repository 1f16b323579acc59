# SPDX-License-Identifier: Apache-2.0
"""The parity rule, once for all ops.

The oracle is the reference in float64, started from the very numbers the implementation gets. An implementation may
err at most ``FORWARD`` (gradients: ``GRADIENT``) times what the reference errs in the same dtype, plus ``FLOOR`` ulps
of the largest magnitude, so that a luckily exact reference fails nobody; and never more than the op's ceiling, so that
a bad reference excuses nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ctxfast import functional
from ctxfast._core import capability, registry

FORWARD = 2.0
GRADIENT = 3.0
FLOOR = 8.0


def public(op: str) -> Callable[..., Any]:
    """The function users call."""
    return getattr(functional, op)


def flat(value: Any) -> list[Tensor]:
    """Every floating tensor in nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in flat(item)]
    return []


def convert(
    value: Any, change: Callable[[Tensor], Tensor], is_meant: Callable[[Tensor], bool] = Tensor.is_floating_point
) -> Any:
    """``value`` with every tensor in it changed that is meant: every floating one."""
    if isinstance(value, Tensor):
        return change(value) if is_meant(value) else value
    if isinstance(value, (tuple, list)):
        return type(value)(convert(item, change, is_meant) for item in value)
    return value


def converted(kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: convert(value, change) for name, value in kwargs.items()}


def arguments(op: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What implementations are given for these keyword arguments of the public function."""
    return registry.OPS[op].arguments(**kwargs)


def wide(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64 on the CPU; other tensors move along."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().cpu().double() if value.is_floating_point() else value.cpu()
        if isinstance(value, (tuple, list)):
            return type(value)(move(item) for item in value)
        return value

    return {name: move(value) for name, value in kwargs.items()}


def run(op: str, kwargs: dict[str, Any], impl: str) -> list[Tensor]:
    return flat(public(op)(**kwargs, impl=impl))


def grad_outputs(outputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Random gradients of the outputs, stored with gaps: every second element of a wider tensor."""
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for output in outputs:
        shape = (*output.shape[:-1], 2 * output.shape[-1]) if output.dim() else (2,)
        drawn = torch.randn(shape, generator=generator).to(device=output.device, dtype=output.dtype)
        grads.append(drawn[..., ::2] if output.dim() else drawn[0])
    return grads


def gradients(
    op: str,
    kwargs: dict[str, Any],
    names: tuple[str, ...],
    impl: str,
    given: list[Tensor] | None = None,
    used: Callable[[list[Tensor]], list[Tensor]] = lambda outputs: outputs,
) -> tuple[list[Tensor], list[tuple[str, Tensor]], list[Tensor]]:
    """Outputs, (name, gradient) of every differentiable input found under ``names``, and the outputs' gradients."""
    kwargs = converted(kwargs, lambda tensor: tensor.detach().clone().requires_grad_(False))
    leaves: list[tuple[str, Tensor]] = []
    for name in names:
        for i, tensor in enumerate(flat(kwargs[name])):
            tensor.requires_grad_()
            leaves.append((f"{name}[{i}]", tensor))
    outputs = used(run(op, kwargs, impl))
    given = grad_outputs(outputs) if given is None else given
    # An output that no input reaches (no steps, no rows) carries no graph in plain PyTorch.
    reached = [(output, grad) for output, grad in zip(outputs, given) if output.requires_grad]
    assert reached, "no output carries a gradient"
    found = torch.autograd.grad(
        [output for output, _ in reached],
        [leaf for _, leaf in leaves],
        [grad.to(device=output.device, dtype=output.dtype) for output, grad in reached],
        allow_unused=True,
    )
    named = [(name, torch.zeros_like(leaf) if grad is None else grad) for (name, leaf), grad in zip(leaves, found)]
    return outputs, named, given


def check(
    what: str,
    got: Tensor,
    reference: Tensor,
    oracle: Tensor,
    dtype: torch.dtype,
    ceiling: float,
    factor: float,
    tolerance: float | None = None,
) -> None:
    """Raise AssertionError unless ``got`` obeys the rule of this module, or its case's own ``tolerance``."""
    assert got.shape == oracle.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    if oracle.numel() == 0:
        return
    got, reference = got.detach().cpu().double(), reference.detach().cpu().double()
    assert torch.isfinite(got).all(), f"{what}: {int((~torch.isfinite(got)).sum())} values are not finite"
    largest = float(oracle.abs().max())
    error = (got - oracle).abs()
    worst, rms = float(error.max()), float(error.square().mean().sqrt())
    allowed = factor * float((reference - oracle).abs().max()) + FLOOR * torch.finfo(dtype).eps * largest
    bound = min(allowed, factor / FORWARD * ceiling * max(largest, 1e-3))
    if tolerance is not None:
        bound = factor / FORWARD * tolerance * max(largest, 1e-3)
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert worst <= bound, (
        f"{what}: largest error {worst:.3e} (rms {rms:.3e}) at {where}: got {float(got[where]):.8g}, expected "
        f"{float(oracle[where]):.8g}; allowed {bound:.3e}, largest magnitude {largest:.3e}"
    )


def combinations() -> Iterator[tuple[registry.OpSpec, registry.Impl]]:
    """Every (op, implementation) of the table, references too."""
    for spec in registry.OPS.values():
        for implementation in spec.all_impls:
            yield spec, implementation


# Kernels that take 16 bits alone. All others are tried in float32, which shows the smallest faults.
HALF_ONLY = {("lstm", "cuda")}
# Kernels for some sizes only: how the ids of the cases that they must take begin.
MADE_FOR = {("lstm", "cuda"): ("on-chip", "real")}
# What a result in a dtype may differ by from the same arithmetic in another order: (rtol, atol).
CLOSE = {torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 2e-3)}


def dtype_of(spec: registry.OpSpec, implementation: registry.Impl) -> torch.dtype:
    """What hazards are tried in; ``tests/test_hazards_reach_all.py`` asks the implementation whether it takes it."""
    return torch.float16 if (spec.name, implementation.name) in HALF_ONLY else torch.float32


def cases_of(spec: registry.OpSpec, implementation: registry.Impl) -> tuple[registry.Case, ...]:
    """The op's cases; on a GPU sizes of real models too, ``ON_A_GPU`` beside them, the first of these before all."""
    own = getattr(spec.module("cases"), "ON_A_GPU", ()) if device_of(implementation) == "cuda" else ()
    return (*own[:1], *spec.cases(), *own[1:])


def takes(spec: registry.OpSpec, implementation: registry.Impl, case: registry.Case, seed: int) -> bool:
    """Whether a hazard's case is one for an implementation. On a GPU that is not here: whether it may be."""
    device, dtype = device_of(implementation), dtype_of(spec, implementation)
    if dtype not in case.dtypes:
        return False
    if device == "cuda" and not torch.cuda.is_available():
        return case.id.startswith(MADE_FOR.get((spec.name, implementation.name), ""))
    return spec.supports(implementation, arguments(spec.name, case.make(device, dtype, seed))) is None


def device_of(implementation: registry.Impl) -> str:
    """Where an implementation's tests run."""
    if implementation.name == "triton" and capability.is_triton_interpreted():
        return "cpu"
    return "cuda" if implementation.device == "cuda" else "cpu"
