# SPDX-License-Identifier: Apache-2.0
"""Highway layers, under the names of AllenNLP's Highway."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .._core import torch_ops
from . import tools

# Elements up to which torch uses one thread (at::internal::GRAIN_SIZE).
_OF_ONE_THREAD = 32768


def _sigmoid(x: Tensor) -> Tensor:
    """Sigmoid of rows (..., N); on the CPU a row's bits do not depend on the rows beside it.

    torch splits a large tensor among threads in the middle of rows, and rounds the elements that a split leaves outside
    whole vectors differently (3 threads, 34 rows of 2048: 2026-11). So each thread gets whole rows at a time.
    """
    if x.device.type != "cpu" or x.requires_grad or torch.compiler.is_compiling() or x.numel() <= _OF_ONE_THREAD:
        return torch.sigmoid(x)
    if torch_ops.why_definition((x,)) is not None:  # transforms and traces know no out=
        return torch.sigmoid(x)
    rows, count = x.flatten(0, -2), max(1, _OF_ONE_THREAD // x.shape[-1])
    found = torch.empty_like(rows)
    for part, to in zip(rows.split(count), found.split(count)):
        torch.sigmoid(part, out=to)
    return found.view(x.shape)


def highways(x: Tensor, layers: Iterable[nn.Module], impl: str | None = None) -> Tensor:
    """What ``Highway`` computes, over its layers, (..., N) -> (..., N)."""
    for layer in layers:
        both = tools.linear(x, layer, impl=impl)
        transform, gate = both.chunk(2, dim=-1)
        gate = _sigmoid(gate)
        x = gate * x + (1 - gate) * torch.relu(transform)
    return x


class Highway(tools.NotScriptable):
    """``y = g * x + (1 - g) * relu(t)``, with ``[t, g] = [W_t x + b_t, sigmoid(W_g x + b_g)]``, layer after layer.

    Args:
        input_dim: N, size of input and output.
        num_layers: how many layers.
        impl: implementation of the product (``linear_act``); None chooses.

    Parameters: ``_layers.k.weight`` (2N, N), the transform above the gate; ``_layers.k.bias`` (2N,). The gate's bias
    starts at 1, so that a new layer mostly passes its input on.

    Reference: Srivastava et al. 2015; AllenNLP's Highway.
    """

    def __init__(
        self,
        input_dim: int,
        num_layers: int = 1,
        *,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_dim, self.impl = input_dim, impl
        layers = [nn.Linear(input_dim, 2 * input_dim, device=device, dtype=dtype) for _ in range(num_layers)]
        with torch.no_grad():
            for layer in layers:
                layer.bias[input_dim:].fill_(1)
        self._layers = nn.ModuleList(layers)

    @tools.fx_leaf
    def forward(self, inputs: Tensor) -> Tensor:
        """(..., N) -> (..., N)."""
        return highways(inputs, self._layers, self.impl)

    def extra_repr(self) -> str:
        return f"{self.input_dim}, impl={self.impl or 'auto'}"
