# SPDX-License-Identifier: Apache-2.0
"""LayerNorm under torch's name, and LayerNorm after bias, dropout and residual in one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from . import tools


class LayerNorm(nn.LayerNorm):
    """A drop-in ``torch.nn.LayerNorm`` with the same constructor, parameters and state_dict, run by
    ``ctxfast.add_layer_norm``.

    Only the form that transformers use is fused: one normalised dimension, with scale and shift, in one dtype or under
    autocast. All others (several dimensions, no scale or shift, eps of 0, mixed dtypes) run torch's own function.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as ``torch.nn.LayerNorm``.
        impl: implementation of ``add_layer_norm``; None chooses.
    """

    impl: str | None = None  # on the class, for a torch.nn.LayerNorm whose class was changed

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        impl: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.impl = impl

    def __prepare_scriptable__(self) -> nn.LayerNorm:
        """What torch.jit.script compiles: a ``torch.nn.LayerNorm`` that shares these parameters."""
        twin = nn.LayerNorm.__new__(nn.LayerNorm)
        own = ("impl", "_ctxfast_original")
        twin.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        return twin

    @tools.fx_leaf
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        is_plain = len(self.normalized_shape) == 1 and self.eps > 0
        if is_plain and weight is not None and bias is not None:
            device = input.device.type
            is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
            if is_cast or weight.dtype == bias.dtype == input.dtype:
                return functional.add_layer_norm(input, None, weight, bias, eps=self.eps, impl=self.impl)
        return super().forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, impl={self.impl or 'auto'}"


class AddLayerNorm(tools.NotScriptable):
    """``LayerNorm(residual + dropout(x + x_bias))``, the end of every post-LN transformer block.

    Args:
        hidden_size: N, size of the last dimension.
        eps: added to the variance; BERT's 1e-12 by default.
        dropout: probability of dropping an element of ``x + x_bias`` in training.
        impl: implementation of ``add_layer_norm``; None chooses.

    Parameters: ``weight`` and ``bias`` (N,), those of the LayerNorm.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-12,
        dropout: float = 0.0,
        *,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.eps, self.dropout, self.impl = hidden_size, eps, dropout, impl
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    @tools.fx_leaf
    def forward(self, x: Tensor, residual: Tensor | None = None, x_bias: Tensor | None = None) -> Tensor:
        """x, residual (..., N) and x_bias (N,), the bias of the preceding linear layer -> (..., N)."""
        return functional.add_layer_norm(
            x, residual, self.weight, self.bias, x_bias,
            eps=self.eps, dropout_p=self.dropout if self.training else 0.0, impl=self.impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, dropout={self.dropout}, impl={self.impl or 'auto'}"
