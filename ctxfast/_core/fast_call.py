# SPDX-License-Identifier: Apache-2.0
"""What calls without gradients on the CPU were found to run, so that a call like one before it asks no more.

Checking arguments and choosing an implementation again takes longer than a small call's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import torch_ops
from .choice import requested

# Facts of calls -> the function that runs them.
FOUND: dict[tuple[Any, ...], Callable[..., Any]] = {}
_MOST = 4096
_SIMPLE = frozenset((type(None), int, float, bool, str, torch.dtype))


def facts(op: str, impl: str | None, args: Mapping[str, Any]) -> tuple[Any, ...]:
    """Everything that the choice and the checks, but those of values, look at; () where they must look again."""
    if torch_ops.must_dispatch() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return ()
    found: list[Any] = [op, impl, requested()]
    return tuple(found) if _describe(args.values(), found) else ()


def _describe(values: Iterable[Any], found: list[Any]) -> bool:
    """Adds the facts of values to those ``found``; False where there are others that count."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            if not value.is_cpu:
                return False
            found += (value.dtype, value.shape)
        elif kind in _SIMPLE:
            found += (kind, value)  # 1, 1.0 and True are equal, and not all of them are allowed
        elif kind is tuple:
            found.append(len(value))
            if not _describe(value, found):
                return False
        else:
            return False
    return True


def remember(facts: tuple[Any, ...], function: Callable[..., Any]) -> None:
    """Notes the function that a call of these facts runs."""
    if len(FOUND) >= _MOST:
        FOUND.clear()
    FOUND[facts] = function
