# SPDX-License-Identifier: Apache-2.0
"""Good and bad arguments of ``lstm``."""

from __future__ import annotations

import torch
from torch import zeros

GOOD = dict(
    input=zeros(2, 3, 4),
    weight_ih=[zeros(20, 4)] * 2,
    weight_hh=[zeros(20, 6)] * 2,
    bias=[zeros(20)] * 2,
    weight_proj=[zeros(6, 5)] * 2,
    lengths=torch.tensor([3, 1]),
    initial_state=(zeros(2, 2, 6), zeros(2, 2, 5)),
    cell_clip=3.0,
    proj_clip=3.0,
)
BAD = (
    (dict(input=["x", "y"]), TypeError, "input is a str; expected a torch.Tensor."),
    (dict(input=zeros(2, 3, 4).long()), TypeError,
     "input has dtype torch.int64; expected float32, float16, bfloat16 or float64. Convert it with .float()."),
    (dict(input=zeros(3, 4)), ValueError, "input has shape (3, 4); expected (batch, steps, input_size), batch first."),
    (dict(input=[zeros(2, 3, 4)]), ValueError, "input holds 1 tensors; expected 2, one per direction as in weight_ih."),
    (dict(weight_ih=[zeros(20, 4)] * 3), ValueError, "weight_ih holds 3 tensors; expected one per direction, 1 or 2."),
    (dict(weight_hh=zeros(20, 6)), ValueError,
     "weight_hh holds 1 tensors; expected 2, one per direction as in weight_ih."),
    (dict(input=[zeros(2, 3, 4), zeros(2, 4, 4)]), ValueError,
     "input has shape (2, 4, 4); expected (batch, steps, input_size) = (2, 3, 4)."),
    (dict(weight_hh=[zeros(21, 6)] * 2), ValueError,
     "weight_hh has shape (21, 6); expected (4*hidden_size, proj_size), gates stacked in the order i, f, g, o."),
    (dict(weight_ih=[zeros(20, 4), zeros(20, 5)]), ValueError,
     "weight_ih has shape (20, 5); expected (4*hidden_size, input_size) = (20, 4)."),
    (dict(weight_hh=[zeros(20, 6), zeros(24, 6)]), ValueError,
     "weight_hh has shape (24, 6); expected (4*hidden_size, proj_size), alike in both directions, = (20, 6)."),
    (dict(bias=[zeros(20), zeros(19)]), ValueError, "bias has shape (19,); expected (4*hidden_size,) = (20,)."),
    (dict(weight_proj=[zeros(5, 6)] * 2), ValueError,
     "weight_proj has shape (5, 6); expected (proj_size, hidden_size) = (6, 5)."),
    (dict(weight_proj=None), ValueError,
     "weight_hh has shape (20, 6); expected (4*hidden_size, hidden_size) = (20, 5) without weight_proj. Pass "
     "weight_proj of shape (6, 5) for a projected LSTM."),
    (dict(weight_hh=[zeros(20, 6).half()] * 2), TypeError,
     "weight_hh has dtype torch.float16; expected torch.float32, that of input. Convert one of them, or run under "
     "torch.autocast."),
    (dict(weight_ih=[zeros(20, 4, device="meta")] * 2), ValueError,
     "weight_ih is on meta; expected cpu, where input is. Move it with .to('cpu')."),
    (dict(lengths=torch.tensor([3.0, 1.0])), TypeError,
     "lengths has dtype torch.float32; expected int64 or int32. Convert it with .long()."),
    (dict(lengths=torch.tensor([3])), ValueError, "lengths has shape (1,); expected (batch,) = (2,)."),
    (dict(lengths=torch.tensor([4, 1])), ValueError,
     "lengths holds 4; expected values in 0..3. A length cannot be longer than the input has steps."),
    (dict(lengths=torch.tensor([3, -1])), ValueError,
     "lengths holds -1; expected values in 0..3. A length cannot be longer than the input has steps."),
    (dict(initial_state=(zeros(2, 2, 6),)), ValueError, "initial_state holds 1 tensors; expected (h_0, c_0)."),
    (dict(initial_state=(zeros(2, 2, 5), zeros(2, 2, 5))), ValueError,
     "initial_state[0] has shape (2, 2, 5); expected (directions, batch, proj_size) = (2, 2, 6)."),
    (dict(initial_state=(zeros(2, 2, 6), zeros(2, 2, 6))), ValueError,
     "initial_state[1] has shape (2, 2, 6); expected (directions, batch, hidden_size) = (2, 2, 5)."),
    (dict(cell_clip=-1.0), ValueError, "cell_clip is -1.0; expected a number above 0, or None for no clipping."),
    (dict(proj_clip=0.0), ValueError, "proj_clip is 0.0; expected a number above 0, or None for no clipping."),
    (dict(weight_dtype=torch.float16), ValueError,
     "weight_dtype is torch.float16; expected one of None, torch.bfloat16, torch.int8."),
)  # fmt: skip
