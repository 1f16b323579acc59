# SPDX-License-Identifier: Apache-2.0
"""``attention`` in Triton: packed, forward and backward, dropout from a counter.

The forward keeps its result and lse (H, T); the backward makes the probabilities again. Every sum has a fixed order
and no kernel uses atomics: two runs are equal to the last bit. The tiles, and with them the last bits, depend on the
range max_seqlen falls in and on how full the batch is (triton_plan). Nothing is read back to the host: grids come from
max_seqlen and the numbers of tokens and sequences, and programs past a sequence's end leave at once. Rotations, and the
gradient of the relative bias, are passes of their own (triton_places).
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
from . import definition, triton_backward, triton_blocks, triton_forward, triton_places, triton_plan

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
    return triton_plan.choose(qkv.shape[-1], _kind(qkv.dtype), _major(qkv), max_seqlen, mean)


def _is_empty(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> bool:
    return qkv.numel() == 0 or cu_seqlens.shape[0] == 1 or max_seqlen == 0


def _options(
    qkv: Tensor, seeds: Tensor | None, relative_bias: Tensor | None, window: int | None, num_kv_heads: int | None
) -> dict[str, Any]:
    """What every kernel is compiled for."""
    head_dim, (heads, kv_heads) = qkv.shape[-1], definition.head_counts(qkv, num_kv_heads)
    return dict(
        D=head_dim, BLOCK_D=triton_rows.block(head_dim), DROPOUT=seeds is not None,
        PRECISION="tf32" if _kind(qkv.dtype) == "tf32" else "ieee",
        RELATIVE=relative_bias is not None, WINDOW=window is not None, GROUP=heads // kv_heads,
        enable_fp_fusion=True,  # said, because Triton's default differs between versions
    )  # fmt: skip


def _strides(qkv: Tensor, num_kv_heads: int | None) -> tuple[int, ...]:
    """Between tokens, from queries to keys, between heads and dimensions."""
    if num_kv_heads is None:
        return qkv.stride()
    heads, _ = definition.head_counts(qkv, num_kv_heads)
    return qkv.stride(0), heads * qkv.stride(1), qkv.stride(1), qkv.stride(2)


def _reach(relative_bias: Tensor | None, window: int | None) -> tuple[int, int]:
    """How far the relative bias goes to either side, and the window; 0 where there is none."""
    return 0 if relative_bias is None else relative_bias.shape[1] // 2, min(window or 0, 2**30)


def _blocks(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, size: int) -> tuple[int, Tensor | None, int]:
    """(programs, table or None, blocks a sequence) of a kernel over blocks of ``size`` tokens."""
    sequences = cu_seqlens.shape[0] - 1
    grid = triton_plan.grid(qkv.shape[0], sequences, max_seqlen, size)
    table = triton_blocks.block_table(cu_seqlens, grid.programs, size) if grid.has_table else None
    return grid.programs, table, grid.blocks


def _outputs(qkv: Tensor, num_kv_heads: int | None, save_lse: bool) -> tuple[Tensor, Tensor]:
    """The result, and lse in float32 or empty."""
    tokens, head_dim, (heads, _) = qkv.shape[0], qkv.shape[-1], definition.head_counts(qkv, num_kv_heads)
    out = torch_ops.allocate((tokens, heads, head_dim), qkv)
    return out, torch_ops.allocate((heads, tokens if save_lse else 0), qkv, torch.float32)


def _forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float, dropout_p: float, seeds: Tensor | None,
    relative_bias: Tensor | None, window: int | None, num_kv_heads: int | None, save_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _outputs(qkv, num_kv_heads, save_lse)
    if _is_empty(qkv, cu_seqlens, max_seqlen):
        return out, lse
    tokens, (heads, _) = qkv.shape[0], definition.head_counts(qkv, num_kv_heads)
    tile = _plan(qkv, cu_seqlens, max_seqlen).forward
    cu_seqlens = cu_seqlens.contiguous()
    relative_bias = None if relative_bias is None else relative_bias.contiguous()
    options = _options(qkv, seeds, relative_bias, window, num_kv_heads) | tile.options(qkv.shape[-1])
    options |= dict(NEGATIVE=softmax_scale < 0, SAVE_LSE=save_lse)
    numbers = (
        *_reach(relative_bias, window), abs(softmax_scale) * _LOG2_E, *philox.numbers(dropout_p),
        *_strides(qkv, num_kv_heads),
    )  # fmt: skip
    with triton_rows.on_device(qkv):
        if tile.pairs:
            pairs = (cu_seqlens.shape[0] - 1) * heads
            triton_launch.launch(
                triton_forward.forward_pairs, (triton.cdiv(pairs, tile.pairs),),
                qkv, cu_seqlens, out, lse, seeds, relative_bias, tokens, heads, pairs, *numbers, BLOCK_L=tile.rows,
                PAIRS=tile.pairs, **options,
            )  # fmt: skip
        else:
            programs, table, blocks = _blocks(qkv, cu_seqlens, max_seqlen, tile.rows)
            triton_launch.launch(
                triton_forward.forward_blocks, (heads * programs,),
                qkv, cu_seqlens, table, out, lse, seeds, relative_bias, tokens, heads, blocks, *numbers,
                BLOCK_M=tile.rows, BLOCK_N=tile.columns, SINGLE=max_seqlen <= tile.columns,
                HAS_TABLE=table is not None, **options,
            )  # fmt: skip
    return out, lse


def _gradients(qkv: Tensor, relative_bias: Tensor | None, has_table: bool) -> tuple[Tensor, Tensor]:
    """Of qkv and, or empty, of relative_bias."""
    size = relative_bias.shape if has_table and relative_bias is not None else (0,)
    return torch_ops.allocate(qkv.shape, qkv), torch_ops.allocate(size, qkv, torch.float32)


def _backward(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float, dropout_p: float,
    seeds: Tensor | None, relative_bias: Tensor | None, window: int | None, num_kv_heads: int | None, has_table: bool,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``has_table``: whether the gradient of relative_bias is wanted."""
    grad_qkv, grad_table = _gradients(qkv, relative_bias, has_table)
    if _is_empty(qkv, cu_seqlens, max_seqlen):
        return grad_qkv, grad_table.zero_()
    tokens, head_dim, (heads, kv_heads) = qkv.shape[0], qkv.shape[-1], definition.head_counts(qkv, num_kv_heads)
    plan = _plan(qkv, cu_seqlens, max_seqlen)
    cu_seqlens = cu_seqlens.contiguous()
    relative_bias = None if relative_bias is None else relative_bias.contiguous()
    options = _options(qkv, seeds, relative_bias, window, num_kv_heads)
    numbers = (
        *_reach(relative_bias, window), softmax_scale * _LOG2_E, softmax_scale, *philox.numbers(dropout_p),
        *_strides(qkv, num_kv_heads), *grad.stride(),
    )  # fmt: skip
    # Where heads share keys and values each leaves its own gradients, which are then added up in order.
    every = grad_qkv if kv_heads == heads else torch_ops.allocate((tokens, 3, heads, head_dim), qkv, torch.float32)
    with triton_rows.on_device(qkv):
        if plan.whole is None:
            delta = torch_ops.allocate(lse.shape, lse)
            tile = plan.query
            programs, table, blocks = _blocks(qkv, cu_seqlens, max_seqlen, tile.rows)
            triton_launch.launch(
                triton_backward.backward_query, (heads * programs,),
                qkv, cu_seqlens, table, out, lse, delta, grad, every, seeds, relative_bias, tokens, heads, blocks,
                *numbers, BLOCK_M=tile.rows, BLOCK_N=tile.columns, HAS_TABLE=table is not None,
                **tile.options(head_dim), **options,
            )  # fmt: skip
            tile = plan.key
            programs, table, blocks = _blocks(qkv, cu_seqlens, max_seqlen, tile.columns)
            triton_launch.launch(
                triton_backward.backward_key, (heads * programs,),
                qkv, cu_seqlens, table, lse, delta, grad, every, seeds, relative_bias, tokens, heads, blocks,
                *numbers, BLOCK_M=tile.rows, BLOCK_N=tile.columns, HAS_TABLE=table is not None,
                **tile.options(head_dim), **options,
            )  # fmt: skip
        else:
            tile, pairs = plan.whole, (cu_seqlens.shape[0] - 1) * heads
            pointers = (qkv, cu_seqlens, lse, grad, every, seeds, relative_bias)
            tiled = options | dict(BLOCK_L=tile.rows) | tile.options(head_dim)
            if tile.pairs:
                triton_launch.launch(
                    triton_backward.backward_pairs, (triton.cdiv(pairs, tile.pairs),),
                    *pointers, tokens, heads, pairs, *numbers, PAIRS=tile.pairs, **tiled,
                )  # fmt: skip
            else:
                triton_launch.launch(
                    triton_backward.backward_whole, (pairs,), *pointers, tokens, heads, *numbers, **tiled
                )
    if every is not grad_qkv:
        shared = every[:, 1:].unflatten(2, (kv_heads, -1)).sum(3).flatten(1, 2)
        grad_qkv.copy_(torch.cat((every[:, 0], shared), dim=1))
    if has_table:
        _table_backward(grad, qkv, cu_seqlens, max_seqlen, seeds, relative_bias, out, lse, numbers, options, grad_table)
    return grad_qkv, grad_table


