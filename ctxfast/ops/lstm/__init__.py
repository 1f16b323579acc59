# SPDX-License-Identifier: Apache-2.0
"""``lstm``: one recurrent layer, one or two directions, projection and clipping optional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import calls, checks, registry
from .reference import lstm as reference

_OP = "lstm"


def _check(args: Mapping[str, Any]) -> None:
    inputs, weight_ih, weight_hh = args["input"], args["weight_ih"], args["weight_hh"]
    bias, weight_proj, lengths = args["bias"], args["weight_proj"], args["lengths"]
    directions = len(weight_ih)
    if directions not in (1, 2):
        raise ValueError(f"ctxfast.lstm: weight_ih holds {directions} tensors; expected one per direction, 1 or 2.")
    for name, value in (("input", inputs), ("weight_hh", weight_hh), ("bias", bias), ("weight_proj", weight_proj)):
        if value is not None and len(value) != directions:
            raise ValueError(
                f"ctxfast.lstm: {name} holds {len(value)} tensors; "
                f"expected {directions}, one per direction as in weight_ih."
            )
    lead = checks.floating(_OP, "input", inputs[0])
    if lead.dim() != 3:
        raise ValueError(
            f"ctxfast.lstm: input has shape {tuple(lead.shape)}; expected (batch, steps, input_size), batch first."
        )
    batch, steps, _ = lead.shape
    for r in range(directions):
        x = checks.tensor(_OP, "input", inputs[r])
        w_ih = checks.tensor(_OP, "weight_ih", weight_ih[r])
        w_hh = checks.tensor(_OP, "weight_hh", weight_hh[r])
        checks.shape(_OP, "input", x, (batch, steps, lead.shape[2]), "(batch, steps, input_size)")
        if w_hh.dim() != 2 or w_hh.shape[0] % 4:
            raise ValueError(
                f"ctxfast.lstm: weight_hh has shape {tuple(w_hh.shape)}; expected (4*hidden_size, proj_size), "
                f"gates stacked in the order i, f, g, o."
            )
        hidden, size = weight_hh[0].shape[0] // 4, weight_hh[0].shape[1]
        checks.shape(
            _OP, "weight_hh", w_hh, (4 * hidden, size), "(4*hidden_size, proj_size), alike in both directions,"
        )
        checks.shape(_OP, "weight_ih", w_ih, (4 * hidden, x.shape[2]), "(4*hidden_size, input_size)")
        tensors = [("weight_ih", w_ih), ("weight_hh", w_hh), ("input", x)]
        if bias is not None:
            checks.shape(_OP, "bias", bias[r], (4 * hidden,), "(4*hidden_size,)")
            tensors.append(("bias", bias[r]))
        if weight_proj is not None:
            proj = checks.shape(_OP, "weight_proj", weight_proj[r], (size, hidden), "(proj_size, hidden_size)")
            tensors.append(("weight_proj", proj))
        elif size != hidden:
            raise ValueError(
                f"ctxfast.lstm: weight_hh has shape {tuple(w_hh.shape)}; expected (4*hidden_size, hidden_size) = "
                f"({4 * hidden}, {hidden}) without weight_proj. "
                f"Pass weight_proj of shape ({size}, {hidden}) for a projected LSTM."
            )
        checks.same(_OP, "input", lead, tensors)
    if lengths is not None:
        checks.integer(_OP, "lengths", lengths)
        checks.shape(_OP, "lengths", lengths, (batch,), "(batch,)")
        checks.same(_OP, "input", lead, [("lengths", lengths)], dtype=False)
        checks.in_range(_OP, "lengths", lengths, 0, steps, "A length cannot be longer than the input has steps.")
    if args["initial_state"] is not None:
        if len(args["initial_state"]) != 2:
            raise ValueError(
                f"ctxfast.lstm: initial_state holds {len(args['initial_state'])} tensors; expected (h_0, c_0)."
            )
        h_0, c_0 = args["initial_state"]
        checks.shape(_OP, "initial_state[0]", h_0, (directions, batch, size),
                     "(directions, batch, proj_size)")  # fmt: skip
        checks.shape(_OP, "initial_state[1]", c_0, (directions, batch, hidden),
                     "(directions, batch, hidden_size)")  # fmt: skip
        checks.same(_OP, "input", lead, [("initial_state[0]", h_0), ("initial_state[1]", c_0)])
    checks.positive(_OP, "cell_clip", args["cell_clip"], none_means="no clipping")
    checks.positive(_OP, "proj_clip", args["proj_clip"], none_means="no clipping")
    checks.choice(_OP, "weight_dtype", args["weight_dtype"], (None, torch.bfloat16, torch.int8))
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "ctxfast.lstm: torch.onnx.export was called with dynamo=False, which has no form for a loop over steps; "
            "expected dynamo=True, or a ctxfast.nn.LSTM without clips, which becomes ONNX's LSTM."
        )


def _per_direction(value: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, Tensor) else tuple(value)


@calls.op(
    reference=reference,
    check=_check,
    autocast="lower",
    impls=(
        registry.Impl(
            "cuda", "cuda", note="Hopper: all steps in one launch, weights on chip, 16 bits", proven="emulator"
        ),
        registry.Impl(
            "cuda_step", "cuda", note="any size from sm_80, one launch a step for both directions", proven="emulator"
        ),
        registry.Impl(
            "cpu",
            "cpu",
            note="C++: fp32, bf16 or int8 products; AVX2 to AVX-512 VNNI/BF16 and AMX chosen at run time",
            proven="cpu",
        ),
    ),
    # Rounding errors of a recurrence add up over the steps.
    ceiling={torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1},
)
def lstm(
    input: Tensor | Sequence[Tensor],
    weight_ih: Tensor | Sequence[Tensor],
    weight_hh: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None = None,
    weight_proj: Tensor | Sequence[Tensor] | None = None,
    lengths: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    *,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    weight_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One LSTM layer in one or two directions, with projection, clipping, lengths and states.

    ``i, f, g, o = W_ih x + W_hh h' + b``; ``c = clip(sigmoid(i) tanh(g) + sigmoid(f) c')``;
    ``h = clip(W_proj (sigmoid(o) tanh(c)))``. The second direction runs from each row's own last step to its first.

    Args:
        input: (B, T, I), read by every direction, or a sequence of R such tensors, one per direction.
        weight_ih: (4H, I), or a sequence of R; rows stacked in the gate order i, f, g, o (torch's).
        weight_hh: (4H, P), or a sequence of R. P = H without a projection.
        bias: (4H,), or a sequence of R; None for none.
        weight_proj: (P, H), or a sequence of R; None for no projection.
        lengths: (B,) int64 or int32, steps of each row, 0..T; None: every row has T. Must be right-padded.
        initial_state: (h_0 (R, B, P), c_0 (R, B, H)); None for zeros.
        cell_clip: bound on ``|c|``, applied before tanh and carried on; None for none.
        proj_clip: bound on ``|h|`` after the projection; None for none.
        weight_dtype: how both factors of every matrix product are held (``W_ih x``, ``W_hh h``, ``W_proj m``).
            torch.bfloat16 rounds them to it; torch.int8 rounds each row of a weight, and each vector at each step, to
            1/127 of its largest magnitude. Sums, gates and cells keep the input's dtype, on a CPU float32. Gradients
            pass straight through the rounding. None keeps everything as it is.
        impl: name of an implementation; None chooses.

    Returns:
        output (B, T, R*P), [forward | backward], zero past a row's length; and (h_n (R, B, P), c_n (R, B, H)), the
        state at each row's own end. A row of length 0 keeps its initial state.

    Numerics: float32 within 1e-5 of float64; deterministic. A clipped value passes no gradient. cpu: a row's bits
    depend neither on the other rows nor on threads; int8 gives the same bits on every instruction set.
    Reference: Sak et al. 2014; Peters et al. 2018; the cell of AllenNLP's LstmCellWithProjection.
    """
    weights = _per_direction(weight_ih)
    inputs = _per_direction(input)
    return calls.given(
        impl,
        input=inputs * len(weights) if isinstance(input, Tensor) else inputs,
        weight_ih=weights,
        weight_hh=_per_direction(weight_hh),
        bias=_per_direction(bias),
        weight_proj=_per_direction(weight_proj),
        lengths=lengths,
        initial_state=initial_state,
        cell_clip=cell_clip,
        proj_clip=proj_clip,
        weight_dtype=weight_dtype,
    )
