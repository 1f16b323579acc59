# SPDX-License-Identifier: Apache-2.0
"""Whether a part of somebody's model is what its name says: objects are compared, never names alone.

A class is *stock* if it is defined where its package defines it and none of its functions was replaced: every function
must have been written in the package's own files, decorators included. That also finds classes that were patched as a
whole and subclasses that took over a name.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._device import DeviceContext

from .._core import torch_ops
from ..nn.watched import Snapshot


@lru_cache
def _folder(package: str) -> str:
    return str(Path(str(import_module(package).__file__)).parent) + "/"


def is_written_in(function: Any, *packages: str) -> bool:
    """Whether a function, and every function that it wraps, was written in one of some packages."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None:  # an object that is called
            if type(function).__module__.partition(".")[0] not in packages:
                return False
        elif not code.co_filename.startswith(tuple(map(_folder, packages))):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def running(kind: type, names: Sequence[str] | None = None) -> Iterator[tuple[type, str, Any]]:
    """(class, name, function) of what a class and those under it, up to ``nn.Module``, define: all, or these names."""
    for each in kind.__mro__:
        if each is nn.Module:
            return
        for name, value in vars(each).items():
            if name in names if names is not None else isinstance(value, FunctionType) and name != "__init__":
                yield each, name, value


def why_not_stock(kind: type, package: str, names: Sequence[str] | None = None) -> str | None:
    """None if a class, and what it inherits up to ``nn.Module``, is a package's own and untouched; else a sentence.

    ``names``: the functions that matter; None for all of them.
    """
    for each in kind.__mro__ if names is None else (kind,):
        if each is nn.Module:
            break
        if not each.__module__.startswith((package + ".", "torch.")) and each.__module__ not in ("abc", "typing"):
            return f"{kind.__name__} is none of {package}'s own classes."
    for owner, name, function in running(kind, names):
        if not is_written_in(function, package, "torch"):
            return f"{owner.__name__}.{name} was replaced by a function of another package."
        for table, used in _names_of(function) if names is None else ():
            if isinstance(table[used], (FunctionType, partial)) and not is_written_in(table[used], package, "torch"):
                return f"{used}, which {owner.__name__}.{name} calls, was replaced by a function of another package."
        *_, written_for, _ = ("", *function.__qualname__.split("."))
        if written_for not in ("", "<locals>", *(each.__name__ for each in kind.__mro__)):
            return f"{owner.__name__}.{name} was replaced by {function.__qualname__}."
    return None


def is_stock(kind: type, package: str, module: str, name: str) -> bool:
    """Whether a class is the one that a package defines under this name in this module, with its own functions."""
    return kind.__module__ == module and kind.__qualname__ == name and why_not_stock(kind, package) is None


# What torch's own layers compute with. People replace these to change every model at once (attention above all).
_TORCH = {
    name: getattr(F, name)
    for name in ("linear", "layer_norm", "gelu", "relu", "silu", "dropout", "softmax", "scaled_dot_product_attention")
}


# How every module is called, and what eager attention multiplies by.
_OTHERS: list[tuple[Any, str, Any]] = [
    (nn.Module, name, vars(nn.Module)[name]) for name in ("__call__", "_call_impl", "_wrapped_call_impl")
]
_OTHERS.append((torch, "matmul", torch.matmul))
# Functions by which a class may change how its objects are called.
_CALLS = ("__call__", "_call_impl", "forward")


def torch_objection() -> str | None:
    """Why torch's own functions are not what they were; None if they are."""
    for owner, name, function in (*((F, *item) for item in _TORCH.items()), *_OTHERS):
        if vars(owner)[name] is not function or not _is_torchs(function):
            return f"{'torch.nn.functional' if owner is F else owner.__name__}.{name} was replaced."
    return None


def _is_torchs(function: Any) -> bool:
    return inspect.isbuiltin(function) or is_written_in(function, "torch")


def _names_of(function: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """(table, name) of what a function, and every function that it wraps, looks up in its module."""
    while isinstance(function, FunctionType):
        for name in function.__code__.co_names:
            if name in function.__globals__:
                yield function.__globals__, name
        function = getattr(function, "__wrapped__", None)


class Watched:
    """Functions that classes and modules of Python have, and what stood there: whether it still does takes a look-up
    each."""

    def __init__(self) -> None:
        self._functions: dict[tuple[Any, str], Any] = {}  # attributes of a class or module
        self._globals: dict[tuple[int, str], tuple[dict[str, Any], Any]] = {}
        for name, function in _TORCH.items():
            self._functions[F, name] = function
        for owner, name, function in _OTHERS:
            self._functions[owner, name] = function

    def add(self, kind: type, names: Sequence[str] | None = None) -> None:
        """Watch ``forward`` and every other function that an instance of this class runs, how it is called, and what
        they look up in their modules; or functions of these names alone."""
        for _, name, function in running(kind, names):
            self._functions[kind, name] = getattr(kind, name)
            if names is None:
                self.add_names_of(function)
        for name in _CALLS:
            self._functions[kind, name] = getattr(kind, name)

    def add_names_of(self, function: Any) -> None:
        """Watch what a function looks up in its module."""
        for table, name in _names_of(function):
            self._globals.setdefault((id(table), name), (table, table[name]))

    def are_still(self) -> bool:
        try:
            if not all([getattr(owner, name) is value for (owner, name), value in self._functions.items()]):
                return False
        except AttributeError:
            return False
        return all([table.get(name) is value for (_, name), (table, value) in self._globals.items()])


PLAIN = (torch.Tensor, nn.Parameter)


def is_ordinary(*inputs: Any) -> bool:
    """Whether a call with these inputs computes numbers now: no tracing, no transform or forward-mode derivative, no
    mode that sees functions or operators, no meta or fake tensor, no kind of tensor of somebody's own. Inputs that are
    no tensors do not count."""
    for each in inputs:
        if isinstance(each, torch.Tensor) and (type(each) not in PLAIN or each.is_meta):
            return False
    if torch._C._len_torch_dispatch_stack() > 0 or is_overridden():
        return False
    return torch._C._get_tracing_state() is None and not torch_ops.is_transformed()


def is_overridden() -> bool:
    """Whether a ``TorchFunctionMode`` sees torch's functions as they are called; one that sets the device alone does
    not count."""
    count = torch._C._len_torch_function_stack()
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(count))


class Inside:
    """What stands inside a module: objects, classes, functions, settings and kinds of parameters."""

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        settings = [
            (part.__dict__, name)
            for part in parts
            for name, value in part.__dict__.items()
            if isinstance(value, (int, float, str)) and name != "training"
        ]
        self._parts, self._below = Snapshot(parts, settings), Snapshot(parts[1:])
        self._watched = Watched()
        for kind in set(map(type, parts)):
            self._watched.add(kind)

    @property
    def is_watched(self) -> bool:
        """Whether somebody watches a part inside; the module itself may have hooks, which run around it."""
        return self._below.is_watched()

    def is_still(self) -> bool:
        """Whether all is as it was."""
        for part in self._parts.modules:
            for tensor in part._parameters.values():
                if tensor is not None and (type(tensor) not in PLAIN or tensor.layout is not torch.strided):
                    return False
        return self._parts.is_same() and self._watched.are_still()


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Within, the module evaluates without gradients or autocast; afterwards its mode is as before."""
    modes = [(part, part.training) for part in module.modules()]
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    for part, _ in modes:
        part.__dict__["training"] = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for part, mode in modes:
            part.__dict__["training"] = mode
