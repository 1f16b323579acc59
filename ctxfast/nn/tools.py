# SPDX-License-Identifier: Apache-2.0
"""What modules share: linear layers that may have been replaced, and the answers to TorchScript and torch.fx, which
take models apart by the types of their modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import functional
from .watched import is_watched

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")


def name_of(module: nn.Module) -> str:
    """A module's class as errors name it."""
    kind = type(module)
    return f"ctxfast.nn.{kind.__name__}" if kind.__module__.startswith("ctxfast.nn.") else f"ctxfast.{kind.__name__}"


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a linear layer does nothing but multiply by its parameters: no other module (a quantised layer, an
    adapter) has taken its place, and nothing observes its calls. A layer that is not plain has to be called."""
    return is_own(linear, nn.Linear) and not is_watched(linear)


def is_own(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether a module computes what modules of a class do."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def readable(owner: nn.Module, name: str, module: nn.Module, kind: type[M], way: str = "") -> M:
    """``module``, a part of ``owner`` whose parameters are read and which is never called itself.

    Weights that torch.nn.utils.prune or weight_norm compute before each call are computed now.

    Raises:
        RuntimeError: another module has taken its place (a quantised one, an adapter), whose ``forward`` would be
            ignored.
    """
    if not is_own(module, kind):
        found = type(module)
        raise RuntimeError(
            f"{name_of(owner)}: {name} is a {found.__module__}.{found.__qualname__}; expected a "
            f"torch.nn.{kind.__name__}, whose parameters are read.{way}"
        )
    if module._forward_pre_hooks and "weight" not in module._parameters:
        for hook in module._forward_pre_hooks.values():
            hook(module, ())
    return module


def linear(x: Tensor, layer: nn.Module, activation: str = "none", **options: Any) -> Tensor:
    """``functional.linear_act`` of a linear layer's parameters; a layer that is not plain is called."""
    if is_plain(layer):
        return functional.linear_act(x, layer.weight, layer.bias, activation=activation, **options)
    return activated(layer(x), activation)


def activated(y: Tensor, activation: str) -> Tensor:
    """An activation of ``functional.linear_act`` in torch's own operations."""
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return {"none": lambda y: y, "relu": torch.relu, "tanh": torch.tanh, "silu": F.silu}[activation](y)


def gated(y: Tensor, activation: str) -> Tensor:
    """The activation of the first half of the last dimension times the second half."""
    a, b = y.chunk(2, dim=-1)
    return activated(a, activation) * b


class NotScriptable(nn.Module):
    """A module that TorchScript cannot compile from its source, and says so."""

    def __prepare_scriptable__(self) -> nn.Module:
        """The hook that torch.jit.script calls before it compiles a module."""
        raise RuntimeError(
            f"{name_of(self)}: torch.jit.script was asked to compile it; expected a module of what TorchScript knows. "
            f"torch.jit.trace records it in torch's own operations, and torch.export exports it."
        )


def fx_leaf(forward: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """A module's ``forward``; torch.fx.symbolic_trace records one call of the module (a leaf), as it does with torch's
    own modules."""

    def run(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        for each in (*args, *kwargs.values()):
            if isinstance(each, fx.Proxy):
                return _recorded(self, cast("fx.Tracer", each.tracer), args, kwargs)
        return forward(self, *args, **kwargs)

    # A code object of its own: torch.compile counts compilations by it, and all modules would share one limit.
    run.__code__ = run.__code__.replace(co_name=forward.__name__)
    return functools.wraps(forward)(run)


def _recorded(module: nn.Module, tracer: fx.Tracer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The proxy that stands for the result."""
    if module is tracer.root:
        raise TypeError(
            f"{name_of(module)}: torch.fx was asked to trace it; expected a model that holds it, in which it is one "
            f"call. torch.fx.symbolic_trace(torch.nn.Sequential(module)) is the smallest."
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
