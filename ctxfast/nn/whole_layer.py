# SPDX-License-Identifier: Apache-2.0
"""Where encoder layers are computed by one call, ``functional.transformer_layers``, and where by their parts.

One call is faster on a CPU, where calls of a short text's parts take longer than their arithmetic. Parts it is on a
GPU (CUDA graphs make calls free), with gradients (one call would compute layers again on the way back), under autocast,
and where somebody asked for an implementation of a part or looks between the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._core import registry, torch_ops

_PARTS = ("add_layer_norm", "attention", "linear_act")


class Layer(NamedTuple):
    """What one call needs of a layer."""

    weights: tuple[Tensor | None, ...]  # as functional.transformer_layers takes them
    options: dict[str, Any]  # its other arguments


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to see a module's inputs or outputs, or has given it another ``forward``."""
    state = module.__dict__
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)


def is_open(x: Tensor) -> bool:
    """Whether one call could compute layers over these tokens, as far as the layers themselves allow it."""
    if not x.is_cpu or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    # What is traced with gradients and without must be the same graph.
    if torch.nn.modules.module._has_any_global_hook() or torch_ops.is_traced():
        return False
    return not any(op in _PARTS or (op == "*" and name != "cpu") for op, name in registry.requested())


def run(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, layers: Sequence[Layer | None], *, all_layers: bool = False
) -> tuple[Tensor, ...] | None:
    """What the last layer gives, or every layer, by one call.

    None where the layers must run by themselves: there are none, one of them cannot be part of such a call (None), they
    differ in options, or only the reference would take the call.
    """
    if not layers or any([layer is None for layer in layers]):
        return None
    if any([layer.options != layers[0].options for layer in layers]):
        return None
    weights = [tensor for layer in layers for tensor in layer.weights]
    args = registry.OPS["transformer_layers"].arguments(
        x, cu_seqlens, max_seqlen, weights, **layers[0].options, all_layers=all_layers
    )
    found = registry.call_unless_reference(registry.OPS["transformer_layers"], args)
    return (found,) if isinstance(found, Tensor) else found
