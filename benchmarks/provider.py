# SPDX-License-Identifier: Apache-2.0
"""What a competitor is: it turns a case into a ``Call``, or says in a sentence why it does not run it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctxfast._core import choice

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


def on_references(call: Call) -> Call:
    """The call with every op of ctxfast on its reference."""

    def forward() -> Outputs:
        with choice.use_impl("reference"):
            return call.forward()

    return Call(forward, to_case=call.to_case)
