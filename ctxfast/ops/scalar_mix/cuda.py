# SPDX-License-Identifier: Apache-2.0
"""``scalar_mix`` on CUDA: one pass over all layers, fp32 accumulation.

The K weights (gamma times the softmax) are made by torch outside, so autograd carries their gradient on from the one
the kernel returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import capability, registry, torch_ops

_MAX_LAYERS = 64  # the kernel takes the layers' addresses by value
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _output(layers: Sequence[Tensor]) -> Tensor:
    return torch_ops.allocate(layers[0].shape, layers[0])


def _forward(layers: Sequence[Tensor], weights: Tensor) -> Tensor:
    output = _output(layers)
    layers, weights = [layer.contiguous() for layer in layers], weights.contiguous()
    with torch_ops.launching(output) as stream:
        capability.extension().scalar_mix_forward(
            num_inputs=len(layers), numel=output.numel(), dtype=capability.DTYPE_NAMES[output.dtype],
            inputs=[layer.data_ptr() for layer in layers], weights=weights.data_ptr(), output=output.data_ptr(),
            stream=stream,
        )  # fmt: skip
    return output


def _gradients(layers: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Of every layer, then of the weights."""
    return [torch_ops.allocate(each.shape, each) for each in (*layers, weights)]


def _backward(grad: Tensor, layers: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    *grad_layers, grad_weights = _gradients(layers, weights)
    grad, layers, weights = grad.contiguous(), [layer.contiguous() for layer in layers], weights.contiguous()
    c = capability.extension()
    size = c.scalar_mix_workspace_bytes(len(layers), grad.numel())
    workspace = torch_ops.allocate((size,), grad, torch.uint8)
    with torch_ops.launching(grad) as stream:
        c.scalar_mix_backward(
            num_inputs=len(layers), numel=grad.numel(), dtype=capability.DTYPE_NAMES[grad.dtype],
            grad_output=grad.data_ptr(), inputs=[layer.data_ptr() for layer in layers], weights=weights.data_ptr(),
            grad_inputs=[layer.data_ptr() for layer in grad_layers], grad_weights=grad_weights.data_ptr(),
            workspace=workspace.data_ptr(), workspace_bytes=size, stream=stream,
        )  # fmt: skip
    return [*grad_layers, grad_weights]


_fwd = torch_ops.define("scalar_mix_cuda_fwd", _forward, _output, "CUDA")
_bwd = torch_ops.define("scalar_mix_cuda_bwd", _backward, _gradients, "CUDA")


class _ScalarMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, *layers: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *layers)
        return _fwd(list(layers), weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        weights, *layers = ctx.saved_tensors
        if torch_ops.needs_definition(grad):
            return tuple(
                torch_ops.definition_gradients(
                    lambda weights, *layers: sum(weight.to(x.dtype) * x for weight, x in zip(weights, layers)),
                    (weights, *layers), ctx.needs_input_grad, (grad,),
                )
            )  # fmt: skip
        *grad_layers, grad_weights = _bwd(grad, layers, weights)
        return (grad_weights, *grad_layers)


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the CUDA mix cannot run this call."""
    first = args["tensors"][0]
    if first.device.type != "cuda":
        return f"it runs on a CUDA GPU and tensors are on {first.device}."
    if first.dtype not in _DTYPES:
        return f"it takes float32, float16 and bfloat16 and tensors are {first.dtype}."
    if args["do_layer_norm"]:
        return "it has no do_layer_norm."
    if len(args["tensors"]) > _MAX_LAYERS:
        return f"it mixes at most {_MAX_LAYERS} layers and there are {len(args['tensors'])}."
    return capability.why_no_cuda()


def _weights(scalar_parameters: Tensor, gamma: Tensor) -> Tensor:
    return gamma.float() * torch.softmax(scalar_parameters.float(), dim=0)


def scalar_mix(
    tensors: Sequence[Tensor],
    scalar_parameters: Tensor,
    gamma: Tensor,
    mask: Tensor | None,
    do_layer_norm: bool,
    eps: float,
) -> Tensor:
    """See ``ctxfast.functional.scalar_mix``."""
    weights = _weights(scalar_parameters, gamma)
    if registry.needs_grad(weights, tensors):
        return _ScalarMix.apply(weights, *tensors)
    return _fwd(list(tensors), weights)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    layers, weights = list(args["tensors"]), _weights(args["scalar_parameters"], args["gamma"])
    return [(_fwd, (layers, weights)), (_bwd, (torch.randn_like(layers[0]), layers, weights))]
