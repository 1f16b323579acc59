# SPDX-License-Identifier: Apache-2.0
"""Good and bad arguments of ``scalar_mix``."""

from __future__ import annotations

import torch
from torch import zeros

GOOD = dict(
    tensors=[zeros(2, 3, 4)] * 2,
    scalar_parameters=zeros(2),
    gamma=zeros(1),
    mask=torch.ones(2, 3).bool(),
    do_layer_norm=True,
)
BAD = (
    (dict(tensors=[]), ValueError, "tensors holds 0 tensors; expected at least one layer."),
    (dict(tensors=[zeros(2, 3, 4), zeros(2, 3, 5)]), ValueError,
     "tensors[1] has shape (2, 3, 5); expected the shape of tensors[0] = (2, 3, 4)."),
    (dict(scalar_parameters=zeros(3)), ValueError, "scalar_parameters has shape (3,); expected (layers,) = (2,)."),
    (dict(gamma=zeros(2)), ValueError, "gamma has shape (2,); expected (1,) = (1,)."),
    (dict(mask=None), ValueError,
     "mask is None; expected the mask of real rows, since do_layer_norm takes its statistics over them."),
    (dict(mask=torch.ones(2, 4).bool()), ValueError,
     "mask has shape (2, 4); expected tensors[0] without its last dimension = (2, 3)."),
    (dict(tensors=[zeros(2, 3, 4).bfloat16()] * 2), TypeError,
     "tensors[0] has dtype torch.bfloat16; expected float32 or float16 with do_layer_norm. Convert with .float()."),
)  # fmt: skip
