# SPDX-License-Identifier: Apache-2.0
"""Whether a module is watched (hooks, a replaced ``forward``, compilation), and whether modules are unchanged.

Code that computes several modules at once, from their parameters, must know both: hooks have to be called, and a module
that took another's place has to run.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from operator import contains, is_, itemgetter
from typing import Any

import torch
from torch import nn

from .._core import torch_ops

IsHarmless = Callable[[Any], bool]

_HOOKS = tuple(map(itemgetter, ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")))
_REPLACED = ("forward", "_call_impl", "_compiled_call_impl")
_forward_hooks, _children = itemgetter("_forward_hooks"), itemgetter("_modules")


def is_watched(module: nn.Module, is_harmless: IsHarmless | None = None) -> bool:
    """Whether a module has hooks, a ``forward`` of its own or was compiled, so that it must be called.

    ``is_harmless`` picks out forward hooks that may be ignored.
    """
    state = module.__dict__
    if state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return True
    if any([name in state for name in _REPLACED]):
        return True
    hooks = state["_forward_hooks"]
    return bool(hooks) and (is_harmless is None or not all(map(is_harmless, hooks.values())))


def is_all_watched() -> bool:
    """Whether every module is watched: global hooks, torch.jit.trace, torch.onnx.export."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    return torch_ops.is_traced()


class Snapshot:
    """The classes, submodules and settings of modules at one time. Comparing them, and looking for hooks, takes 0.3 us
    a module.

    Args:
        modules: each with its own; nothing below them is looked at.
        settings: (table, name) of values to compare, such as an attribute in a module's ``__dict__``.
        is_harmless: see ``is_watched``.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        settings: Iterable[tuple[dict[str, Any], str]] = (),
        is_harmless: IsHarmless | None = None,
    ) -> None:
        self.modules, self._is_harmless = list(modules), is_harmless
        self._states = [module.__dict__ for module in modules]
        self._kinds = list(map(type, modules))
        self._holders = [state for state in self._states if state["_modules"]]
        self._inside = [dict(state["_modules"]) for state in self._holders]
        settings = list(settings)
        self._tables, self._names = [table for table, _ in settings], [name for _, name in settings]
        self._values = list(map(dict.get, self._tables, self._names))

    @classmethod
    def joined(cls, snapshots: Sequence[Snapshot]) -> Snapshot:
        """One snapshot of the modules of several; ``is_harmless`` is the first one's."""
        found = copy.copy(snapshots[0])
        for name, value in vars(found).items():
            if isinstance(value, list):
                setattr(found, name, list(chain.from_iterable(vars(each)[name] for each in snapshots)))
        return found

    def is_same(self) -> bool:
        """Whether nothing has changed, watched or not."""
        return (
            list(map(type, self.modules)) == self._kinds
            and list(map(_children, self._holders)) == self._inside
            and list(map(dict.get, self._tables, self._names)) == self._values
        )

    def is_still(self) -> bool:
        """Whether nothing has changed and no module is watched."""
        return self.is_same() and not self.is_watched()

    def is_watched(self) -> bool:
        """Whether one of the modules is watched."""
        states = self._states
        if any([any(map(hooks, states)) for hooks in _HOOKS]):
            return True
        if any([any(map(contains, states, repeat(name))) for name in _REPLACED]):
            return True
        found = list(filter(None, map(_forward_hooks, states)))
        if not found:
            return False
        is_harmless = self._is_harmless
        return is_harmless is None or not all([is_harmless(hook) for hooks in found for hook in hooks.values()])


# What ``nn.Module`` itself keeps in a module's ``__dict__``, and is looked at another way.
_TABLES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
# Attributes of the module itself that are compared: what graphs and snapshots are kept in is an attribute, too, and
# must not be held by what it holds.
_PLAIN = (int, float, str, bytes, type(None), torch.dtype, torch.device, tuple, list, dict, set, frozenset)


def _attributes(state: dict[str, Any], kinds: type | tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """A module's attributes of these kinds."""
    return ((name, value) for name, value in state.items() if name not in _TABLES and isinstance(value, kinds))


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


class State:
    """All that the arithmetic of a module in evaluation mode can depend on but the values of its tensors: the modules
    in it and their classes, their attributes, where parameters, buffers and other tensors lie. Holds those tensors, and
    does not hold the module.

    Attributes are equal, or the same object; lists, sets and dicts are looked into, other objects are not. To find out
    whether all is still as it was takes about a microsecond a module.
    """

    def __init__(self, module: nn.Module, is_harmless: IsHarmless | None = None) -> None:
        below = list(module.modules())[1:]
        self._module, self._kind, self._is_harmless = weakref.ref(module), type(module), is_harmless
        own = module.__dict__
        self._children, self._size = dict(own["_modules"]), len(own)
        self._names = [name for name, value in own.items() if name not in _TABLES and isinstance(value, _PLAIN)]
        self._values = list(map(own.get, self._names))
        self._below = Snapshot(below, (), is_harmless)
        self._states = [part.__dict__ for part in below]
        self._attributes = list(map(dict, self._states))
        # Tensors that are no parameters or buffers, and containers, wherever they are attributes.
        self._loose = [list(_attributes(state, torch.Tensor)) for state in (own, *self._states)]
        found = [pair for state in (own, *self._states) for pair in _attributes(state, (dict, list, set))]
        self._inside = [(value, copy.copy(value)) for _, value in found]
        self._found = self._tensors(module)
        self._places = list(map(_place, self._found))
        self._held = [tensor.detach() for tensor in self._found]  # a parameter may be given other memory

    @classmethod
    def of(cls, module: nn.Module, is_harmless: IsHarmless | None = None) -> State | None:
        """As it is now; None where a part is in training mode or watched (hooks that ``is_harmless`` tells do not
        count), or holds tensors that have no address."""
        if any([part.training or is_watched(part, is_harmless) for part in module.modules()]):
            return None
        try:
            return cls(module, is_harmless)
        except RuntimeError:
            return None

    def _tensors(self, module: nn.Module) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for state in (module.__dict__, *self._states):
            for name in ("_parameters", "_buffers"):
                if state[name]:
                    found += [tensor for tensor in state[name].values() if tensor is not None]
        return found + [value for pairs in self._loose for _, value in pairs]

    def is_still(self, module: nn.Module) -> bool:
        """Whether it is this module, all is as it was, and nobody watches."""
        if self._module() is not module or type(module) is not self._kind:
            return False
        own = module.__dict__
        if len(own) != self._size or own["_modules"] != self._children or is_watched(module, self._is_harmless):
            return False
        for state, pairs in zip((own, *self._states), self._loose):
            if pairs and not all([state.get(name) is value for name, value in pairs]):
                return False
        try:
            if list(map(own.get, self._names)) != self._values or self._states != self._attributes:
                return False
            if any([now != before for now, before in self._inside]):
                return False
        except Exception:  # two objects that cannot be compared are not the same
            return False
        found = self._tensors(module)
        if len(found) != len(self._found) or not all(map(is_, found, self._found)):
            return False
        return self._below.is_still() and list(map(_place, found)) == self._places
