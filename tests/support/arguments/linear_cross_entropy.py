# SPDX-License-Identifier: Apache-2.0
"""Good and bad arguments of ``linear_cross_entropy``."""

from __future__ import annotations

import torch
from torch import zeros

_IDS = zeros(5, dtype=torch.int64)

GOOD = dict(hidden=zeros(5, 4), weight=zeros(9, 4), labels=_IDS, bias=zeros(9))
BAD = (
    (dict(hidden=zeros(5)), ValueError, "hidden has shape (5,); expected (rows, hidden_size) = (any, any)."),
    (dict(labels=torch.tensor([0, 1, 9, -100, 2])), ValueError,
     "labels holds 9; expected values in 0..8. Rows without a label hold ignore_index (-100)."),
    (dict(labels=zeros(4).long()), ValueError, "labels has shape (4,); expected (rows,) = (5,)."),
    (dict(reduction="avg"), ValueError, "reduction is 'avg'; expected one of 'mean', 'sum', 'none'."),
)  # fmt: skip