def _table_backward(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, seeds: Tensor | None, relative_bias: Tensor,
    out: Tensor, lse: Tensor, numbers: tuple[Any, ...], options: dict[str, Any], grad_table: Tensor,
) -> None:  # fmt: skip
    """The gradient of the relative bias, from another look at all blocks of scores: see triton_places."""
    tokens, heads, sequences = qkv.shape[0], out.shape[1], cu_seqlens.shape[0] - 1
    size = triton_places.block_of(qkv.dtype, qkv.shape[-1])
    blocks = triton.cdiv(max_seqlen, size)
    diagonals = torch.zeros((2, sequences, heads, 2 * blocks * size), dtype=torch.float32, device=qkv.device)
    most, window, scale, _, *rest = numbers
    options = {name: value for name, value in options.items() if name != "RELATIVE"}
    with triton_rows.on_device(qkv):
        triton_launch.launch(
            triton_places.backward_relative, (sequences * heads, 2 * blocks - 1),
            qkv, cu_seqlens, out, lse, grad, relative_bias, diagonals, seeds, tokens, heads, blocks, most, window,
            scale, *rest, BLOCK=size, num_warps=4, num_stages=1, **options,
        )  # fmt: skip
    grad_table.copy_(triton_places.table_gradient(diagonals, relative_bias.shape[1]))


