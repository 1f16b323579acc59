# SPDX-License-Identifier: Apache-2.0
"""Who is compared: every implementation in ctxfast's op table, plain PyTorch, torch's own modules, other libraries.

A provider turns a case into a ``Call``, or raises ``Unavailable`` with the sentence that its row then shows: a peer
that is not installed or cannot run a case never vanishes from the table.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ctxfast import functional
from ctxfast._core import registry

from .cases import Case

Outputs = tuple[Tensor, ...]
Leaves = dict[str, tuple[Tensor, ...]]


class Unavailable(Exception):
    """A provider does not run a case; the text is one sentence for its row."""


class NotInstalled(Unavailable):
    """The library behind a provider is not there."""


@dataclass(frozen=True)
class Call:
    """One provider's way to run one case.

    Args:
        forward: runs the case and returns its outputs in the provider's own layout.
        leaves: argument name -> the tensors that its gradient is taken of (forward+backward cases).
        to_case: outputs in the provider's layout -> outputs as ctxfast's function returns them; not timed.
        to_own: gradients of the outputs as ctxfast has them -> in the provider's layout; not timed.
        leaf_to_case: (argument name, gradient) -> the gradient in the layout of that argument; not timed.
    """

    forward: Callable[[], Outputs]
    leaves: Leaves | None = None
    to_case: Callable[[Outputs], Outputs] = lambda outputs: outputs
    to_own: Callable[[Outputs], Outputs] = lambda grads: grads
    leaf_to_case: Callable[[str, Tensor], Tensor] = lambda name, grad: grad


@dataclass(frozen=True)
class Provider:
    """A row of the comparison: its name, what builds its call, and what a reader must know.

    ``ours``: an implementation of ctxfast. ``note`` stands beside the row. ``dtype`` is set where a peer computes in
    another dtype than the case; parity is then judged by that dtype's bound. ``device``: the only kind it exists for.
    """

    name: str
    build: Callable[[Case, Mapping[str, Any]], Call]
    note: str = ""
    ours: bool = False
    dtype: torch.dtype | None = None
    device: str | None = None


def require(module: str, distribution: str | None = None) -> None:
    """Raise ``NotInstalled`` unless ``module`` can be imported."""
    if importlib.util.find_spec(module) is None:
        raise NotInstalled(f"not installed (pip install {distribution or module})")


def leaves_of(case: Case, args: Mapping[str, Any]) -> Leaves:
    """The tensors of ``args`` that the case takes gradients of, by argument name."""
    found = {}
    for name in case.grads:
        value = args[name]
        if value is not None:
            found[name] = (value,) if isinstance(value, Tensor) else tuple(value)
    return found


def flat(value: Any) -> Outputs:
    """The tensors of a (nested) result, in order."""
    if isinstance(value, Tensor):
        return (value,)
    return tuple(tensor for item in value for tensor in flat(item))


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
    from . import peers_models, peers_ops, peers_training

    if case.op == "bert_mlm":
        ours, peers, compiled = peers_training.OURS, peers_training.PEERS, peers_training.COMPILED
    elif case.is_model:
        ours, peers, compiled = peers_models.OURS[case.op], peers_models.PEERS[case.op], peers_models.COMPILED[case.op]
    else:
        ours, peers = _op_providers(case.op), peers_ops.PEERS[case.op]
        compiled = (Provider("torch.compile of the reference", _build_compiled),)
    if not compile:
        compiled = [replace(provider, build=_not_compiled) for provider in compiled]
    fitting = [provider for provider in peers if _fits(case, provider)]
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
        from . import peers_models, peers_training

        source = peers_training if case.op == "bert_mlm" else peers_models
        return source.oracle(case, args), {}, None
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


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return tuple(_wide(item) for item in value)
    return value
