# SPDX-License-Identifier: Apache-2.0
"""``attention`` in Triton: packed, forward and backward, dropout from a counter.

The forward keeps its result and lse (H, T); the backward makes the probabilities again. Every sum has a fixed order
and no kernel uses atomics: two runs are equal to the last bit. The tiles, and with them the last bits, depend on the
range max_seqlen falls in and on how full the batch is (triton_plan). Nothing is read back to the host: grids come from
max_seqlen and the numbers of tokens and sequences, and programs past a sequence's end leave at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..._core import capability, registry, torch_ops
from ..shared import philox, triton_launch, triton_rows
from . import definition, triton_backward, triton_blocks, triton_forward, triton_plan

_MAX_HEAD_DIM = 128
_LOG2_E = math.log2(math.e)


def _kind(dtype: torch.dtype) -> str:
    """How products are made, in the words of triton_plan."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if capability.allows_tf32() else "float32"


def _major(qkv: Tensor) -> int:
    # The interpreter, which computes on the CPU, is given the tiles of an H100.
    return capability.compute_capability(qkv.device.index)[0] if qkv.is_cuda else 9


def _plan(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> triton_plan.Plan:
    mean = qkv.shape[0] / (cu_seqlens.shape[0] - 1)
    return triton_plan.choose(qkv.shape[3], _kind(qkv.dtype), _major(qkv), max_seqlen, mean)


def _is_empty(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> bool:
    return qkv.numel() == 0 or cu_seqlens.shape[0] == 1 or max_seqlen == 0


def _options(qkv: Tensor, seeds: Tensor | None) -> dict[str, Any]:
    """What every kernel is compiled for."""
    head_dim = qkv.shape[3]
    return dict(
        D=head_dim, BLOCK_D=triton_rows.block(head_dim), DROPOUT=seeds is not None,
        PRECISION="tf32" if _kind(qkv.dtype) == "tf32" else "ieee",
        enable_fp_fusion=True,  # said, because Triton's default differs between versions
    )  # fmt: skip


def _blocks(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, size: int) -> tuple[int, Tensor | None, int]:
    """(programs, table or None, blocks a sequence) of a kernel over blocks of ``size`` tokens."""
    sequences = cu_seqlens.shape[0] - 1
    grid = triton_plan.grid(qkv.shape[0], sequences, max_seqlen, size)
    table = triton_blocks.block_table(cu_seqlens, grid.programs, size) if grid.has_table else None
    return grid.programs, table, grid.blocks


def _outputs(qkv: Tensor, save_lse: bool) -> tuple[Tensor, Tensor]:
    """The result, and lse in float32 or empty."""
    tokens, _, heads, head_dim = qkv.shape
    out = torch_ops.allocate((tokens, heads, head_dim), qkv)
    return out, torch_ops.allocate((heads, tokens if save_lse else 0), qkv, torch.float32)


def _forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float, dropout_p: float, seeds: Tensor | None,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _outputs(qkv, save_lse)
    if _is_empty(qkv, cu_seqlens, max_seqlen):
        return out, lse
    tokens, _, heads, _ = qkv.shape
    tile = _plan(qkv, cu_seqlens, max_seqlen).forward
    cu_seqlens = cu_seqlens.contiguous()
    options = _options(qkv, seeds) | tile.options(qkv.shape[3])
    options |= dict(NEGATIVE=softmax_scale < 0, SAVE_LSE=save_lse)
    numbers = (abs(softmax_scale) * _LOG2_E, *philox.numbers(dropout_p), *qkv.stride())
    with triton_rows.on_device(qkv):
        if tile.pairs:
            pairs = (cu_seqlens.shape[0] - 1) * heads
            triton_launch.launch(
                triton_forward.forward_pairs, (triton.cdiv(pairs, tile.pairs),),
                qkv, cu_seqlens, out, lse, seeds, tokens, heads, pairs, *numbers, BLOCK_L=tile.rows, PAIRS=tile.pairs,
                **options,
            )  # fmt: skip
        else:
            programs, table, blocks = _blocks(qkv, cu_seqlens, max_seqlen, tile.rows)
            triton_launch.launch(
                triton_forward.forward_blocks, (heads * programs,),
                qkv, cu_seqlens, table, out, lse, seeds, tokens, heads, blocks, *numbers, BLOCK_M=tile.rows,
                BLOCK_N=tile.columns, SINGLE=max_seqlen <= tile.columns, HAS_TABLE=table is not None, **options,
            )  # fmt: skip
    return out, lse


def _gradient(qkv: Tensor) -> Tensor:
    return torch_ops.allocate(qkv.shape, qkv)


def _backward(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float, dropout_p: float,
    seeds: Tensor | None, out: Tensor, lse: Tensor,
) -> Tensor:  # fmt: skip
    grad_qkv = _gradient(qkv)
    if _is_empty(qkv, cu_seqlens, max_seqlen):
        return grad_qkv
    tokens, _, heads, head_dim = qkv.shape
    plan = _plan(qkv, cu_seqlens, max_seqlen)
    cu_seqlens = cu_seqlens.contiguous()
    options = _options(qkv, seeds)
    numbers = (softmax_scale * _LOG2_E, softmax_scale, *philox.numbers(dropout_p), *qkv.stride(), *grad.stride())
    with triton_rows.on_device(qkv):
        if plan.whole is None:
            delta = torch_ops.allocate(lse.shape, lse)
            tile = plan.query
            programs, table, blocks = _blocks(qkv, cu_seqlens, max_seqlen, tile.rows)
            triton_launch.launch(
                triton_backward.backward_query, (heads * programs,),
                qkv, cu_seqlens, table, out, lse, delta, grad, grad_qkv, seeds, tokens, heads, blocks,
                *numbers, BLOCK_M=tile.rows, BLOCK_N=tile.columns, HAS_TABLE=table is not None,
                **tile.options(head_dim), **options,
            )  # fmt: skip
            tile = plan.key
            programs, table, blocks = _blocks(qkv, cu_seqlens, max_seqlen, tile.columns)
            triton_launch.launch(
                triton_backward.backward_key, (heads * programs,),
                qkv, cu_seqlens, table, lse, delta, grad, grad_qkv, seeds, tokens, heads, blocks,
                *numbers, BLOCK_M=tile.rows, BLOCK_N=tile.columns, HAS_TABLE=table is not None,
                **tile.options(head_dim), **options,
            )  # fmt: skip
            return grad_qkv
        tile, pairs = plan.whole, (cu_seqlens.shape[0] - 1) * heads
        pointers = (qkv, cu_seqlens, lse, grad, grad_qkv, seeds)
        options = options | dict(BLOCK_L=tile.rows) | tile.options(head_dim)
        if tile.pairs:
            triton_launch.launch(
                triton_backward.backward_pairs,
                (triton.cdiv(pairs, tile.pairs),),
                *pointers,
                tokens,
                heads,
                pairs,
                *numbers,
                PAIRS=tile.pairs,
                **options,
            )
        else:
            triton_launch.launch(
                triton_backward.backward_whole, (pairs,), *pointers, tokens, heads, *numbers, **options
            )
    return grad_qkv


_fwd = torch_ops.define("attention_triton_fwd", _forward, _outputs, triton_rows.DISPATCH)
_bwd = torch_ops.define("attention_triton_bwd", _backward, _gradient, triton_rows.DISPATCH)


def _mask(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float, seeds: Tensor | None) -> Tensor | None:
    """(S, H, L, L): the mask that triton_dropout draws, for the definition."""
    if seeds is None:
        return None
    sequences, heads = cu_seqlens.shape[0] - 1, qkv.shape[2]
    key = torch.arange(max_seqlen, device=qkv.device)
    query, pair = key[:, None], torch.arange(sequences * heads, device=qkv.device).view(sequences, heads, 1, 1)
    counter = ((query >> 4) * 8 + (query & 7), (key >> 4) * 4 + ((key & 7) >> 1), pair, seeds[1])
    which = ((query >> 3) & 1) * 2 + ((key >> 3) & 1)
    bits = philox.half(philox.draw(counter, seeds[0]), which, (key & 1) == 1)
    return philox.multiplier(bits, dropout_p, torch.promote_types(qkv.dtype, torch.float32))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float, dropout_p: float,
        seeds: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out, lse = _fwd(qkv, cu_seqlens, max_seqlen, softmax_scale, dropout_p, seeds, True)
        ctx.save_for_backward(qkv, cu_seqlens, seeds, out, lse)
        ctx.numbers = (max_seqlen, softmax_scale, dropout_p)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cu_seqlens, seeds, out, lse = ctx.saved_tensors
        max_seqlen, _, dropout_p = ctx.numbers
        if torch_ops.needs_definition(grad):
            mask = _mask(qkv, cu_seqlens, max_seqlen, dropout_p, seeds)
            constants = definition.Constants(*ctx.numbers)
            wanted = (True, False, False)
            grads = definition.gradients(grad, (qkv, None, None), cu_seqlens, None, constants, mask, wanted)
            return grads[0], None, None, None, None, None
        return _bwd(grad, qkv, cu_seqlens, *ctx.numbers, seeds, out, lse), None, None, None, None, None


_SDPA = SDPBackend.CUDNN_ATTENTION


def _is_for_sdpa(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout_p: float) -> bool:
    """Whether all sequences have ``max_seqlen`` tokens, which the host knows by counting, and SDPA is faster then."""
    if not triton_plan.FULL_BY_SDPA or torch.compiler.is_compiling():
        return False
    tokens, _, heads, head_dim = qkv.shape
    sequences = cu_seqlens.shape[0] - 1
    if dropout_p or scale <= 0 or qkv.dtype == torch.float32 or not 0 < tokens == sequences * max_seqlen:
        return False
    measured = triton_plan.FULL_BY_SDPA.get(_major(qkv))
    return measured is not None and measured(sequences, max_seqlen, heads, head_dim)


def _by_sdpa(qkv: Tensor, max_seqlen: int, scale: float) -> Tensor:
    query, key, value = qkv.unflatten(0, (-1, max_seqlen)).permute(2, 0, 3, 1, 4)  # (S, H, L, D) each
    with sdpa_kernel(_SDPA):
        context = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return context.transpose(1, 2).reshape(qkv.shape[0], *qkv.shape[2:])


def _why_plain(args: Mapping[str, Any]) -> str | None:
    found = [name for name in ("relative_bias", "window", "rotary", "num_kv_heads") if args[name] is not None]
    return f"it has no {' and no '.join(found)}." if found else None


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    qkv = args["qkv"]
    objection = _why_plain(args) or triton_rows.why_not("qkv", qkv)
    if objection is not None:
        return objection
    if qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu":
        return "Triton's interpreter gets products of bfloat16 wrong."
    if qkv.shape[3] > _MAX_HEAD_DIM:
        return f"it takes heads of at most {_MAX_HEAD_DIM} and head_dim is {qkv.shape[3]}."
    return None


def remark(args: Mapping[str, Any]) -> str | None:
    """None, or what heads of this size cost."""
    head_dim = args["qkv"].shape[-1]
    filled = triton_rows.block(head_dim)
    if head_dim == filled:
        return None
    return f"heads of {head_dim} are filled up to {filled} on the chip: tiles of matrix units are powers of two"


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    bias: Tensor | None,
    softmax_scale: float | None,
    dropout_p: float,
    relative_bias: Tensor | None = None,
    window: int | None = None,
    rotary: Tensor | None = None,
    num_kv_heads: int | None = None,
) -> Tensor:
    """See ``ctxfast.functional.attention``."""
    if bias is not None:
        qkv = qkv + bias  # a pass of its own, which callers save by giving it to the product (see triton_forward)
    scale, seeds = definition.scale(qkv, softmax_scale), philox.draw_seeds(qkv, dropout_p)
    if registry.needs_grad(qkv):
        return _Attention.apply(qkv, cu_seqlens, max_seqlen, scale, dropout_p, seeds)
    if _is_for_sdpa(qkv, cu_seqlens, max_seqlen, scale, dropout_p):
        return _by_sdpa(qkv, max_seqlen, scale)
    return _fwd(qkv, cu_seqlens, max_seqlen, scale, dropout_p, seeds, False)[0]


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    qkv, dropout_p = args["qkv"], args["dropout_p"]
    rest = (definition.scale(qkv, args["softmax_scale"]), dropout_p, philox.draw_seeds(qkv, dropout_p))
    forward = (qkv, args["cu_seqlens"], args["max_seqlen"], *rest, True)
    out, lse = _fwd(*forward)
    return [(_fwd, forward), (_bwd, (torch.randn_like(out), *forward[:-1], out, lse))]


ARGUMENT_TYPES, HAS_PRODUCTS = {"scale": "fp32", "table": "*i32"}, True


def launches(dtype: str, arch: int) -> Iterator[triton_rows.Launch]:
    """What csrc/triton_resources.py compiles: every plan of triton_plan."""
    if dtype == "float32":
        yield "list of blocks", triton_blocks.list_blocks, dict(SIZE=64), triton_blocks.TILE
    kind = dtype if dtype in ("float32", "tf32") else "half"
    # 48 is filled up to 64. What float16 and TF32 change is the products' type: one size stands for all.
    sizes = {"bfloat16": (32, 48, 64, 128), "float32": (32, 64, 128)}
    for head_dim in sizes.get(dtype, (64,)):
        for plan in triton_plan.plans(head_dim, kind, arch // 10):
            for dropout in (True, False):
                shared = dict(
                    D=head_dim, BLOCK_D=triton_rows.block(head_dim), DROPOUT=dropout,
                    PRECISION="tf32" if kind == "tf32" else "ieee", stride_d=1, grad_stride_d=1,
                )  # fmt: skip
                where = f"D={head_dim} {'dropout' if dropout else 'plain'} up to {plan.longest or 'any'}"
                for name, kernel, tile, more in _launches(plan):
                    yield f"{where} {name}", kernel, shared | more, tile.options(head_dim)


def _launches(plan: triton_plan.Plan) -> Iterator[tuple[str, Any, triton_plan.Tile, dict[str, Any]]]:
    """(pass, kernel, tile, constants) of a plan."""
    tile = plan.forward
    more: dict[str, Any] = dict(NEGATIVE=False, SAVE_LSE=True)
    if tile.pairs:
        yield "forward", triton_forward.forward_pairs, tile, more | dict(BLOCK_L=tile.rows, PAIRS=tile.pairs)
    else:
        single = 0 < plan.longest <= tile.columns
        more |= dict(BLOCK_M=tile.rows, BLOCK_N=tile.columns, HAS_TABLE=not single, SINGLE=single)
        yield "forward", triton_forward.forward_blocks, tile, more
    tile = plan.whole
    if tile is not None and tile.pairs:
        yield "backward", triton_backward.backward_pairs, tile, dict(BLOCK_L=tile.rows, PAIRS=tile.pairs)
    elif tile is not None:
        yield "backward", triton_backward.backward_whole, tile, dict(BLOCK_L=tile.rows)
    else:
        for name, tile in (("query", plan.query), ("key", plan.key)):
            kernel = getattr(triton_backward, f"backward_{name}")
            yield f"backward of {name}", kernel, tile, dict(BLOCK_M=tile.rows, BLOCK_N=tile.columns, HAS_TABLE=True)
