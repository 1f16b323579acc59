# SPDX-License-Identifier: Apache-2.0
"""A product with bias and activation on a GPU, and one in Triton whose epilogue does both for GELU, without gradients.

The latter spares the pass that reads and writes (M, N) after cuBLAS's product; cuBLASLt has epilogues for ReLU and the
tanh form of GELU alone. Which GPUs and sizes it is faster on than the two together, ``FASTER`` says: none is
entered before a GPU has measured both.

Two blocks of 8 warps share an SM (128 registers a thread, 96 KB of tiles each): the tensor cores work on one's products
while the other applies its activation, which takes as many instructions as half the products take cycles. A single
block of 128 x 256 would have nothing to put in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..._core import capability, torch_ops
from . import triton_rows

# Compute capability's major number -> whether (M, N, K) is faster by this kernel. For timing both, enter a function
# here: FASTER[9] = lambda M, N, K: True.
FASTER: dict[int, Callable[[int, int, int], bool]] = {}

_TILES = {
    9: dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=3, maxnreg=128),
    8: dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP=8, num_warps=8, num_stages=4),
}


@triton.jit
def _gelu(z):
    """z Phi(z) by Abramowitz & Stegun 7.1.26: erf to 1.5e-7, the negative tail without cancellation."""
    size = tl.abs(z)
    t = 1.0 / tl.fma(size, 0.231641888, 1.0)
    series = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail = tl.minimum(size, 16.0) * (series * tl.exp2(z * z * -0.7213475204444817))
    return tl.maximum(z, 0.0) - tail


@triton.jit
def product_kernel(
    x, weight, bias, out, M, N, K, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """x (M, K), weight (N, K) -> out (M, N), contiguous: gelu(x weight^T + bias).

    Programs stay and take one tile after another, GROUP blocks of rows at a time, so that what they read together stays
    in L2. DESCRIPTORS: x and weight are tensor descriptors of (BLOCK, BLOCK_K), else pointers.
    """
    across, down = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        first = tile // (GROUP * across) * GROUP
        group = tl.minimum(down - first, GROUP)
        row = (first + tile % (GROUP * across) % group) * BLOCK_M
        column = tile % (GROUP * across) // group * BLOCK_N
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        columns = column + tl.arange(0, BLOCK_N)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for at in range(0, K, BLOCK_K):
            if DESCRIPTORS:
                x_tile, weight_tile = x.load([row, at]), weight.load([column, at])
            else:
                depth = at + tl.arange(0, BLOCK_K)
                inside = (rows < M)[:, None] & (depth < K)[None, :]
                x_tile = tl.load(x + rows[:, None] * stride_x + depth[None, :], mask=inside, other=0.0)
                inside = (columns < N)[:, None] & (depth < K)[None, :]
                at_weight = weight + columns.to(tl.int64)[:, None] * stride_w + depth[None, :]
                weight_tile = tl.load(at_weight, mask=inside, other=0.0)
            sums = tl.dot(x_tile, tl.trans(weight_tile), sums)
        if HAS_BIAS:
            sums += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(out + rows[:, None] * N + columns[None, :], _gelu(sums).to(out.dtype.element_ty), mask=inside)


def _output(x: Tensor, weight: Tensor) -> Tensor:
    return torch_ops.allocate((x.shape[0], weight.shape[0]), x)


def _major(x: Tensor) -> int:
    # The interpreter, which computes on the CPU, is given the tiles of an H100.
    return min(9, capability.compute_capability(x.device.index)[0]) if x.is_cuda else 9


def _is_described(tensor: Tensor) -> bool:
    """Whether a descriptor can stand for a matrix whose rows' elements lie side by side."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x weight^T + bias): x (M, K), weight (N, K) -> (M, N)."""
    out = _output(x, weight)
    if out.numel() == 0:
        return out
    x, weight, bias = triton_rows.rows(x), triton_rows.rows(weight), None if bias is None else bias.contiguous()
    (M, K), N, major = x.shape, weight.shape[0], _major(x)
    tile = _TILES[major]
    has_descriptors = major == 9 and K > 0 and _is_described(x) and _is_described(weight)
    sources = (x, weight)
    if has_descriptors:
        blocks = (tile["BLOCK_M"], tile["BLOCK_N"])
        sources = tuple(
            TensorDescriptor.from_tensor(each, [block, tile["BLOCK_K"]]) for each, block in zip(sources, blocks)
        )
    tiles = triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"])
    with triton_rows.on_device(x):
        product_kernel[(triton_rows.programs(x, tiles, 2),)](
            *sources, bias, out, M, N, K, x.stride(0), weight.stride(0),
            HAS_BIAS=bias is not None, DESCRIPTORS=has_descriptors, enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return out


product = torch_ops.define("linear_act_triton_product", _product, _output, triton_rows.DISPATCH)


def _is_faster(x: Tensor, weight: Tensor, activation: str) -> bool:
    """Whether ``FASTER`` wants the product and its activation (x (..., K), weight (N, K)) by ``product``."""
    if not FASTER or torch.compiler.is_compiling() or x.dtype == torch.float32 or activation != "gelu":
        return False
    measured = FASTER.get(_major(x))
    N, K = weight.shape
    return measured is not None and K > 0 and measured(x.numel() // K, N, K)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, is_kept: bool, operator: Callable[..., Tensor]
) -> tuple[Tensor, Tensor | None]:
    """``activation(x W^T + b)``, and the product before bias and activation if it is to be kept for a backward.

    All that makes a product with an activation on a GPU stands here: cuBLAS and then ``operator``, the registered
    ``triton_activation.forward`` of an op; where nothing is kept, ``product`` if it is faster, or cuBLASLt's own
    epilogue for the activations that it has. (For a backward ``product`` would have to store two results.)
    """
    if not is_kept and _is_faster(x, weight, activation):
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0]), None
    # On the CPU torch's epilogue is the erf form.
    if not is_kept and x.is_cuda and bias is not None and activation in ("relu", "gelu_tanh"):
        flat = x.reshape(-1, x.shape[-1])
        out = torch._addmm_activation(bias, flat, weight.t(), use_gelu=activation == "gelu_tanh")
        return out.view(*x.shape[:-1], weight.shape[0]), None
    plain = F.linear(x, weight)
    return operator(plain, bias, activation), plain if is_kept else None


def launch(dtype: str, arch: int) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """What csrc/triton_resources.py compiles."""
    tile, kind = _TILES[arch // 10], {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    constants = dict(HAS_BIAS=True, DESCRIPTORS=arch >= 90)
    if arch >= 90:
        constants["x"] = f"tensordesc<{kind}[{tile['BLOCK_M']}, {tile['BLOCK_K']}]>"
        constants["weight"] = f"tensordesc<{kind}[{tile['BLOCK_N']}, {tile['BLOCK_K']}]>"
    return product_kernel, constants, tile
