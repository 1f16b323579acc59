# SPDX-License-Identifier: Apache-2.0
"""Parity before timing: a provider whose results are off gets no number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctxfast._core import registry

from .cases import Case, module
from .peers import oracle
from .provider import Call, Outputs, Provider

# Error allowed relative to the largest magnitude of the right result. Ops: their own ceilings in the table. Models:
# a dozen layers add up, and peers round at other places. In bfloat16 the worst element of BERT-Base's pooler is off by
# 0.11 to 0.14 for everybody (Hugging Face, OpenVINO, ctxfast; random weights, 2026-11-23).
_MODEL_BOUND = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
# BERT in int8, model -> (RMS, RMS of the worst column of last_hidden_state), both relative to the RMS of the right
# result. The largest element says little here: 0.03 to 0.13 of last_hidden_state, but 0.08 to 0.90 of the pooler, whose
# tanh turns a sum near zero over, where the RMS agree between outputs, lengths and programs. Measured over all int8
# rows (2026-11-28), RMS: MiniLM ctxfast 0.041, CTranslate2 0.042, ONNX Runtime 0.042, Hugging Face (one scale a weight
# matrix) 0.066; BERT-Base 0.118, 0.111, 0.112, 0.156. Worst column: 0.10, 0.09, -, 0.16; 0.36, 0.28, -, 0.42. Allowed
# is a fifth more than the worst of these. A column is looked at for itself because one wrong scale in a kernel leaves
# the RMS of 768 where it was.
_INT8_BOUND = {"minilm": (0.08, 0.2), "bert-base": (0.19, 0.5)}
# A gradient is a sum over many rows of products that were each rounded.
_GRADIENT_FACTOR = 3.0


class ParityError(Exception):
    """A provider's result is wrong; the text says which, by how much, and what was allowed."""


@dataclass(frozen=True)
class Verdict:
    """The largest relative error among all outputs (and gradients), and what was allowed."""

    error: float
    bound: float


class Gate:
    """Holds the right results of one case and judges providers by them."""

    def __init__(self, case: Case, args: Mapping[str, Any]) -> None:
        self._case, self._args = case, args
        self._right: tuple[Outputs, dict[str, Outputs], Outputs | None] | None = None

    @property
    def right(self) -> tuple[Outputs, dict[str, Outputs], Outputs | None]:
        """Outputs, gradients and the gradients of the outputs they start from, as every provider must have them."""
        if self._right is None:
            self._right = oracle(self._case, self._args)
        return self._right

    def _dtype(self, provider: Provider) -> torch.dtype:
        """Whose rounding a provider's errors are judged by."""
        if provider.ours and self._case.weight_dtype is not None:
            # Held to the unrounded result, as a peer in that dtype is; ELMo's int8 is as near as bfloat16.
            return self._case.weight_dtype if self._case.op == "bert" else torch.bfloat16
        return provider.dtype or self._case.dtype

    def bound(self, provider: Provider) -> float:
        dtype = self._dtype(provider)
        if not self._case.is_model:
            return registry.OPS[self._case.op].ceiling[dtype]
        own = getattr(module(self._case.op), "BOUND", None)
        if own is not None:
            return own
        return _INT8_BOUND[self._args["model"]][0] if dtype is torch.int8 else _MODEL_BOUND[dtype]

    def judge(self, provider: Provider, outputs: Outputs, grads: dict[str, Outputs]) -> Verdict:
        """Compare results in the case's layout; raises ParityError when they are off."""
        right, right_grads, _ = self.right
        bound = self.bound(provider)
        worst = Verdict(0.0, bound)
        if len(outputs) != len(right):
            raise ParityError(f"it returns {len(outputs)} tensors; expected {len(right)}")
        if set(grads) != set(right_grads):
            raise ParityError(f"it has gradients of {sorted(grads)}; expected those of {sorted(right_grads)}")
        named = [(f"output {i}", value, want, bound) for i, (value, want) in enumerate(zip(outputs, right))]
        for name, values in grads.items():
            named += [
                (f"gradient of {name}", v, w, bound * _GRADIENT_FACTOR) for v, w in zip(values, right_grads[name])
            ]
        if self._case.is_model and self._dtype(provider) is torch.int8:
            errors = [(name, rms_error(name, value, want), "the RMS", limit) for name, value, want, limit in named]
            column = column_error("output 0", outputs[0], right[0])
            errors.append(("a column of output 0", column, "the RMS", _INT8_BOUND[self._args["model"]][1]))
        else:
            errors = [
                (name, relative_error(name, value, want), "the largest value", limit)
                for name, value, want, limit in named
            ]
        for name, error, measure, limit in errors:
            if not error <= limit:
                raise ParityError(f"{name} is off by {error:.1e} of {measure}; allowed {limit:.1e}")
            if error / limit >= worst.error / worst.bound:
                worst = Verdict(error, limit)
        return worst


def _wide(name: str, value: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, once shapes agree and all is finite."""
    if tuple(value.shape) != tuple(right.shape):
        raise ParityError(f"{name} has shape {tuple(value.shape)}; expected {tuple(right.shape)}")
    value, right = value.detach().double(), right.double()
    if not bool(torch.isfinite(value).all()):
        raise ParityError(f"{name} holds values that are not finite")
    return value, right


def rms_error(name: str, value: Tensor, right: Tensor) -> float:
    """RMS of value - right by that of right, in float64."""
    value, right = _wide(name, value, right)
    if right.numel() == 0:
        return 0.0
    return float((value - right).square().mean().sqrt()) / (float(right.square().mean().sqrt()) or 1.0)


def column_error(name: str, value: Tensor, right: Tensor) -> float:
    """(rows, columns): RMS of value - right in the column where it is largest, by the RMS of all of right."""
    value, right = _wide(name, value, right)
    if right.numel() == 0:
        return 0.0
    worst = (value - right).square().mean(0).max().sqrt()
    return float(worst) / (float(right.square().mean().sqrt()) or 1.0)


def relative_error(name: str, value: Tensor, right: Tensor) -> float:
    """max |value - right| / max |right|, in float64."""
    value, right = _wide(name, value, right)
    if right.numel() == 0:
        return 0.0
    scale = float(right.abs().max())
    return float((value - right).abs().max()) / (scale or 1.0)


def runner(call: Call, starts: Outputs | None, *, backward: bool) -> Callable[[], Any]:
    """The function that is timed: a forward pass without autograd, or forward and backward.

    ``starts``: gradients of the outputs, in the case's layout. The backward runner returns outputs and gradients.
    """
    if not backward:

        def forward() -> Outputs:
            with torch.no_grad():
                return call.forward()

        return forward
    own = call.to_own(starts)
    leaves = [leaf for tensors in call.leaves.values() for leaf in tensors]

    def both() -> tuple[Outputs, tuple[Tensor, ...]]:
        outputs = call.forward()
        return outputs, torch.autograd.grad(outputs, leaves, own)

    return both


def results(call: Call, raw: Any, *, backward: bool) -> tuple[Outputs, dict[str, Outputs]]:
    """What a runner returned, in the case's layout: outputs, and gradients by argument name."""
    if not backward:
        return call.to_case(raw), {}
    outputs, grads = raw
    rest = iter(grads)
    by_name = {
        name: tuple(call.leaf_to_case(name, next(rest)) for _ in tensors) for name, tensors in call.leaves.items()
    }
    return call.to_case(outputs), by_name
