# SPDX-License-Identifier: Apache-2.0
"""``scalar_mix``: a learned weighted sum of a model's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..._core import checks, registry
from .reference import scalar_mix as reference

_OP = "scalar_mix"


def _check(args: Mapping[str, Any]) -> None:
    tensors, mask = args["tensors"], args["mask"]
    if len(tensors) == 0:
        raise ValueError("ctxfast.scalar_mix: tensors holds 0 tensors; expected at least one layer.")
    first = checks.tensor(_OP, "tensors[0]", tensors[0])
    checks.floating(_OP, "tensors[0]", first)
    if first.dim() < 1:
        raise ValueError("ctxfast.scalar_mix: tensors[0] has shape (); expected (..., size).")
    for i, x in enumerate(tensors):
        checks.shape(
            _OP,
            f"tensors[{i}]",
            checks.tensor(_OP, f"tensors[{i}]", x),
            tuple(first.shape),
            "the shape of tensors[0]",
        )
        checks.same(_OP, "tensors[0]", first, [(f"tensors[{i}]", x)])
    scalars = (
        ("scalar_parameters", args["scalar_parameters"], len(tensors)),
        ("gamma", args["gamma"], 1),
    )
    for name, value, size in scalars:
        checks.floating(_OP, name, checks.tensor(_OP, name, value))
        checks.shape(_OP, name, value, (size,), "(layers,)" if size != 1 or name != "gamma" else "(1,)")
        checks.same(_OP, "tensors[0]", first, [(name, value)], dtype=False)
    if args["do_layer_norm"]:
        if mask is None:
            raise ValueError(
                "ctxfast.scalar_mix: mask is None; expected the mask of real rows, "
                "since do_layer_norm takes its statistics over them."
            )
        if first.dtype == torch.bfloat16:
            raise TypeError(
                "ctxfast.scalar_mix: tensors[0] has dtype torch.bfloat16; expected float32 or float16 "
                "with do_layer_norm. Convert with .float()."
            )
    if mask is not None:
        checks.shape(
            _OP,
            "mask",
            checks.tensor(_OP, "mask", mask),
            tuple(first.shape[:-1]),
            "tensors[0] without its last dimension",
        )
        checks.same(_OP, "tensors[0]", first, [("mask", mask)], dtype=False)
    checks.positive(_OP, "eps", args["eps"])


SPEC = registry.register(
    registry.OpSpec(
        name=_OP,
        package=__name__,
        summary="gamma * sum_k softmax(s)_k x_k, with the batch LayerNorm as an option",
        cite="Peters et al. 2018, equation 1; AllenNLP ScalarMix",
        reference=reference,
        check=_check,
        autocast="keep",
        impls=(
            registry.Impl(
                "cuda",
                "cuda",
                note="one pass over all layers, fp32 accumulation (not yet run on a GPU)",
            ),
        ),
    )
)
