# SPDX-License-Identifier: Apache-2.0
"""Where an encoder layer is computed by one call, ``functional.transformer_layer``, and where by its parts.

One call is faster on a CPU, where calls of a short text's parts take longer than their arithmetic. Parts it is on a
GPU (CUDA graphs make calls free), with gradients (one call would compute the layer again on the way back), under
autocast, and where somebody asked for an implementation of a part or looks between the parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .._core import registry

_PARTS = ("add_layer_norm", "attention", "linear_act")


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to see a module's inputs or outputs, or has given it another ``forward``."""
    state = module.__dict__
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)


def is_open(x: Tensor) -> bool:
    """Whether one call could compute a layer over these tokens, as far as the layer itself allows it."""
    if not x.is_cpu or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.nn.modules.module._has_any_global_hook():
        return False
    return not any(op in _PARTS or (op == "*" and name != "cpu") for op, name in registry.requested())


def run(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, *pairs: tuple[Tensor, Tensor | None], **options: Any
) -> Tensor | None:
    """``functional.transformer_layer``, or None where only its reference would take the call."""
    args = functional.ARGS["transformer_layer"](x, cu_seqlens, max_seqlen, *pairs, **options)
    return registry.call_unless_reference(registry.OPS["transformer_layer"], args)
