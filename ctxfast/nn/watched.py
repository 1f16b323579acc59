# SPDX-License-Identifier: Apache-2.0
"""Whether a module is watched (hooks, a replaced ``forward``, compilation), and whether modules are unchanged.

Code that computes several modules at once, from their parameters, must know both: hooks have to be called, and a module
that took another's place has to run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from operator import contains, itemgetter
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
