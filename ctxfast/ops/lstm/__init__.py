# SPDX-License-Identifier: Apache-2.0
"""``lstm``: one recurrent layer, one or two directions, projection and clipping optional."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..._core import checks, registry
from .reference import lstm as reference

_OP = "lstm"


def _check(args: Mapping[str, Any]) -> None:
    inputs, weight_ih, weight_hh = args["input"], args["weight_ih"], args["weight_hh"]
    bias, weight_proj, lengths = args["bias"], args["weight_proj"], args["lengths"]
    directions = len(weight_ih)
    if directions not in (1, 2):
        raise ValueError(f"ctxfast.lstm: weight_ih holds {directions} tensors; expected one per direction, 1 or 2.")
    for name, value in (
        ("input", inputs),
        ("weight_hh", weight_hh),
        ("bias", bias),
        ("weight_proj", weight_proj),
    ):
        if value is not None and len(value) != directions:
            raise ValueError(
                f"ctxfast.lstm: {name} holds {len(value)} tensors; "
                f"expected {directions}, one per direction as in weight_ih."
            )
    lead = checks.tensor(_OP, "input", inputs[0])
    checks.floating(_OP, "input", lead)
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
            _OP,
            "weight_hh",
            w_hh,
            (4 * hidden, size),
            "(4*hidden_size, proj_size), alike in both directions,",
        )
        checks.shape(_OP, "weight_ih", w_ih, (4 * hidden, x.shape[2]), "(4*hidden_size, input_size)")
        tensors = [("weight_ih", w_ih), ("weight_hh", w_hh), ("input", x)]
        if bias is not None:
            checks.shape(_OP, "bias", checks.tensor(_OP, "bias", bias[r]), (4 * hidden,), "(4*hidden_size,)")
            tensors.append(("bias", bias[r]))
        if weight_proj is not None:
            proj = checks.tensor(_OP, "weight_proj", weight_proj[r])
            checks.shape(_OP, "weight_proj", proj, (size, hidden), "(proj_size, hidden_size)")
            tensors.append(("weight_proj", proj))
        elif size != hidden:
            raise ValueError(
                f"ctxfast.lstm: weight_hh has shape {tuple(w_hh.shape)}; expected (4*hidden_size, hidden_size) = "
                f"({4 * hidden}, {hidden}) without weight_proj. "
                f"Pass weight_proj of shape ({size}, {hidden}) for a projected LSTM."
            )
        checks.same(_OP, "input", lead, tensors)
    if lengths is not None:
        checks.integer(_OP, "lengths", checks.tensor(_OP, "lengths", lengths))
        checks.shape(_OP, "lengths", lengths, (batch,), "(batch,)")
        checks.same(_OP, "input", lead, [("lengths", lengths)], dtype=False)
        checks.in_range(_OP, "lengths", lengths, 0, steps, "A length cannot be longer than the input has steps.")
    if args["initial_state"] is not None:
        if len(args["initial_state"]) != 2:
            raise ValueError(
                f"ctxfast.lstm: initial_state holds {len(args['initial_state'])} tensors; expected (h_0, c_0)."
            )
        h_0, c_0 = args["initial_state"]
        checks.shape(_OP, "initial_state[0]", checks.tensor(_OP, "initial_state[0]", h_0), (directions, batch, size),
                     "(directions, batch, proj_size)")  # fmt: skip
        checks.shape(_OP, "initial_state[1]", checks.tensor(_OP, "initial_state[1]", c_0), (directions, batch, hidden),
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


SPEC = registry.register(
    registry.OpSpec(
        name=_OP,
        package=__name__,
        summary="one LSTM layer, one or two directions, with projection, clips, lengths and states",
        cite="Sak et al. 2014 (projection); Peters et al. 2018 (clipping); AllenNLP LstmCellWithProjection",
        reference=reference,
        check=_check,
        autocast="lower",
        impls=(
            registry.Impl(
                "cuda",
                "cuda",
                note="Hopper: all steps in one launch, weights on chip, 16 bits; not yet run on a GPU",
            ),
            registry.Impl(
                "cuda_step",
                "cuda",
                note="any size from sm_80, one launch a step for both directions; not yet run on a GPU",
            ),
            registry.Impl(
                "cpu",
                "cpu",
                note="C++: fp32, bf16 or int8 products; AVX2 to AVX-512 VNNI/BF16 and AMX chosen at run time",
            ),
        ),
        # Rounding errors of a recurrence add up over the steps.
        ceiling={torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1},
    )
)
