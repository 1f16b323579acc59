# SPDX-License-Identifier: Apache-2.0
"""Launches of Triton kernels that cost the host less: a launch like one before it is not examined again.

Triton looks at every argument of every launch for what a kernel is compiled by: dtypes, addresses and numbers that are
multiples of 16, numbers that are one. Here a launch is first compared with those before it, and one that is like
another is handed to the kernel that Triton compiled then, which Triton lets be called itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._core import capability

_IS_INTERPRETED = capability.is_triton_interpreted()
# What launches have in common -> the compiled kernel, and the constants among its arguments.
_FOUND: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_MOST = 4096
# Kernel -> whether Triton compiles for the value of each of its arguments.
_SPECIALISED: dict[Any, list[bool]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``: all of a kernel's arguments but its constants, in order, and those by name.

    Constants are the kernel's ``tl.constexpr`` and Triton's own options.
    """
    if _IS_INTERPRETED:
        kernel[grid](*args, **constants)
        return
    specialised = _SPECIALISED.get(kernel.fn)
    if specialised is None:
        specialised = _SPECIALISED[kernel.fn] = [not parameter.do_not_specialize for parameter in kernel.params]
    facts: list[Any] = [kernel.fn, *constants, *constants.values()]
    addresses, device = 0, None
    for is_specialised, each in zip(specialised, args):
        kind = type(each)
        if kind in _PLAIN:
            addresses |= each.data_ptr()
            facts.append(each.dtype)
            device = each.device
        elif kind is not int or is_specialised:
            facts += (kind, each)
        else:
            facts.append(each.bit_length() < 32)
    key = (*facts, device)
    found = _FOUND.get(key) if addresses & 15 == 0 else None
    if found is not None:
        compiled, tail = found
        compiled[(*grid, 1, 1)[:3]](*args, *tail)
        return
    compiled = kernel[grid](*args, **constants)
    if addresses & 15 == 0 and compiled is not None:
        if len(_FOUND) >= _MOST:
            _FOUND.clear()
        _FOUND[key] = (compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :]))
