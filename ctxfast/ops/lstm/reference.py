# SPDX-License-Identifier: Apache-2.0
"""``lstm``: the definition, in plain PyTorch.

Hochreiter & Schmidhuber 1997 with the projection of Sak et al. 2014 and the clipping of ELMo's language model
(Peters et al. 2018; cell order and clipping as in AllenNLP's LstmCellWithProjection). No peepholes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared.definitions import rounded


# torch.jit.trace, which would record the steps of one input as the steps of every input, is handed a loop.
@torch.jit.script_if_tracing
def recurrence(
    gates_in: Tensor,  # (B, T, 4H), the input's share, bias included
    weight_hh: Tensor,  # (4H, P)
    weight_proj: Tensor | None,  # (P, H)
    lengths: Tensor | None,  # (B,)
    h: Tensor,  # (B, P)
    c: Tensor,  # (B, H)
    reverse: bool,
    cell_clip: float | None,
    proj_clip: float | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction over all steps -> (B, T, P), (B, P), (B, H); written so that TorchScript can compile it, too."""
    steps = gates_in.shape[1]
    weight_hh = rounded(weight_hh, dtype)
    if weight_proj is not None:
        weight_proj = rounded(weight_proj, dtype)
    output = [h] * steps
    for k in range(steps):
        t = steps - 1 - k if reverse else k
        i, f, g, o = (gates_in[:, t] + F.linear(rounded(h, dtype), weight_hh)).chunk(4, dim=1)
        c_new = torch.sigmoid(i) * torch.tanh(g) + torch.sigmoid(f) * c
        if cell_clip is not None:
            c_new = c_new.clamp(-cell_clip, cell_clip)
        h_new = torch.sigmoid(o) * torch.tanh(c_new)
        if weight_proj is not None:
            h_new = F.linear(rounded(h_new, dtype), weight_proj)
        if proj_clip is not None:
            h_new = h_new.clamp(-proj_clip, proj_clip)
        if lengths is None:
            h, c = h_new, c_new
            output[t] = h
        else:
            active = (t < lengths)[:, None]
            h, c = torch.where(active, h_new, h), torch.where(active, c_new, c)
            output[t] = torch.where(active, h_new, torch.zeros_like(h_new))
    stacked = torch.stack(output, dim=1) if steps > 0 else h.new_zeros([h.shape[0], 0, h.shape[1]])
    return stacked, h, c


def lstm(
    input: Sequence[Tensor],
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    weight_proj: Sequence[Tensor] | None,
    lengths: Tensor | None,
    initial_state: tuple[Tensor, Tensor] | None,
    cell_clip: float | None,
    proj_clip: float | None,
    weight_dtype: torch.dtype | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """See ``ctxfast.functional.lstm``; every per-direction argument is a sequence of R tensors."""
    outputs, h_n, c_n = [], [], []
    for r, x in enumerate(input):
        hidden, size = weight_hh[r].shape[0] // 4, weight_hh[r].shape[1]
        if initial_state is None:
            h, c = x.new_zeros(x.shape[0], size), x.new_zeros(x.shape[0], hidden)
        else:
            h, c = initial_state[0][r], initial_state[1][r]
        # All steps at once: nothing in these products waits for h.
        gates_in = F.linear(
            rounded(x, weight_dtype), rounded(weight_ih[r], weight_dtype), None if bias is None else bias[r]
        )
        y, h, c = recurrence(
            gates_in, weight_hh[r], None if weight_proj is None else weight_proj[r], lengths, h, c, r == 1,
            cell_clip, proj_clip, weight_dtype,
        )  # fmt: skip
        outputs.append(y)
        h_n.append(h)
        c_n.append(c)
    return torch.cat(outputs, dim=2), (torch.stack(h_n), torch.stack(c_n))
