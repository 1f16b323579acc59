# SPDX-License-Identifier: Apache-2.0
"""``char_cnn``: the definition, in plain PyTorch (Kim et al. 2016; ELMo's character encoder, Peters et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def char_cnn(
    char_ids: Tensor,  # (W, C)
    char_embeddings: Tensor,  # (V, D)
    conv_weights: Sequence[Tensor],  # (n_i, D, w_i)
    conv_biases: Sequence[Tensor],  # (n_i,)
    activation: str,
) -> Tensor:
    """See ``ctxfast.functional.char_cnn``."""
    act = torch.relu if activation == "relu" else torch.tanh
    x = F.embedding(char_ids, char_embeddings).transpose(1, 2)  # (W, D, C)
    # Windows over in-word padding count: the padding character has a trained vector.
    pooled = [act(F.conv1d(x, weight, bias).amax(dim=2)) for weight, bias in zip(conv_weights, conv_biases)]
    return torch.cat(pooled, dim=1)
