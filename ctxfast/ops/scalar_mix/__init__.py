# SPDX-License-Identifier: Apache-2.0
"""``scalar_mix``: a learned weighted sum of a model's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import calls, checks, registry
from .reference import scalar_mix as reference

_OP = "scalar_mix"


def _check(args: Mapping[str, Any]) -> None:
    tensors, mask = args["tensors"], args["mask"]
    if len(tensors) == 0:
        raise ValueError("ctxfast.scalar_mix: tensors holds 0 tensors; expected at least one layer.")
    first = checks.floating(_OP, "tensors[0]", tensors[0])
    if first.dim() < 1:
        raise ValueError("ctxfast.scalar_mix: tensors[0] has shape (); expected (..., size).")
    for i, x in enumerate(tensors):
        checks.shape(_OP, f"tensors[{i}]", x, tuple(first.shape), "the shape of tensors[0]")
        checks.same(_OP, "tensors[0]", first, [(f"tensors[{i}]", x)])
    scalars = (("scalar_parameters", args["scalar_parameters"], len(tensors)), ("gamma", args["gamma"], 1))
    for name, value, size in scalars:
        checks.floating(_OP, name, value)
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
        checks.shape(_OP, "mask", mask, tuple(first.shape[:-1]), "tensors[0] without its last dimension")
        checks.same(_OP, "tensors[0]", first, [("mask", mask)], dtype=False)
    checks.positive(_OP, "eps", args["eps"])


@calls.op(
    reference=reference,
    check=_check,
    autocast="keep",
    impls=(registry.Impl("cuda", "cuda", note="one pass over all layers, fp32 accumulation", proven="emulator"),),
)
def scalar_mix(
    tensors: Sequence[Tensor] | Tensor,
    scalar_parameters: Tensor,
    gamma: Tensor,
    mask: Tensor | None = None,
    *,
    do_layer_norm: bool = False,
    eps: float = 1e-13,
    impl: str | None = None,
) -> Tensor:
    """``gamma * sum_k softmax(s)_k x_k`` over a model's layers.

    Args:
        tensors: K tensors of one shape (..., N), or one tensor (K, ..., N).
        scalar_parameters: (K,), weights before the softmax.
        gamma: (1,), scale of the whole.
        mask: the shape of a layer without N; True where a row is real. Needed with ``do_layer_norm``.
        do_layer_norm: normalise every layer first, with ONE mean and variance over all unmasked elements of the whole
            tensor and no affine part (as AllenNLP and bilm-tf do, not per token).
        eps: added to that variance.
        impl: name of an implementation; None chooses.

    Returns:
        (..., N), in the dtype of the layers.

    Reference: Peters et al. 2018, equation 1; AllenNLP's ScalarMix.
    """
    layers = tensors.unbind(0) if isinstance(tensors, Tensor) else tuple(tensors)
    return calls.given(
        impl,
        tensors=layers,
        scalar_parameters=scalar_parameters,
        gamma=gamma,
        mask=mask,
        do_layer_norm=do_layer_norm,
        eps=eps,
    )
