# SPDX-License-Identifier: Apache-2.0
"""Who is compared, and what they must return: every implementation in the op table, then the peers of a case's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ctxfast import functional
from ctxfast._core import registry

from .cases import Case, module
from .provider import Call, Outputs, Provider, Unavailable, flat, leaves_of

# ctxfast itself


def _build_impl(impl: str) -> Callable[[Case, Mapping[str, Any]], Call]:
    def build(case: Case, args: Mapping[str, Any]) -> Call:
        function = getattr(functional, case.op)
        with torch.set_grad_enabled(case.backward):
            objection = _objection(case, args, impl)
        if objection is not None:
            raise Unavailable(objection)
        return Call(lambda: flat(function(**args, impl=impl)), leaves_of(case, args))

    return build


def _objection(case: Case, args: Mapping[str, Any], impl: str) -> str | None:
    for name, verdict, reason in functional.explain(case.op, **args).rows:
        if name == impl:
            return reason if verdict == "no" else None
    raise ValueError(f"benchmarks: {case.op} has no implementation {impl!r}.")


def chosen_impl(case: Case, args: Mapping[str, Any]) -> str:
    """Name of the implementation that a call without ``impl=`` runs."""
    with torch.set_grad_enabled(case.backward):
        return functional.explain(case.op, **args).used


def _build_compiled(case: Case, args: Mapping[str, Any]) -> Call:
    torch.compiler.reset()  # sizes seen in earlier cases would make this one compile for any size
    function = torch.compile(registry.OPS[case.op].reference)
    plain = registry.OPS[case.op].arguments(**args)
    return Call(lambda: flat(function(**plain)), leaves_of(case, args))


def _op_providers(op: str) -> list[Provider]:
    spec = registry.OPS[op]
    rows = [Provider(f"ctxfast {impl.name}", _build_impl(impl.name), impl.note, ours=True) for impl in spec.all_impls]
    # The reference computes in the case's dtype with plain PyTorch: it is ours by right and a peer by what it does.
    rows[-1] = replace(rows[-1], note="plain PyTorch, eager")
    return rows


# everybody


def providers(case: Case, *, compile: bool = False) -> list[Provider]:
    """Every provider of a case, ours first, in a fixed order.

    Args:
        compile: run the torch.compile peers too; without it their rows say how to get them.
    """
    file = module(case.op)
    if case.is_model:
        ours, compiled = file.OURS, file.COMPILED
    else:
        ours, compiled = _op_providers(case.op), (Provider("torch.compile of the reference", _build_compiled),)
    if not compile:
        compiled = [replace(provider, build=_not_compiled) for provider in compiled]
    fitting = [provider for provider in file.PEERS if _fits(case, provider)]
    return [*ours, *fitting, *compiled]


def _fits(case: Case, provider: Provider) -> bool:
    """A peer with a dtype of its own belongs to cases where ctxfast lowers precision too; one of a device to it."""
    if provider.device not in (None, case.device):
        return False
    return provider.dtype is None or case.weight_dtype is not None


def _not_compiled(case: Case, args: Mapping[str, Any]) -> Call:
    raise Unavailable("left out: compiling takes long (pass --compile)")


def oracle(case: Case, args: Mapping[str, Any]) -> tuple[Outputs, dict[str, Outputs], Outputs | None]:
    """What every provider must return: outputs, gradients by argument, and the gradients these start from.

    An op: its reference in float64 on the same inputs, without ``weight_dtype``: whoever rounds is held to the
    unrounded result. A model: ctxfast's model on references, in float32.
    """
    if case.is_model:
        return _model_outputs(case, args), {}, None
    wide = {name: _wide(value) for name, value in args.items()}
    wide.pop("weight_dtype", None)
    function = getattr(functional, case.op)
    if not case.backward:
        with torch.no_grad():
            return flat(function(**wide, impl="reference")), {}, None
    outputs = flat(function(**wide, impl="reference"))
    random = torch.Generator().manual_seed(1)
    starts = tuple(torch.randn(out.shape, generator=random, dtype=torch.float64).to(out) for out in outputs)
    leaves = leaves_of(case, wide)
    grads = iter(torch.autograd.grad(outputs, [leaf for tensors in leaves.values() for leaf in tensors], starts))
    by_name = {name: tuple(next(grads) for _ in tensors) for name, tensors in leaves.items()}
    return tuple(out.detach() for out in outputs), by_name, tuple(start.to(case.dtype) for start in starts)


_latest: dict[str, Outputs] = {}


def _model_outputs(case: Case, args: Mapping[str, Any]) -> Outputs:
    """The result of the latest workload is kept: its cases differ in dtype only."""
    plain = replace(case, dtype_name="float32")
    if plain.id not in _latest:
        with torch.no_grad():
            found = module(case.op).oracle(plain, {name: args[name] for name in args if name != "weight_dtype"})
        _latest.clear()
        _latest[plain.id] = tuple(output.float() for output in found)
    return _latest[plain.id]


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return tuple(_wide(item) for item in value)
    return value
