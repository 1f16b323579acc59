# SPDX-License-Identifier: Apache-2.0
"""A learned weighted sum of a model's layers, under the names of AllenNLP's ScalarMix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional
from . import tools


class ScalarMix(tools.NotScriptable):
    """``gamma * sum_k softmax(s)_k x_k`` over K layers.

    Args:
        mixture_size: K.
        do_layer_norm: normalise every layer first, with one mean and variance over all unmasked elements of the batch.
        initial_scalar_parameters: K values of ``s``, before the softmax; None for zeros (equal weights).
        trainable: whether ``s`` and ``gamma`` require gradients.
        impl: implementation of ``scalar_mix``; None chooses.

    Parameters: ``scalar_parameters.k`` (1,) for each layer, ``gamma`` (1,), which starts at 1.

    Reference: Peters et al. 2018, equation 1; AllenNLP's ScalarMix.
    """

    def __init__(
        self,
        mixture_size: int,
        do_layer_norm: bool = False,
        initial_scalar_parameters: Sequence[float] | None = None,
        trainable: bool = True,
        *,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        values = [0.0] * mixture_size if initial_scalar_parameters is None else list(initial_scalar_parameters)
        if len(values) != mixture_size:
            raise ValueError(
                f"ctxfast.ScalarMix: initial_scalar_parameters has {len(values)} values; expected {mixture_size}, one "
                f"per layer."
            )
        self.mixture_size, self.do_layer_norm, self.impl = mixture_size, do_layer_norm, impl
        self.scalar_parameters = nn.ParameterList(
            nn.Parameter(torch.tensor([float(value)]), requires_grad=trainable) for value in values
        )
        self.gamma = nn.Parameter(torch.ones(1), requires_grad=trainable)

    @tools.fx_leaf
    def forward(self, tensors: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """K tensors (..., N) -> (..., N).

        Args:
            tensors: one per layer.
            mask: bool, the shape of a layer without N; True where a row is real. Needed with ``do_layer_norm``.

        Raises:
            ValueError: the wrong number of tensors, or no mask with ``do_layer_norm``.
        """
        if len(tensors) != self.mixture_size:
            raise ValueError(
                f"ctxfast.ScalarMix: tensors holds {len(tensors)} layers; expected {self.mixture_size}, the module's "
                f"mixture_size."
            )
        # 1e-13 underflows in float16.
        eps = 1e-4 if tensors[0].dtype == torch.float16 else 1e-13
        return functional.scalar_mix(
            tensors,
            torch.cat(list(self.scalar_parameters)),
            self.gamma,
            mask,
            do_layer_norm=self.do_layer_norm,
            eps=eps,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"mixture_size={self.mixture_size}, do_layer_norm={self.do_layer_norm}, impl={self.impl or 'auto'}"
