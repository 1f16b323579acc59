# SPDX-License-Identifier: Apache-2.0
"""``transformer_layers``: whole layers of BERT's encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ctxfast

from ..cases import Case, Row, Work
from ..inputs import EVERY_BERT, RAGGED_32, normal, padding, starts
from ..provider import Call, Outputs, Provider

ROWS = (
    Row("minilm 1x16", dict(lengths=(16,), N=384, H=12, M=1536, K=6), "small", cpu=EVERY_BERT, cuda=()),
    Row("bert-base 1x16, one layer", dict(lengths=(16,), N=768, H=12, M=3072, K=1), "small", cpu=EVERY_BERT, cuda=()),
    Row("bert-base 1x128, one layer", dict(lengths=(128,), N=768, H=12, M=3072, K=1), cpu=EVERY_BERT),
    Row(
        "bert-base ragged 32 (fill 0.39), one layer",
        dict(lengths=RAGGED_32, N=768, H=12, M=3072, K=1),
        cpu=EVERY_BERT,
        cuda=(),
    ),
)
TINY = dict(lengths=(4, 1, 3), N=8, H=2, M=12, K=2)


def make(random: torch.Generator, lengths: tuple[int, ...], N: int, H: int, M: int, K: int) -> dict[str, Any]:
    def product(out: int, size: int) -> tuple[Tensor, Tensor]:
        return normal(random, out, size, std=size**-0.5), normal(random, out, std=0.1)

    def norm() -> tuple[Tensor, Tensor]:
        return 1 + normal(random, N, std=0.1), normal(random, N, std=0.1)

    weights: list[Tensor] = []
    for _ in range(K):
        weights += (*product(3 * N, N), *product(N, N), *norm(), *product(M, N), *product(N, M), *norm())
    return dict(
        x=normal(random, sum(lengths), N),
        cu_seqlens=starts(lengths),
        max_seqlen=max(lengths),
        weights=tuple(weights),
        num_heads=H,
    )


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    return encoder_work(sizes["lengths"], sizes["K"], sizes["N"], sizes["M"], backward)


def encoder_work(lengths: tuple[int, ...], layers: int, hidden: int, feed_forward: int, backward: bool) -> Work:
    """Of an encoder's layers over packed texts."""
    per_token = 2.0 * (4 * hidden**2 + 2 * hidden * feed_forward)
    attended = 4.0 * sum(n * n for n in lengths) * hidden
    return Work(flops=(3 if backward else 1) * layers * (sum(lengths) * per_token + attended), tokens=sum(lengths))


def _layers(args: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
    weights = args["weights"]
    return [weights[i : i + 12] for i in range(0, len(weights), 12)]


def _build_encoder(case: Case, args: Mapping[str, Any]) -> Call:
    row, inside, places = padding(args)
    x, layers = args["x"][row].masked_fill(~inside[:, :, None], 0), _layers(args)  # padded for free
    layer = torch.nn.TransformerEncoderLayer(
        x.shape[-1], args["num_heads"], layers[0][6].shape[0], 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
    )
    encoder = torch.nn.TransformerEncoder(layer, len(layers))
    parts = ("self_attn.in_proj_", "self_attn.out_proj.", "norm1.", "linear1.", "linear2.", "norm2.")
    names = [part + kind for part in parts for kind in ("weight", "bias")]
    for layer, weights in zip(encoder.layers, layers):
        layer.load_state_dict(dict(zip(names, weights)))
    encoder = encoder.to(case.device, case.dtype).eval()
    outside = None if bool(inside.all()) else ~inside
    return Call(
        lambda: (encoder(x, src_key_padding_mask=outside),),
        to_case=lambda outputs: (outputs[0].flatten(0, 1)[places],),
    )


def _build_layer_parts(case: Case, args: Mapping[str, Any]) -> Call:
    offsets, longest, heads = args["cu_seqlens"], args["max_seqlen"], args["num_heads"]
    weight_dtype, layers = args.get("weight_dtype"), _layers(args)
    product = partial(ctxfast.functional.linear_act, weight_dtype=weight_dtype)
    block = partial(ctxfast.functional.feed_forward, weight_dtype=weight_dtype)
    norm = ctxfast.functional.add_layer_norm

    def forward() -> Outputs:
        x = args["x"]
        for w_qkv, b_qkv, w, b, gain, shift, w_wide, b_wide, w_narrow, b_narrow, last_gain, last_shift in layers:
            qkv = product(x, w_qkv, b_qkv).unflatten(-1, (3, heads, x.shape[1] // heads))
            context = ctxfast.functional.attention(qkv, offsets, longest).flatten(1)
            h = norm(product(context, w), x, gain, shift, b)
            x = norm(block(h, w_wide, b_wide, w_narrow), h, last_gain, last_shift, b_narrow)
        return (x,)

    return Call(forward)


PEERS = (
    Provider("ctxfast, part by part", _build_layer_parts, "six calls a layer", ours=True),
    Provider("nn.TransformerEncoder", _build_encoder, "padding not timed"),
)