_fwd = torch_ops.define("attention_triton_fwd", _forward, _outputs, triton_rows.DISPATCH)
_bwd = torch_ops.define("attention_triton_bwd", _backward, _gradients, triton_rows.DISPATCH)


def _mask(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float, seeds: Tensor | None,
    num_kv_heads: int | None = None,
) -> Tensor | None:  # fmt: skip
    """(S, H, L, L): the mask that triton_dropout draws, for the definition."""
    if seeds is None:
        return None
    sequences, (heads, _) = cu_seqlens.shape[0] - 1, definition.head_counts(qkv, num_kv_heads)
    key = torch.arange(max_seqlen, device=qkv.device)
    query, pair = key[:, None], torch.arange(sequences * heads, device=qkv.device).view(sequences, heads, 1, 1)
    counter = ((query >> 4) * 8 + (query & 7), (key >> 4) * 4 + ((key & 7) >> 1), pair, seeds[1])
    which = ((query >> 3) & 1) * 2 + ((key >> 3) & 1)
    bits = philox.half(philox.draw(counter, seeds[0]), which, (key & 1) == 1)
    return philox.multiplier(bits, dropout_p, torch.promote_types(qkv.dtype, torch.float32))


class _Attention(torch.autograd.Function):
    """On rows that hold their bias and are rotated."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, relative_bias: Tensor | None, cu_seqlens: Tensor, seeds: Tensor | None,
        constants: definition.Constants,
    ) -> Tensor:  # fmt: skip
        max_seqlen, scale, dropout_p, window, num_kv_heads = constants
        out, lse = _fwd(qkv, cu_seqlens, max_seqlen, scale, dropout_p, seeds, relative_bias, window, num_kv_heads, True)
        ctx.save_for_backward(qkv, relative_bias, cu_seqlens, seeds, out, lse)
        ctx.constants = constants
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, relative_bias, cu_seqlens, seeds, out, lse = ctx.saved_tensors
        max_seqlen, scale, dropout_p, window, num_kv_heads = ctx.constants
        of_rows, of_table = ctx.needs_input_grad[:2]
        if torch_ops.needs_definition(grad):
            mask = _mask(qkv, cu_seqlens, max_seqlen, dropout_p, seeds, num_kv_heads)
            found = definition.gradients(
                grad, (qkv, None, relative_bias), cu_seqlens, None, ctx.constants, mask, (of_rows, False, of_table)
            )
            return found[0], found[2], None, None, None
        grad_qkv, grad_table = _bwd(
            grad, qkv, cu_seqlens, max_seqlen, scale, dropout_p, seeds, relative_bias, window, num_kv_heads, of_table,
            out, lse,
        )  # fmt: skip
        return grad_qkv if of_rows else None, grad_table if of_table else None, None, None, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, rotary: Tensor, turned: int, way: float) -> Tensor:
        ctx.save_for_backward(cu_seqlens, rotary)
        ctx.turned, ctx.way = turned, way
        return triton_places.rotation(qkv, cu_seqlens, rotary, turned, way)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cu_seqlens, rotary = ctx.saved_tensors
        rotate = triton_places.plain_rotation if torch_ops.needs_definition(grad) else triton_places.rotation
        return rotate(grad, cu_seqlens, rotary, ctx.turned, -ctx.way), None, None, None, None


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


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    qkv = args["qkv"]
    objection = triton_rows.why_not("qkv", qkv)
    if objection is not None:
        return objection
    if qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu":
        return "Triton's interpreter gets products of bfloat16 wrong."
    if qkv.shape[-1] > _MAX_HEAD_DIM:
        return f"it takes heads of at most {_MAX_HEAD_DIM} and head_dim is {qkv.shape[-1]}."
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
    heads, kv_heads = definition.head_counts(qkv, num_kv_heads)
    has_grad = registry.needs_grad(qkv, relative_bias)
    if rotary is not None:
        turn = _Rotation.apply if registry.needs_grad(qkv) else triton_places.rotation
        qkv = turn(qkv, cu_seqlens, rotary, heads + kv_heads, 1.0)
    scale, seeds = definition.scale(qkv, softmax_scale), philox.draw_seeds(qkv, dropout_p)
    if has_grad:
        constants = definition.Constants(max_seqlen, scale, dropout_p, window, num_kv_heads)
        return _Attention.apply(qkv, relative_bias, cu_seqlens, seeds, constants)
    is_plain = relative_bias is None and window is None and num_kv_heads is None
    if is_plain and _is_for_sdpa(qkv, cu_seqlens, max_seqlen, scale, dropout_p):
        return _by_sdpa(qkv, max_seqlen, scale)
    return _fwd(qkv, cu_seqlens, max_seqlen, scale, dropout_p, seeds, relative_bias, window, num_kv_heads, False)[0]


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    qkv, cu_seqlens, dropout_p, rotary = (args[name] for name in ("qkv", "cu_seqlens", "dropout_p", "rotary"))
    rest = (definition.scale(qkv, args["softmax_scale"]), dropout_p, philox.draw_seeds(qkv, dropout_p))
    places = tuple(args[name] for name in ("relative_bias", "window", "num_kv_heads"))
    forward = (qkv, cu_seqlens, args["max_seqlen"], *rest, *places)
    out, lse = _fwd(*forward, True)
    found = [
        (_fwd, (*forward, True)),
        (_bwd, (torch.randn_like(out), *forward, places[0] is not None, out, lse)),
    ]
    if rotary is None:
        return found
    return [
        *found,
        (triton_places.rotation, (qkv, cu_seqlens, rotary, sum(definition.head_counts(qkv, places[2])), 1.0)),
    ]


ARGUMENT_TYPES, HAS_PRODUCTS = (
    dict(
        scale="fp32", table="*i32", relative_bias="*fp32", diagonals="*fp32", places="*i32", angles="*fp32", way="fp32"
    ),
    True,
)


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
                    RELATIVE=False, WINDOW=False, GROUP=1, relative_bias=None,
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
