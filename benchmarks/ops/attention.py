# SPDX-License-Identifier: Apache-2.0
"""``attention``: BERT-Base's and MiniLM's heads, full batches and ragged ones; without a bias, which the product before
it adds in every encoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cases import Case, Row, Work
from ..inputs import RAGGED_32, normal, padding, starts
from ..provider import Call, Outputs, Provider, Unavailable, leaves_of

# Mean 47 too, but with a few that fill the model's positions.
_LONG_TAIL_256 = tuple(512 if i % 64 == 0 else RAGGED_32[i * 7 % 32] * 5 // 6 for i in range(256))

ROWS = (
    Row("bert-base 8x128", dict(lengths=(128,) * 8, H=12, D=64), "small", cpu=("float32", "bfloat16")),
    Row("bert-base 8x128", dict(lengths=(128,) * 8, H=12, D=64), passes=("fb",)),
    Row("minilm ragged 32 (fill 0.39)", dict(lengths=RAGGED_32, H=12, D=32), "small", cpu=("float32", "bfloat16")),
    Row("minilm ragged 32 (fill 0.39)", dict(lengths=RAGGED_32, H=12, D=32), passes=("fb",)),
    Row("bert-base 1x128", dict(lengths=(128,), H=12, D=64), cpu=("float32", "bfloat16")),
    Row("bert-base 4x512", dict(lengths=(512,) * 4, H=12, D=64), cpu=("float32", "bfloat16"), cuda=()),
    Row("bert-base 64x128", dict(lengths=(128,) * 64, H=12, D=64), cpu=(), passes=("f", "fb")),
    Row("bert-base 64x128 dropout", dict(lengths=(128,) * 64, H=12, D=64, dropout=0.1), cpu=(), passes=("fb",)),
    Row("bert-base 256x128", dict(lengths=(128,) * 256, H=12, D=64), cpu=()),
    Row("bert-base 32x512", dict(lengths=(512,) * 32, H=12, D=64), cpu=(), passes=("f", "fb")),
    Row("bert-base 32x512 dropout", dict(lengths=(512,) * 32, H=12, D=64, dropout=0.1), cpu=(), passes=("fb",)),
    Row("bert-base ragged 256", dict(lengths=RAGGED_32 * 8, H=12, D=64), cpu=(), passes=("f", "fb")),
    Row("bert-base ragged 256 dropout", dict(lengths=RAGGED_32 * 8, H=12, D=64, dropout=0.1), cpu=(), passes=("fb",)),
    Row("bert-base ragged 256 to 512", dict(lengths=_LONG_TAIL_256, H=12, D=64), cpu=(), passes=("f", "fb")),
    Row("minilm 64x128", dict(lengths=(128,) * 64, H=12, D=32), cpu=(), passes=("f", "fb")),
    Row("minilm ragged 1024", dict(lengths=RAGGED_32 * 32, H=12, D=32), cpu=(), passes=("f", "fb")),
    Row("minilm 1024x16", dict(lengths=(16,) * 1024, H=12, D=32), cpu=(), passes=("f", "fb")),
)
TINY = dict(lengths=(4, 1, 3), H=2, D=8)
GRADS = ("qkv",)


def make(random: torch.Generator, lengths: tuple[int, ...], H: int, D: int, dropout: float = 0.0) -> dict[str, Any]:
    offsets = starts(lengths)
    qkv = normal(random, sum(lengths), 3, H, D)
    return dict(qkv=qkv, cu_seqlens=offsets, max_seqlen=max(lengths))


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    lengths, width = sizes["lengths"], sizes["H"] * sizes["D"]
    flops = 4.0 * sum(n * n for n in lengths) * width
    # The backward pass is five products to the forward pass's two.
    return Work(flops=(3.5 if backward else 1) * flops, tokens=sum(lengths))


def _build_sdpa(use_mask: bool, backend: str | None = None) -> Callable[[Case, Mapping[str, Any]], Call]:
    def build(case: Case, args: Mapping[str, Any]) -> Call:
        row, inside, places = padding(args)
        if not use_mask and not bool(inside.all()):
            raise Unavailable("without a mask it is wrong for sequences of different lengths")
        # The peer lives in a padded world: its input comes padded, and packing is not charged to it.
        qkv = args["qkv"].detach()[row].masked_fill(~inside[:, :, None, None, None], 0)  # (S, L, 3, H, D)
        qkv.requires_grad_(case.backward)
        mask = inside[:, None, None, :] if use_mask else None
        dropout = args.get("dropout_p", 0.0)

        def forward() -> Outputs:
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            with nullcontext() if backend is None else sdpa_kernel(SDPBackend.__members__[backend]):
                context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
            return (context.transpose(1, 2),)  # (S, L, H, D)

        def to_own(grads: Outputs) -> Outputs:
            return (grads[0][row].masked_fill(~inside[:, :, None, None], 0),)

        if backend is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why each other backend was passed over
                try:
                    forward()
                except RuntimeError as error:
                    if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                        raise
                    raise Unavailable("this backend does not take the case") from None
        return Call(
            forward,
            {"qkv": (qkv,)} if case.backward else None,
            to_case=lambda outputs: (outputs[0].flatten(0, 1)[places],),
            to_own=to_own,
            leaf_to_case=lambda name, grad: grad.flatten(0, 1)[places],
        )

    return build


def _build_varlen(case: Case, args: Mapping[str, Any]) -> Call:
    if case.device != "cuda":
        raise Unavailable("torch.nn.attention.varlen runs on CUDA only")
    if args.get("dropout_p"):
        raise Unavailable("it has no dropout")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.attention.varlen") from None
    qkv, offsets, longest = args["qkv"], args["cu_seqlens"], args["max_seqlen"]

    def forward() -> Outputs:
        query, key, value = qkv.unbind(1)
        return (varlen_attn(query, key, value, offsets, offsets, longest, longest),)

    return Call(forward, leaves_of(case, args))


PEERS = (
    Provider("SDPA padded, key mask", _build_sdpa(True), "padding not timed"),
    Provider("SDPA padded, no mask", _build_sdpa(False), "padding not timed"),
    *(
        Provider(name, _build_sdpa("key mask" in name, backend), "padding not timed", device="cuda")
        for name, backend in (
            ("SDPA padded, key mask, cuDNN", "CUDNN_ATTENTION"),
            ("SDPA padded, key mask, mem-efficient", "EFFICIENT_ATTENTION"),
            ("SDPA padded, no mask, cuDNN", "CUDNN_ATTENTION"),
            ("SDPA padded, no mask, flash", "FLASH_ATTENTION"),
            ("SDPA padded, no mask, mem-efficient", "EFFICIENT_ATTENTION"),
        )
    ),
    Provider("torch varlen_attn", _build_varlen),
)
