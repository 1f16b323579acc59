# SPDX-License-Identifier: Apache-2.0
"""``scalar_mix``: the definition, in plain PyTorch (Peters et al. 2018, equation 1; AllenNLP ScalarMix)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _layer_norm(x: Tensor, mask: Tensor, eps: float) -> Tensor:
    """One mean and one variance over every unmasked element of the whole tensor; no affine part."""
    count = mask.sum() * x.shape[-1]
    inside = mask.unsqueeze(-1).to(x.dtype)
    mean = (x * inside).sum() / count
    variance = (((x * inside - mean) * inside) ** 2).sum() / count
    return (x - mean) / torch.sqrt(variance + eps)


def scalar_mix(
    tensors: Sequence[Tensor],  # K of one shape
    scalar_parameters: Tensor,  # (K,)
    gamma: Tensor,  # (1,)
    mask: Tensor | None,  # the shape of a tensor without its last dimension
    do_layer_norm: bool,
    eps: float,
) -> Tensor:
    """See ``ctxfast.functional.scalar_mix``."""
    weights = torch.softmax(scalar_parameters, dim=0)
    mixed = None
    for weight, x in zip(weights, tensors):
        term = weight.to(x.dtype) * (_layer_norm(x, mask, eps) if do_layer_norm else x)
        mixed = term if mixed is None else mixed + term
    return gamma.to(mixed.dtype) * mixed
