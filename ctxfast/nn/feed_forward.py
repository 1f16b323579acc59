# SPDX-License-Identifier: Apache-2.0
"""The feed-forward block of a post-LN transformer, under Hugging Face's names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from . import tools, watched
from .layer_norm import AddLayerNorm


class Intermediate(tools.NotScriptable):
    """``activation(x W^T + b)``: the widening half. Parameters: ``dense.weight``, ``dense.bias``."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "gelu",
        *,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, intermediate_size, device=device, dtype=dtype)
        self.activation, self.impl = activation, impl
        self.weight_dtype: torch.dtype | None = None

    @tools.fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., intermediate_size)."""
        options = dict(weight_dtype=self.weight_dtype, impl=self.impl)
        return tools.linear(x, self.dense, self.activation, **options)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, impl={self.impl or 'auto'}"


class ProjectAddLayerNorm(tools.NotScriptable):
    """``LayerNorm(residual + dropout(x W^T + b))``: the end of the attention and of the feed-forward block.

    The bias is added inside the LayerNorm's op. Parameters: ``dense.{weight,bias}``, ``LayerNorm.{weight,bias}``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_size: int,
        *,
        eps: float = 1e-12,
        dropout: float = 0.0,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, hidden_size, device=device, dtype=dtype)
        self.LayerNorm = AddLayerNorm(hidden_size, eps, dropout, device=device, dtype=dtype)
        self.impl = impl
        self.weight_dtype: torch.dtype | None = None

    @tools.fx_leaf
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x (..., in_features), residual (..., N) -> (..., N)."""
        if not tools.is_plain(self.dense):
            return self.LayerNorm(self.dense(x), residual)
        product = functional.linear_act(x, self.dense.weight, weight_dtype=self.weight_dtype, impl=self.impl)
        return self.LayerNorm(product, residual, self.dense.bias)

    def extra_repr(self) -> str:
        return f"impl={self.impl or 'auto'}"


class FeedForward(tools.NotScriptable):
    """``LayerNorm(x + dropout(W_2 activation(W_1 x + b_1) + b_2))``.

    Args:
        hidden_size: N.
        intermediate_size: width between the two products, 4N in BERT.
        activation: an activation of ``ctxfast.feed_forward``: "gelu" (exact), "gelu_tanh", "relu", "tanh", "none".
        eps: of the LayerNorm.
        dropout: probability of dropping an element before the residual in training.
        impl: implementation of ``feed_forward``; None chooses.

    Parameters: ``intermediate.dense``, ``output.dense``, ``output.LayerNorm``.
    Reference: Vaswani et al. 2017, section 3.3; Devlin et al. 2019; names as in Hugging Face's
    BertLayer.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "gelu",
        eps: float = 1e-12,
        dropout: float = 0.0,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.intermediate = Intermediate(hidden_size, intermediate_size, activation, impl=impl, **place)
        self.output = ProjectAddLayerNorm(intermediate_size, hidden_size, eps=eps, dropout=dropout, impl=impl, **place)

    @tools.fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., N)."""
        return feed_forward(self.intermediate, self.output, x)


def feed_forward(widen: nn.Module, narrow: nn.Module, x: Tensor) -> Tensor:
    """``narrow(widen(x), x)``, an ``Intermediate`` and a ``ProjectAddLayerNorm``, (..., N) -> (..., N).

    One call of ``functional.feed_forward``, which saves less for the backward than two of ``linear_act``. The modules
    are called where one was replaced or is observed, or where they ask for different implementations or dtypes.
    """
    if not (
        tools.is_own(widen, Intermediate)
        and tools.is_own(narrow, ProjectAddLayerNorm)
        and not any(map(watched.is_watched, (widen, narrow)))
        and not watched.is_all_watched()
        and tools.is_plain(widen.dense)
        and tools.is_plain(narrow.dense)
        and (widen.impl, widen.weight_dtype) == (narrow.impl, narrow.weight_dtype)
    ):
        return narrow(widen(x), x)
    first, second = widen.dense, narrow.dense
    product = functional.feed_forward(
        x, first.weight, first.bias, second.weight,
        activation=widen.activation, weight_dtype=widen.weight_dtype, impl=widen.impl,
    )  # fmt: skip
    return narrow.LayerNorm(product, x, second.bias)
